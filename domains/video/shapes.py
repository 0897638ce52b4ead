"""One shape that moves at a known velocity: a set whose motion is right or wrong beyond doubt.

Legend: B clips, F frames, S pixels a side. Velocities are in pixels a frame, (right, down).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from limbeck.core.run.build import Batch, Build
from limbeck.domains.video import config as settings

RATE = 12.0  # frames a second
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.15, 0.3, 0.95),
    "yellow": (0.95, 0.9, 0.1),
    "purple": (0.6, 0.15, 0.75),
    "white": (1.0, 1.0, 1.0),
}
SIDES = {"circle": 12, "square": 4, "triangle": 3}  # as regular polygons
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
PROMPTS = tuple(f"{c} {s} moving {d}" for c in COLOURS for s in SIDES for d in DIRECTIONS)
RADIUS = (0.11, 0.156)  # of the side: of the circle of equal area
CORNER = 1.56  # circles' radii from the centre of a triangle of equal area to its corners
TRAVEL = (0.5, 1.0)  # of the way that the frame has room for
GREY = (0.1, 0.5)  # of the ground
DRAWS = 4  # uniform numbers a clip


@dataclass(frozen=True)
class Drawn:
    """Clips x [B,3,F,S,S] in [-1,1], their prompts, and velocity [B,2]."""

    x: Tensor
    prompts: list[str]
    velocity: Tensor


def normals(sides: int, count: int = 12) -> list[tuple[float, float]]:
    """Outward unit normals of a regular polygon that stands on a side, repeated to a fixed count."""
    angles = [math.pi / 2 + 2 * math.pi * (i % sides) / sides for i in range(count)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def apothem(sides: int) -> float:
    """From the centre to a side, where the area is that of the unit circle."""
    return math.sqrt(math.pi / (sides * math.tan(math.pi / sides)))


def drawn(indices: Tensor, u: Tensor, frames: int, size: int) -> Drawn:
    """The shapes of PROMPTS[indices] [B] with place, size, speed and ground from uniform draws
    [B,4], on their device; indices may stay on the CPU.

    All stay within the frame: at mid-clip each is at the middle of its way. Edges are soft over one pixel.
    """
    device, which = u.device, indices.to(u.device)
    colour = torch.tensor(list(COLOURS.values()), device=device)[which // (len(SIDES) * len(DIRECTIONS))]
    kind, way = which // len(DIRECTIONS) % len(SIDES), which % len(DIRECTIONS)
    radius = size * (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * u[:, :1])
    room = size / 2 - CORNER * radius - 0.5
    direction = torch.tensor(list(DIRECTIONS.values()), device=device)[way]
    speed = (TRAVEL[0] + (TRAVEL[1] - TRAVEL[0]) * u[:, 1:2]) * 2 * room / (frames - 1)
    across = (2 * u[:, 2:3] - 1) * room * (1 - direction.abs())
    steps = torch.arange(frames, device=device) - (frames - 1) / 2
    centre = across[:, None] + (speed * direction)[:, None] * steps[:, None]  # [B,F,2]
    cover = coverage(centre, kind, radius[:, 0], size)[:, None]
    grey = (GREY[0] + (GREY[1] - GREY[0]) * u[:, 3])[:, None, None, None, None]
    x = grey + cover * (colour[:, :, None, None, None] - grey)
    return Drawn(x * 2 - 1, [PROMPTS[i] for i in indices.tolist()], speed * direction)


def coverage(centre: Tensor, kind: Tensor, radius: Tensor, size: int) -> Tensor:
    """How much of each pixel [B,F,S,S] the polygons of kinds [B] around centres [B,F,2] cover, about."""
    sides = list(SIDES.values())
    out = torch.tensor([normals(n) for n in sides], device=centre.device)[kind]  # [B,12,2]
    reach = torch.tensor([apothem(n) for n in sides], device=centre.device)[kind] * radius
    place = torch.arange(size, device=centre.device) - (size - 1) / 2
    x, y = (place - centre[..., axis, None] for axis in (0, 1))  # [B,F,S]
    across, down = (out[:, None, :, axis, None] for axis in (0, 1))  # [B,1,12,1]
    beyond = (across * x[:, :, None])[..., None, :] + (down * y[:, :, None])[..., None]
    return (reach[:, None, None, None] - beyond.amax(2) + 0.5).clamp(0, 1)


class ShapeData:
    """The slot `data`: shapes drawn uniformly, on one device."""

    def __init__(self, config: settings.Shapes, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)

    def draw(self, n: int, gen: Generator, rows: slice = slice(None)) -> Drawn:
        """Rows of n clips with their velocities."""
        indices = torch.randint(len(PROMPTS), (n,), generator=gen)
        u = torch.rand(n, DRAWS, generator=gen)
        return drawn(indices[rows], u[rows].to(self.device), self.config.frames, self.config.size)

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """x [b,3,F,S,S], prompts and `fps` [b]."""
        found = self.draw(n, gen, rows)
        return Batch(found.x, found.prompts, {"fps": torch.full((len(found.x),), RATE)})

    def prompts(self, n: int, gen: Generator, rows: slice = slice(None)) -> list[str]:
        """Prompts alone."""
        return [PROMPTS[i] for i in torch.randint(len(PROMPTS), (n,), generator=gen).tolist()][rows]


def data(config: settings.Shapes, build: Build) -> ShapeData:
    """Factory of the data `video.shapes`."""
    return ShapeData(config, build.device)
