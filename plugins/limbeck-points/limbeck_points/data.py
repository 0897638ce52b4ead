"""The shapes, and draws from them with their names as prompts."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from limbeck.api import Batch, Build, GaussianMixture, generator
from limbeck_points.config import Data

SHAPES = ("ring", "cross", "spiral")
POINTS = 12


def outline(name: str) -> Tensor:
    """The points [P, 2] of a shape in its plain pose."""
    u = torch.arange(POINTS) / POINTS
    if name == "cross":
        arm = torch.linspace(-1, 1, POINTS // 2)
        return torch.cat([torch.stack([arm, 0 * arm], 1), torch.stack([0 * arm, arm], 1)])
    angle = 2 * math.pi * u * (1 if name == "ring" else 1.5)
    radius = torch.ones(POINTS) if name == "ring" else 0.2 + u
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def references(count: int) -> tuple[Tensor, Tensor]:
    """`count` turned and scaled copies of each shape [3 count, P, 2], and their labels."""
    gen = generator(0, "points.references", 0)
    sets = []
    for name in SHAPES:
        turn = math.pi / 2 * torch.rand(count, generator=gen)
        size = 0.7 + 0.5 * torch.rand(count, 1, 1, generator=gen)
        rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2)
        sets.append(size * outline(name) @ rotation.transpose(1, 2))
    return torch.cat(sets), torch.arange(len(SHAPES)).repeat_interleave(count)


@dataclass
class Shapes:
    """Exact draws of the teacher's own distribution."""

    mixture: GaussianMixture

    def prompts(self, n: int, gen: Generator, rows: slice) -> list[str]:
        """Shapes, evenly."""
        return [SHAPES[k] for k in torch.randint(len(SHAPES), (n,), generator=gen)[rows].tolist()]

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """x [b, P, 2] with prompts."""
        prompts = self.prompts(n, gen, slice(None))
        x = self.mixture.sample(n, gen, {"label": torch.tensor([SHAPES.index(name) for name in prompts])})
        return Batch(x[rows], prompts[rows])


def build(config: Data, build: Build) -> Shapes:
    """Factory of the data."""
    return Shapes(build.piece("teacher").denoiser)
