"""What a family of pipelines must say about itself; one file a family fills this in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded

Pipe = Any  # a diffusers pipeline and its net: their base classes have no useful types
Net = Any
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Options:
    """The choices of a user that reach the family's conditions."""

    size: tuple[int, int]  # height and width in pixels
    guidance: float  # enters the condition only where the net embeds it (Flux, HunyuanVideo)


@dataclass(frozen=True)
class Family:
    """A family: how its pipeline encodes text and how its net is called (time as the net wants it).

    call(net, x, time, cond) -> raw [B,*S]; encode(pipe, prompts, options) -> Encoded, one row a prompt.
    """

    name: str
    pipelines: tuple[str, ...]  # class names in model_index.json
    net: str  # the component that denoises
    encode: Callable[[Pipe, list[str], Options], Encoded]
    call: Callable[[Net, Tensor, Tensor, Encoded], Tensor]
    sample_size: Callable[[Pipe], tuple[int, int]]  # the family's usual height and width in pixels
    targets: tuple[str, ...]  # modules that LoRA adapts
    taps: Callable[[Net], tuple[str, ...]]  # submodules whose outputs are the features for adversarial heads
    guidance: float  # the pipeline's own default
    channels: Callable[[Net], int] = field(default=lambda net: int(net.config.in_channels))
    patch: int = 2  # latents per image token and side
    flow_scale: float = 1000.0  # the time of a flow net is this times sigma
    linear_sigmas: bool = False  # the pipeline hands sigmas 1 ... 1/n to its scheduler
    embeds_guidance: bool = False
    swapped: bool = False  # the pipeline draws noise with the first two axes of *S in the other order
    refused: tuple[str, ...] = ()  # parts of its pipelines without which alone they are understood


def guidance_rows(value: float, like: Tensor) -> Tensor:
    """The guidance scale as a condition, one number a row."""
    return torch.full((len(like),), value, dtype=torch.float32, device=like.device)


def middle_block(net: Net) -> int:
    """Index of the block in the middle of a transformer."""
    return (len(net.transformer_blocks) - 1) // 2
