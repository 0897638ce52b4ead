"""Tensors as pictures, and pictures put together."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

CELL = 112  # pixels a picture on a sheet
GAP = 6
LABEL = 26


def to_bytes(pixels: Tensor) -> Tensor:
    """uint8 [B,H,W,C] on the CPU of pixels [B,C,H,W] in [-1,1]; those that are bytes already keep their values."""
    if pixels.dtype != torch.uint8:
        pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.movedim(1, -1).cpu()


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Turns pixels [B,3,H,W], bytes or in [-1,1], into RGB pictures."""
    return [Image.fromarray(picture) for picture in to_bytes(pixels).numpy()]


def stacked(parts: Sequence[Image.Image]) -> Image.Image:
    """Pictures one under the other on white."""
    page = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    y = 0
    for part in parts:
        page.paste(part, (0, y))
        y += part.height
    return page


def sheet(blocks: dict[str, Sequence[Image.Image]], captions: Sequence[str], columns: int = 4) -> Image.Image:
    """Lays blocks of pictures side by side (teacher | student), each under its title, captions below the pictures."""
    rows = -(-len(captions) // columns)
    width, height = columns * (CELL + GAP) + GAP, rows * (CELL + LABEL) + LABEL + GAP
    page = Image.new("RGB", (width * len(blocks) + GAP * (len(blocks) - 1), height), "white")
    draw = ImageDraw.Draw(page)
    for block, (title, pictures) in enumerate(blocks.items()):
        left = block * (width + GAP)
        draw.text((left + GAP, 6), title, fill="black")
        for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            x = left + GAP + (index % columns) * (CELL + GAP)
            y = LABEL + (index // columns) * (CELL + LABEL)
            resample = Image.Resampling.NEAREST if max(picture.size) < CELL else Image.Resampling.LANCZOS
            shown = ImageOps.contain(picture, (CELL, CELL), resample)
            page.paste(shown, (x + (CELL - shown.width) // 2, y + (CELL - shown.height) // 2))
            draw.text((x, y + CELL + 3), textwrap.shorten(caption, 19, placeholder="…"), fill="#444")
    return page


def slug(text: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "empty"
