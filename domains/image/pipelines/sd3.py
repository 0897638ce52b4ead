"""Stable Diffusion 3 and 3.5: a two-stream transformer, rectified flow."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.pipelines.family import JOINT, Family, Net, Options, Pipe, middle_block


def encode(pipe: Pipe, prompts: list[str], options: Options) -> Encoded:
    states, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, device=pipe.device, do_classifier_free_guidance=False)  # fmt: skip
    return {"states": states, "pooled": pooled}


def call(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    raw: Tensor = net(x, cond["states"], cond["pooled"], time, return_dict=False)[0]
    return raw


def sample_size(pipe: Pipe) -> tuple[int, int]:
    return (int(pipe.transformer.config.sample_size * pipe.vae_scale_factor),) * 2


def taps(net: Net) -> tuple[str, ...]:
    return (f"transformer_blocks.{middle_block(net)}.ff",)


SD3 = Family(
    name="stable-diffusion-3", pipelines=("StableDiffusion3Pipeline",), net="transformer", encode=encode, call=call,
    sample_size=sample_size, targets=JOINT, taps=taps, guidance=7.0)  # fmt: skip
