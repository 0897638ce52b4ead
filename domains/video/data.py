"""The embedded captioned clips: animated pictures with alpha on still and moving grounds.

Legend: B clips, F frames, S pixels a side, N sprites, T frames of the longest one. Speeds are in pixels a second.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from limbeck.core.captioned import Captioned
from limbeck.core.compositing import colours, resampled, resampling
from limbeck.core.run.build import Batch, Build
from limbeck.core.run.context import Context
from limbeck.core.run.rng import generator
from limbeck.domains.video import config as settings
from limbeck.domains.video import shapes
from limbeck.domains.video.shapes import ShapeData

FOLDER = Path(__file__).parent / "assets" / "motion"
SHEET, CAPTIONS = "differences-32.webp", "captions.json"
SIZE = 32
RATE = 12  # frames a second that are stored
SCALES = (0.75, 1.0)
SPEED = 12.0  # of a moving ground, at most
WAVES = (16.0, 48.0)  # pixels: lengths of a ground's pattern
DRAWS = 23  # uniform numbers a clip


@cache
def captions_file() -> list[dict[str, Any]]:
    """The committed names, groups, keywords and numbers of frames."""
    rows: list[dict[str, Any]] = json.loads((FOLDER / CAPTIONS).read_text(encoding="utf-8"))
    return rows


class Motions(Captioned):
    """The captions alone; the prompts of the moving shapes are known too."""

    def knows(self, prompt: str) -> bool:
        """Whether the data can show the prompt."""
        return prompt in shapes.PROMPTS or super().knows(prompt)


@cache
def motions() -> Motions:
    """The committed captions."""
    return Motions(captions_file())


@cache
def load_sheet(path: Path = FOLDER / SHEET) -> Tensor:
    """Sprites uint8 [N,T,4,S,S], premultiplied by alpha; after a clip's own frames its last one is repeated."""
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGBA"))
    rows, columns = pixels.shape[0] // SIZE, pixels.shape[1] // SIZE
    tiles = pixels.reshape(rows, SIZE, columns, SIZE, 4).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(np.cumsum(tiles, axis=1, dtype=np.uint8))  # sums modulo 256 undo the differences


def among(u: Tensor, lo: float, hi: float) -> Tensor:
    """Uniform draws in [0,1) as draws in [lo,hi)."""
    return lo + (hi - lo) * u


def along(u: Tensor) -> Tensor:
    """Uniform draws [B] as unit vectors [B,2] (right, down)."""
    angle = 2 * torch.pi * u
    return torch.stack([angle.cos(), angle.sin()], 1)


def ground(u: Tensor, seconds: Tensor, size: int, patterned: float, moving: float) -> Tensor:
    """Grounds [B,F,3,S,S] in [0,1] at times [B,F], from draws [B,15].

    One colour; or with `patterned` two colours in waves along two crossing axes, which with `moving` go at a constant
    velocity as under a camera that pans.
    """
    first, second = colours(u[:, :3]), colours(u[:, 3:6])
    velocity = along(u[:, 6]) * (SPEED * u[:, 7] * (u[:, 8] < moving))[:, None]
    place = torch.arange(size, device=u.device) - (size - 1) / 2
    x = place - (seconds * velocity[:, :1])[..., None]  # [B,F,S]
    y = place - (seconds * velocity[:, 1:])[..., None]
    axis, lengths = along(u[:, 9])[:, :, None, None, None], among(u[:, 10:12], *WAVES)[..., None, None, None]
    phase = 2 * torch.pi * u[:, 12:14, None, None, None]
    one = (axis[:, 0] * x[:, :, None] + axis[:, 1] * y[..., None]) / lengths[:, 0]
    two = (axis[:, 0] * y[..., None] - axis[:, 1] * x[:, :, None]) / lengths[:, 1]
    wave = 0.5 + 0.25 * ((2 * torch.pi * one + phase[:, 0]).cos() + (2 * torch.pi * two + phase[:, 1]).cos())
    wave = wave * (u[:, 14] < patterned)[:, None, None, None]
    return first[:, None, :, None, None].lerp(second[:, None, :, None, None], wave[:, :, None])


def placed(sprites: Tensor, mirror: Tensor, u: Tensor, vary: float, drift: float) -> Tensor:
    """Premultiplied sprites [B,F,4,S,S] scaled by .75 to 1, shifted within the frame, mirrored (p = .5), from u [B,7].

    With probability `drift` they go in a straight line to another place. `vary` less than 1 keeps all nearer to their
    own place; at 0 they stay as they are.
    """
    b, f, _, size, _ = sprites.shape
    scale = SCALES[1] - vary * (SCALES[1] - SCALES[0]) * (1 - u[:, 0])
    room = ((1 - scale) * size / 2)[:, None]
    start = (2 * u[:, 1:3] - 1) * room
    end = torch.where(u[:, 3:4] < drift, (2 * u[:, 4:6] - 1) * room, start)
    path = start[:, None].lerp(end[:, None], torch.linspace(0, 1, f, device=u.device)[:, None]).flatten(0, 1)
    scale, flip = scale.repeat_interleave(f), (mirror & (u[:, 6] < 0.5 * vary)).repeat_interleave(f)
    columns = resampling(scale, path[:, 0], flip, size)
    rows = resampling(scale, path[:, 1], torch.zeros_like(flip), size)
    return resampled(sprites.flatten(0, 1), rows, columns).view(b, f, 4, size, size)


