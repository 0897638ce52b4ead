"""CogVideoX 1.0 and 1.5: T5 text, v prediction, an SNR that falls to zero; its net has frames before channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.pipelines.family import ATTENTION, Net, Options, Pipe, middle_block
from limbeck.domains.video.pipelines.family import VideoFamily

Positions = tuple[Tensor, Tensor]  # cos and sin [L,D] of L tokens


def encode(pipe: Pipe, prompts: list[str], options: Options) -> Encoded:
    states, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, device=pipe.device,
        max_sequence_length=pipe.transformer.config.max_text_seq_length,
    )  # fmt: skip
    return {"states": states}


def call(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    rotary = positions(net, tuple(x.shape[2:]), x.device) if net.config.use_rotary_positional_embeddings else None
    raw: Tensor = net(
        x.transpose(1, 2), cond["states"], time, image_rotary_emb=rotary, return_dict=False)[0]  # fmt: skip
    return raw.transpose(1, 2)


def positions(net: Net, shape: tuple[int, ...], device: torch.device) -> Positions:
    """Rotary positions of latents of `shape` (frames, height, width).

    1.0: on the middle of the trained grid of tokens, stretched to it; 1.5: a corner of it, in its own units.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    config, depth = net.config, net.config.patch_size_t
    frames, (height, width) = shape[0], (side // config.patch_size for side in shape[1:])
    full = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    given: dict[str, Any] = {"embed_dim": config.attention_head_dim, "grid_size": (height, width), "device": device}
    if depth is None:
        given |= {"crops_coords": middle((height, width), full), "temporal_size": frames}
    else:
        given |= {"crops_coords": None, "temporal_size": -(-frames // depth), "grid_type": "slice", "max_size": full}
    found: Any = get_3d_rotary_pos_embed(**given)
    cos, sin = found
    return cos, sin


def middle(grid: tuple[int, int], full: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest rectangle of the grid's aspect in the middle of the full one: its first and last corners."""
    scale = min(full[0] / grid[0], full[1] / grid[1])
    height, width = round(scale * grid[0]), round(scale * grid[1])
    top, left = round((full[0] - height) / 2), round((full[1] - width) / 2)
    return (top, left), (top + height, left + width)


def sample_size(pipe: Pipe) -> tuple[int, int]:
    config = pipe.transformer.config
    return config.sample_height * spatial(pipe), config.sample_width * spatial(pipe)


def spatial(pipe: Pipe) -> int:
    return int(pipe.vae_scale_factor_spatial)


def taps(net: Net) -> tuple[str, ...]:
    return (f"transformer_blocks.{middle_block(net)}.ff",)


COGVIDEOX = VideoFamily(
    name="cogvideox", pipelines=("CogVideoXPipeline",), net="transformer", encode=encode, call=call,
    sample_size=sample_size, targets=ATTENTION, taps=taps, guidance=6.0, swapped=True,
    frames=lambda pipe: int(pipe.transformer.config.sample_frames), spatial=spatial,
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal), together=2,
    depth=lambda net: net.config.patch_size_t or 1)  # fmt: skip
