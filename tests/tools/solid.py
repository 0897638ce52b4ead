"""A scene that is known exactly: a signed distance, colours that differ on every side, and rays marched through them.

Red, with a green patch in front (+x), blue on top (+z) and yellow on its left side (+y); nothing is symmetric.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.scene import Views

RED, GREEN, BLUE, YELLOW = (0.8, 0.15, 0.1), (0.1, 0.7, 0.2), (0.1, 0.2, 0.85), (0.9, 0.8, 0.2)
STEPS = 96


def ball(p: Tensor, radius: float = 0.6, middle: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    return (p - p.new_tensor(middle)).norm(dim=-1) - radius


def box(p: Tensor, sides: Sequence[float] = (0.5, 0.5, 0.5), middle: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    away = (p - p.new_tensor(middle)).abs() - p.new_tensor(sides)
    return away.clamp_min(0).norm(dim=-1) + away.amax(-1).clamp_max(0)


class Solid:
    """Density rises from 0 to `dense` over `ramp` around the surface."""

    channels, radius = 3, 1.0

    def __init__(self, distance: Callable[[Tensor], Tensor] = ball, dense: float = 400.0, ramp: float = 0.01) -> None:
        self.distance, self.dense, self.ramp = distance, dense, ramp

    def parameters(self) -> list[nn.Parameter]:
        return []

    def colour(self, p: Tensor) -> Tensor:
        x, y, z = p.unbind(-1)
        red, green, blue, yellow = (p.new_tensor(c) for c in (RED, GREEN, BLUE, YELLOW))
        found = torch.where((y > 0.25)[..., None], yellow, red)
        found = torch.where((z > 0.35)[..., None], blue, found)
        here = (x > 0) & (y.abs() < 0.2) & (z.abs() < 0.2)
        return torch.where(here[..., None], green, found) * 2 - 1

    def field(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.dense * (0.5 - self.distance(points) / self.ramp).clamp(0, 1), self.colour(points)

    def render(self, cameras: Cameras, background: Tensor, jitter: Tensor | None = None) -> Views:
        origin, ray = cameras.rays()
        away = cameras.position.norm(dim=1)[:, None, None, None] - 1 + 2 * (torch.arange(STEPS) + 0.5) / STEPS
        points = origin[..., None, :] + ray[..., None, :] * away[..., None]
        density = self.dense * (0.5 - self.distance(points) / self.ramp).clamp(0, 1)
        passed = torch.exp(-density * 2 / STEPS)
        light = torch.cumprod(torch.cat([torch.ones_like(passed[..., :1]), passed], -1), -1)
        weight = light[..., :-1] * (1 - passed)
        alpha = weight.sum(-1, keepdim=True)
        image = (weight[..., None] * self.colour(points)).sum(-2) + (1 - alpha) * background[:, None, None]
        depth = (weight * away).sum(-1, keepdim=True) * (ray * cameras.forward[:, None, None]).sum(-1, keepdim=True)
        return Views(image.movedim(-1, 1), alpha.movedim(-1, 1), depth.movedim(-1, 1))