def mixed(texts: list[str], others: list[str], chosen: Tensor) -> list[str]:
    """`others` where chosen [B], else `texts`."""
    return [other if c else text for text, other, c in zip(texts, others, chosen.tolist(), strict=True)]


class MotionData:
    """Captioned sprites on one device, and random draws of (clip on a ground, caption, frame rate)."""

    def __init__(self, config: settings.Motion, device: torch.device | str = "cpu") -> None:
        self.config, self.device, self.set = config, torch.device(device), motions()
        self.sprites = load_sheet().to(device)
        self.lengths = torch.tensor([row["frames"] for row in captions_file()])
        self.rates = torch.tensor(config.fps, dtype=torch.float32)
        self.shapes = ShapeData(settings.Shapes(frames=config.frames), device)

    def clips(self, indices: Tensor, u: Tensor, fps: Tensor) -> Tensor:
        """Clips [B,3,F,S,S] in [-1,1] of sprites [B] at frame rates [B], all else from draws [B,23]; on the device."""
        config = self.config
        length, mirror = (x[indices].to(self.device) for x in (self.lengths, self.set.mirror))
        u, fps, indices = (x.to(self.device) for x in (u, fps, indices))
        steps = torch.arange(config.frames, device=self.device)
        first = (u[:, 0] * length).long()
        frame = (first[:, None] + (RATE / fps).round().long()[:, None] * steps) % length[:, None]
        flat = (indices[:, None] * self.sprites.shape[1] + frame).flatten()
        sprites = self.sprites.flatten(0, 1).index_select(0, flat).view(*frame.shape, *self.sprites.shape[2:])
        over = placed(sprites.float() / 255, mirror, u[:, 1:8], config.vary, config.drift)
        seconds = (steps - (config.frames - 1) / 2) / fps[:, None]
        under = ground(u[:, 8:23], seconds, SIZE, config.patterned, config.moving)
        return ((over[:, :, :3] + (1 - over[:, :, 3:]) * under) * 2 - 1).transpose(1, 2).contiguous()

    def drawn(self, n: int, gen: Generator) -> Tensor:
        """Frame rates [n]."""
        return self.rates[torch.randint(len(self.rates), (n,), generator=gen)]

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """x [b,3,F,S,S], captions and `fps` [b]: rows of a batch of n; drawn on the CPU for all, made for rows."""
        indices = torch.randint(len(self.set), (n,), generator=gen)
        texts = self.set.caption(indices, gen, self.config.captions)
        fps, u = self.drawn(n, gen), torch.rand(n, DRAWS, generator=gen)
        x, texts, fps = self.clips(indices[rows], u[rows], fps[rows]), texts[rows], fps[rows]
        if self.config.shapes:
            other = self.shapes.draw(n, gen, rows)
            chosen = (torch.rand(n, generator=gen) < self.config.shapes)[rows]
            x = torch.where(chosen.to(x.device)[:, None, None, None, None], other.x, x)
            texts = mixed(texts, other.prompts, chosen)
            fps = fps.where(~chosen, shapes.RATE)
        return Batch(x, texts, {"fps": fps})

    def prompts(self, n: int, gen: Generator, rows: slice = slice(None)) -> list[str]:
        """Captions without clips."""
        texts = self.set.prompts(n, gen, self.config.captions)
        if self.config.shapes:
            texts = mixed(texts, self.shapes.prompts(n, gen), torch.rand(n, generator=gen) < self.config.shapes)
        return texts[rows]

    def ask(self, ctx: Context, prompts: list[str]) -> tuple[list[str], dict[str, Tensor]]:
        """The frame rate that is asked of each sample [b]."""
        fps = self.drawn(ctx.global_batch, ctx.draws.gen("data.fps"))[ctx.draws.rows]
        shape = torch.tensor([prompt in shapes.PROMPTS for prompt in prompts])
        return prompts, {"fps": fps.where(~shape, shapes.RATE).to(ctx.device)}

    def reference(self, n: int, gen: Generator, fps: float = RATE) -> tuple[Tensor, list[str], Tensor]:
        """n clips under their full names, spread as evenly as n allows over all names: x, names, indices."""
        return self.of(self.set.spread(n, gen), gen, fps)

    def held(self, each: int, half: str = "real", fps: float = RATE) -> Tensor:
        """Fixed clips for evaluation, `each` of every name, one name after another [N*each,3,F,S,S].

        Windows, places and grounds come from a stream that no run draws from; halves share none.
        """
        indices = torch.arange(len(self.set)).repeat_interleave(each)
        return self.of(indices, generator(0, f"video.motion held {half}", 0), fps)[0]

    def of(self, indices: Tensor, gen: Generator, fps: float) -> tuple[Tensor, list[str], Tensor]:
        """One clip of each of these sprites [B] under its full name."""
        u = torch.rand(len(indices), DRAWS, generator=gen)
        x = self.clips(indices, u, torch.full((len(indices),), fps))
        return x, [self.set.names[i] for i in indices.tolist()], indices


def data(config: settings.Motion, build: Build) -> MotionData:
    """Factory of the data `video.motion`."""
    return MotionData(config, build.device)
