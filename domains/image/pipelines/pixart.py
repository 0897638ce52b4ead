"""PixArt-alpha and -sigma: T5 with an attention mask, size conditions at 1024 pixels, a learned sigma (dropped)."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.pipelines.family import ATTENTION, Family, Net, Options, Pipe, middle_block


def encode(pipe: Pipe, prompts: list[str], options: Options) -> Encoded:
    """T5 states and mask; resolution and aspect ratio for the nets that were trained with them."""
    states, mask, _, _ = pipe.encode_prompt(prompts, False, device=pipe.device, clean_caption=True, **length(pipe))
    cond = {"states": states, "mask": mask.to(states.dtype)}
    if uses_size(pipe):
        side = float(options.size[0])
        cond["resolution"] = torch.full((len(prompts), 2), side, dtype=states.dtype, device=states.device)
        cond["aspect_ratio"] = torch.ones(len(prompts), 1, dtype=states.dtype, device=states.device)
    return cond


def length(pipe: Pipe) -> dict[str, int]:
    """Sigma reads 300 tokens, alpha 120: each pipeline's own default."""
    return {"max_sequence_length": 300 if type(pipe).__name__ == "PixArtSigmaPipeline" else 120}


def uses_size(pipe: Pipe) -> bool:
    return type(pipe).__name__ == "PixArtAlphaPipeline" and pipe.transformer.config.sample_size == 128


def call(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    added = {"resolution": cond.get("resolution"), "aspect_ratio": cond.get("aspect_ratio")}
    raw: Tensor = net(
        x, encoder_hidden_states=cond["states"], encoder_attention_mask=cond["mask"], timestep=time,
        added_cond_kwargs=added, return_dict=False,
    )[0]  # fmt: skip
    return raw[:, : x.shape[1]]


def sample_size(pipe: Pipe) -> tuple[int, int]:
    return (int(pipe.transformer.config.sample_size * pipe.vae_scale_factor),) * 2


def taps(net: Net) -> tuple[str, ...]:
    return (f"transformer_blocks.{middle_block(net)}",)


PIXART = Family(
    name="pixart", pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"), net="transformer", encode=encode,
    call=call, sample_size=sample_size, targets=ATTENTION, taps=taps, guidance=4.5)  # fmt: skip
