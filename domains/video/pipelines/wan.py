"""Wan 2.1, and 2.2 where it is one transformer: UMT5 text, rectified flow, a causal autoencoder of 4k+1 frames."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.pipelines.family import ATTENTION, Net, Options, Pipe
from limbeck.domains.video.pipelines.family import VideoFamily

TOKENS = 512  # of a prompt: the pipeline's default


def encode(pipe: Pipe, prompts: list[str], options: Options) -> Encoded:
    states, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS, device=pipe.device)  # fmt: skip
    return {"states": states}


def call(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """Wan 2.2's 5B net is asked at one time a token in its pipeline, all the same for clips from text alone."""
    raw: Tensor = net(x, time, cond["states"], return_dict=False)[0]
    return raw


def taps(net: Net) -> tuple[str, ...]:
    return (f"blocks.{(len(net.blocks) - 1) // 2}.ffn",)


WAN = VideoFamily(
    name="wan", pipelines=("WanPipeline",), net="transformer", encode=encode, call=call,
    sample_size=lambda pipe: (480, 832), targets=ATTENTION, taps=taps, guidance=5.0, frames=lambda pipe: 81,
    refused=("transformer_2",),  # 2.2 A14B: a second net for small noise
    spatial=lambda pipe: int(pipe.vae_scale_factor_spatial),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal))  # fmt: skip
