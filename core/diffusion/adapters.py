"""How diffusers models are called behind `Network`: the conditions they read, and nothing about training.

Keys of a condition: states [B,L,D] and mask [B,L] of a text encoder, pooled [B,D], label [B] whole, time_ids [B,6].
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Encoded, Network
from limbeck.core.diffusion.process import Process


def unet_call(net: nn.Module, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """UNet2DConditionModel: text states, optional mask, label, and SDXL's pooled text and sizes."""
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]} if "pooled" in cond else None
    return net(
        x,
        time,
        encoder_hidden_states=_like(cond, "states", x),
        encoder_attention_mask=cond.get("mask"),
        class_labels=cond.get("label"),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def dit_call(net: nn.Module, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """DiTTransformer2DModel: class labels; learned-variance channels are dropped."""
    out = net(x, timestep=time, class_labels=cond["label"], return_dict=False)[0]
    return out[:, : x.shape[1]]


def transformer_call(net: nn.Module, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """SD3Transformer2DModel: text states and pooled text."""
    return net(x, _like(cond, "states", x), _like(cond, "pooled", x), time, return_dict=False)[0]


def _like(cond: Encoded, key: str, x: Tensor) -> Tensor | None:
    return cond[key].to(x.dtype) if key in cond else None


CALLS = {"unet": unet_call, "dit": dit_call, "transformer": transformer_call}


def diffusers(
    net: nn.Module,
    process: Process,
    kind: str,
    family: str,
    time_scale: float | str = "index",
    taps: Sequence[str] = (),
) -> Network:
    """A diffusers model as a Denoiser; `kind` is what it predicts: eps, v, x0 or flow."""
    if family not in CALLS:
        raise ValueError(f"unknown family {family!r}; use one of {', '.join(CALLS)}")
    return Network(net, process, kind, CALLS[family], time_scale, taps)
