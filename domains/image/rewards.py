"""Rewards on pictures [B,3,H,W] in [-1,1] that need no network: how small their JPEG is, how colourful they are."""

from __future__ import annotations

import io
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.pictures import to_pictures
from limbeck.core.rewards.base import Condition, Reward, as_reward
from limbeck.core.run.build import Build
from limbeck.core.run.rng import generator
from limbeck.domains.image.config import Colourfulness, Compressibility, Views


def payload(pictures: Tensor, quality: int) -> Tensor:
    """Kilobytes [B] of each picture's JPEG above those of a constant picture of its size (headers cost nothing)."""
    flat = len(_jpeg(torch.zeros_like(pictures[:1]), quality)[0])
    return torch.tensor([(len(data) - flat) / 1000 for data in _jpeg(pictures, quality)])


def _jpeg(pictures: Tensor, quality: int) -> list[bytes]:
    out = []
    for picture in to_pictures(pictures):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        out.append(buffer.getvalue())
    return out


def colourfulness(pictures: Tensor) -> Tensor:
    """Hasler and Suesstrunk 2003, eq. 7, on values 0 to 255: [B]; natural pictures have about 15 to 110."""
    red, green, blue = (pictures.flatten(2) * 127.5 + 127.5).unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = (rg.var(1, correction=0) + yb.var(1, correction=0) + 1e-6).sqrt()
    return spread + 0.3 * (rg.mean(1).square() + yb.mean(1).square() + 1e-6).sqrt()


def compressibility(config: Compressibility, build: Build) -> Reward:
    """DDPO's black-box reward: minus the JPEG's kilobytes (or plus them, for incompressibility)."""
    sign = 1.0 if config.large else -1.0

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return (sign * payload(x, config.quality)).to(x.device)

    return Reward(score, "compressibility", "pixels")


def colourful(config: Colourfulness, build: Build) -> Reward:
    """How colourful a picture is, in units of 100."""

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return colourfulness(x.float()) / 100

    return Reward(score, "colourfulness", "pixels", differentiable=True)


def views(config: Views, build: Build) -> Reward:
    """The mean of a reward over random views; evaluations without a generator see the same views each time."""
    inner = as_reward(build.part("reward", config.of), config.of.kind)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        draws = gen or generator(0, "image.views", 0)
        found = [inner(view(x, config.shift, config.noise, draws), cond, gen=gen) for _ in range(config.count)]
        return torch.stack(found).mean(0)

    return replace(inner, score=score, name=f"views of {inner.name}")


def view(x: Tensor, shift: float, noise: float, gen: torch.Generator) -> Tensor:
    """Pictures [B,3,H,W], each shifted by up to `shift` of its side (edges repeat), half of them blurred, all noisy."""
    reach, (height, width) = round(shift * x.shape[-1]), x.shape[-2:]
    places = torch.randint(0, 2 * reach + 1, (len(x), 2), generator=gen).tolist()
    wide = F.pad(x, (reach,) * 4, mode="replicate")
    moved = torch.stack([w[:, i : i + height, j : j + width] for w, (i, j) in zip(wide, places, strict=True)])
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blurred = torch.rand(len(x), 1, 1, 1, generator=gen).to(x) < 0.5
    return torch.where(blurred, soft, moved) + noise * torch.randn(x.shape, generator=gen).to(x)
