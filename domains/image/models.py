"""The embedded teacher network: a diffusers U-Net on space-to-depth pixels, and its folder format.

Network time is 1000*t with t in [0,1] (0 data, 1 noise); x_t = (1-t) x0 + t eps; the output is flow = eps - x0.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from limbeck.core.run.errors import BadInput
from limbeck.core.text import pooled

FACTOR = 2
UNET: Any = UNet2DConditionModel  # diffusers' own annotations hide that its models are modules
META: dict[str, Any] = {
    "format": 1,
    "prediction": "flow",
    "space_to_depth": FACTOR,
    "size": 32,
    "text_encoder": "minilm",
    "time_scale": 1000,
}


def space_to_depth(x: Tensor, factor: int = FACTOR) -> Tensor:
    """[B,C,H,W] -> [B,C*f*f,H/f,W/f], exactly invertible."""
    return F.pixel_unshuffle(x, factor)


def depth_to_space(x: Tensor, factor: int = FACTOR) -> Tensor:
    """[B,C*f*f,H,W] -> [B,C,H*f,W*f], the inverse of space_to_depth."""
    return F.pixel_shuffle(x, factor)


def build_unet(
    size: int = 32, channels: tuple[int, ...] = (64, 128, 192), layers: int = 1, cross_dim: int = 384
) -> nn.Module:
    """A small text-conditional U-Net; cross-attention at 1/4 of the picture's side (8x8 for 32), and in the middle.

    The pooled text also joins the time embedding, which scales and shifts every block's normalised features.
    """
    plain = len(channels) - 2
    net: nn.Module = UNET(
        sample_size=size // FACTOR,
        in_channels=3 * FACTOR**2,
        out_channels=3 * FACTOR**2,
        block_out_channels=channels,
        layers_per_block=layers,
        cross_attention_dim=cross_dim,
        attention_head_dim=tuple(c // (64 if c % 64 == 0 else 32) for c in channels),  # diffusers' name: heads
        class_embed_type="projection",
        projection_class_embeddings_input_dim=cross_dim,
        resnet_time_scale_shift="scale_shift",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", *["DownBlock2D"] * plain),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=(*["UpBlock2D"] * plain, "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return net


def flow(unet: nn.Module, x_t: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Pixels [B,3,H,W] at times t [B] with text states [B,L,D] and mask [B,L] -> predicted eps - x0 [B,3,H,W]."""
    out = unet(
        space_to_depth(x_t),
        t * META["time_scale"],
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        class_labels=pooled(states, mask),
        return_dict=False,
    )[0]
    return depth_to_space(out)


def save_teacher(unet: nn.Module, folder: Path, meta: dict[str, Any] | None = None) -> None:
    """Writes folder/unet (diffusers format, bf16; the net itself stays as it is) and folder/limbeck.json."""
    half = nn.Module.to(UNET.from_config(unet.config), torch.bfloat16)  # diffusers' own `to` prints a warning
    half.load_state_dict(unet.state_dict())
    half.save_pretrained(folder / "unet", safe_serialization=True)
    text = json.dumps({**META, **(meta or {})}, indent=2)
    (folder / "limbeck.json").write_text(text + "\n", encoding="utf-8")


def load_teacher(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """Reads what save_teacher wrote: the net (in evaluation mode) and its meta data."""
    path = folder / "limbeck.json"
    if not path.exists():
        raise BadInput(f"{folder} is no teacher folder: it has no limbeck.json")
    meta = json.loads(path.read_text(encoding="utf-8"))
    unet = UNET.from_pretrained(folder / "unet", dtype=dtype, use_safetensors=True, local_files_only=True)
    return unet.eval(), meta
