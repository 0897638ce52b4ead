"""The embedded video network: diffusers' UNet3DConditionModel on space-to-depth pixels, and its folder format.

x_t = (1-t) x0 + t eps with t in [0,1] (0 data, 1 noise), network time 1000 t; the output is flow = eps - x0.
Legend: B clips, F frames, L tokens, D their width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet3DConditionModel
from torch import Tensor, nn

from limbeck.core.run.errors import BadInput
from limbeck.core.text import WIDTH, pooled

UNET: Any = UNet3DConditionModel  # diffusers' own annotations hide that its models are modules
FACTOR = 2
TIME = 1000.0
WAVES = 8  # frequencies of the frame rate
RATE = 12.0  # frames a second where none is told
HEADS = 8
MARK = "limbeck.json"
Meta = dict[str, Any]


def build_net(size: int, channels: tuple[int, ...], layers: int) -> nn.Module:
    """A small text- and frame-rate-conditional video U-Net; cross-attention below the finest level."""
    deep = len(channels) - 1
    net: nn.Module = UNET(
        sample_size=size // FACTOR,
        in_channels=3 * FACTOR**2,
        out_channels=3 * FACTOR**2,
        block_out_channels=channels,
        layers_per_block=layers,
        norm_num_groups=8,  # a channel alone in its group would lose the shift that time and text give it
        cross_attention_dim=WIDTH,
        attention_head_dim=HEADS,
        time_cond_proj_dim=WIDTH + 2 * WAVES,
        down_block_types=("DownBlock3D", *["CrossAttnDownBlock3D"] * deep),
        up_block_types=(*["CrossAttnUpBlock3D"] * deep, "UpBlock3D"),
    )
    return net.eval()  # without the blocks' dropout, which draws from the global generator; nothing else differs


def unshuffled(x: Tensor) -> Tensor:
    """Pixels [B,3,F,H,W] -> [B,12,F,H/2,W/2]: every 2x2 block becomes channels."""
    return F.pixel_unshuffle(x.transpose(1, 2), FACTOR).transpose(1, 2)


def shuffled(x: Tensor) -> Tensor:
    """The inverse of `unshuffled`."""
    return F.pixel_shuffle(x.transpose(1, 2), FACTOR).transpose(1, 2)


def rate_features(fps: Tensor) -> Tensor:
    """sin and cos [B,16] of the frame rate [B] in octaves, in eight frequencies; entries of mean square one."""
    octave = torch.log2(fps.float() / RATE)
    angle = octave[:, None] * math.pi / 4 * torch.arange(1, WAVES + 1, device=fps.device)
    return torch.cat([angle.sin(), angle.cos()], 1) * math.sqrt(2)


def flow(net: nn.Module, x_t: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """Pixels [B,3,F,H,W] at network times [B] -> eps - x0 [B,3,F,H,W]; cond: states [B,L,D], mask [B,L], fps [B]."""
    fps = cond.get("fps")
    rates = rate_features(torch.full_like(time, RATE) if fps is None else fps)
    pool = pooled(cond["states"], cond["mask"])
    out = net(
        unshuffled(x_t),
        time,
        encoder_hidden_states=cond["states"],
        timestep_cond=torch.cat([pool, rates.to(pool)], 1).to(x_t),
        return_dict=False,
    )[0]
    return shuffled(out)


def save(net: Any, folder: Path, meta: Meta) -> list[Path]:
    """Writes folder/unet (diffusers format, bf16; the net itself stays as it is) and folder/limbeck.json."""
    half = nn.Module.to(UNET.from_config(net.config), torch.bfloat16)  # diffusers' own `to` prints a warning
    half.load_state_dict(net.state_dict())
    half.save_pretrained(folder / "unet", safe_serialization=True)
    (folder / MARK).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def load(folder: Path) -> tuple[nn.Module, Meta]:
    """Reads what `save` wrote: the net in float32 and evaluation mode, and its meta data."""
    path = folder / MARK
    if not path.is_file():
        raise BadInput(f"{folder} is no folder of a video teacher: it has no {MARK}")
    meta = json.loads(path.read_text(encoding="utf-8"))
    net = UNET.from_pretrained(folder / "unet", dtype=torch.float32, use_safetensors=True, local_files_only=True)
    return net.eval(), meta
