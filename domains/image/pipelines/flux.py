"""Flux: packed 2x2 latents, rectified flow whose shift grows with the picture, guidance as an input of the net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.pipelines.family import JOINT, Family, Net, Options, Pipe, guidance_rows


def encode(pipe: Pipe, prompts: list[str], options: Options) -> Encoded:
    """T5 states, pooled CLIP state and, for guidance-distilled nets, the guidance scale of each row."""
    states, pooled, _ = pipe.encode_prompt(prompts, None, device=pipe.device)
    cond = {"states": states, "pooled": pooled}
    if pipe.transformer.config.guidance_embeds:
        cond["guidance"] = guidance_rows(options.guidance, states)
    return cond


def pack(x: Tensor) -> Tensor:
    """[B,C,H,W] -> tokens [B,(H/2)(W/2),4C]: each 2x2 patch becomes one token, channel first."""
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of height x width."""
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, height // 2, width // 2)
    return nn.functional.pixel_shuffle(grid, 2)


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """Rotary positions [(H/2)(W/2),3] = (0, row, column) of the image tokens."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(like)


def call(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    height, width = x.shape[-2:]
    text = torch.zeros(cond["states"].shape[1], 3, dtype=x.dtype, device=x.device)
    tokens = net(
        pack(x), encoder_hidden_states=cond["states"], pooled_projections=cond["pooled"], timestep=time,
        img_ids=positions(height, width, x), txt_ids=text, guidance=cond.get("guidance"), return_dict=False,
    )[0]  # fmt: skip
    return unpack(tokens, height, width)


def sample_size(pipe: Pipe) -> tuple[int, int]:
    return (int(pipe.default_sample_size * pipe.vae_scale_factor),) * 2


def channels(net: Net) -> int:
    return int(net.config.in_channels) // 4


def taps(net: Net) -> tuple[str, ...]:
    return (f"transformer_blocks.{len(net.transformer_blocks) - 1}.ff",)


FLUX = Family(
    name="flux", pipelines=("FluxPipeline",), net="transformer", encode=encode, call=call, sample_size=sample_size,
    targets=JOINT, taps=taps, guidance=3.5, channels=channels, flow_scale=1.0, linear_sigmas=True,
    embeds_guidance=True)  # fmt: skip
