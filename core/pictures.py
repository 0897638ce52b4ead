"""Tensors as pictures, and pictures put together."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Turns pixels [B,3,H,W] in [-1,1] into RGB pictures."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def stacked(parts: Sequence[Image.Image]) -> Image.Image:
    """Pictures one under the other on white."""
    page = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    y = 0
    for part in parts:
        page.paste(part, (0, y))
        y += part.height
    return page
