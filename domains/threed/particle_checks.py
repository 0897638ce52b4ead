"""Closed-form check of particles (`limbeck verify threed.particles`): scenes that are one point each.

A camera's picture [2,1,1] of a point is how far it lies to the right and up, without perspective: what cameras see of
N(m, s^2 I) in space is N(seen m, s^2 I). So teacher and critic are exact, and VSD has to bring the particles' law in
space to the teacher's through flat views alone. Legend: V cameras, K points, P particles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.config import Uniform
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Output
from limbeck.core.diffusion.process import VP
from limbeck.core.diffusion.time import law as law_of
from limbeck.core.distillation.config import CriticConfig
from limbeck.core.distillation.critic import Critic
from limbeck.core.distillation.matching import Matching, Residual
from limbeck.core.distillation.operators import OPERATORS
from limbeck.core.distillation.source import Source
from limbeck.core.run.checks import Check
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.distributed import Team
from limbeck.core.run.players import Player
from limbeck.core.run.rng import generator
from limbeck.core.run.trainer import Trainer
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.law import Law
from limbeck.domains.threed.scene import SceneStudent, Views

MODES = torch.tensor([[-1.2, 0.0, 0.0], [1.2, 0.0, 0.0]])
STD, PARTICLES, STEPS, BATCH, LR = 0.3, 8, 300, 32, 0.2
LAW = settings.Law(prompt="a point", elevation=(-60.0, 60.0))


def seen(points: Tensor, cameras: Cameras) -> Tensor:
    """Pictures [V,K,2] of points [K,3]."""
    return torch.einsum("kc,vca->vka", points, cameras.pose[:, :, :2])


class Point(nn.Module):
    """A Scene: one point."""

    channels, radius = 2, 1.0

    def __init__(self, place: Tensor) -> None:
        super().__init__()
        self.place = nn.Parameter(place)

    def render(self, cameras: Cameras, background: Tensor, jitter: Tensor | None = None) -> Views:
        """Where it is seen; nothing is opaque."""
        image = seen(self.place[None], cameras)[:, 0, :, None, None]
        return Views(image, torch.zeros_like(image[:, :1]), torch.zeros_like(image[:, :1]))


class Points(Denoiser):
    """x0 of p(x | camera), an equal mixture of N(seen, std^2 I) of points that are asked for at each call."""

    def __init__(self, points: Callable[[], Tensor], std: float) -> None:
        super().__init__(VP("linear"), "x0")
        self.points, self.std = points, std

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        """The exact x0 [V,2,1,1]."""
        alpha, sigma = (level.flatten(1) for level in self.process.coefficients(t, x_t))
        x, means = x_t.flatten(1), self.means(cond)
        variance = (alpha * self.std) ** 2 + sigma**2
        misfit = (x[:, None] - alpha[:, None] * means).square().sum(2) / (2 * variance)
        mean = (torch.softmax(-misfit, 1)[..., None] * means).sum(1)
        return (mean + alpha * self.std**2 / variance * (x - alpha * mean)).view_as(x_t)

    def means(self, cond: Encoded) -> Tensor:
        """What the camera of each row sees, [V,K,2]."""
        return seen(self.points().detach(), Cameras.of(cond["camera"]))


@dataclass(frozen=True)
class Spread:
    """How far particles lie apart: standard deviation within modes (per axis), and distance between modes' means."""

    within: float
    between: float

    @classmethod
    def of(cls, places: Tensor) -> Spread:
        """Each particle [P,3] belongs to the nearest mode."""
        near = torch.cdist(places, MODES).argmin(1)
        groups = [places[near == kind] for kind in range(len(MODES)) if bool((near == kind).any())]
        means = torch.stack([group.mean(0) for group in groups])
        squares = torch.cat([group - group.mean(0) for group in groups]).square().sum() / 3
        return cls(float((squares / (len(places) - len(groups))).sqrt()), float(torch.cdist(means, means).max()))


def particles(operator: str, critic: Callable[[SceneStudent], Denoiser], steps: int = STEPS) -> Spread:
    """Particles trained by the framework's own objective on one of them a step, as a recipe does."""
    start = torch.randn(PARTICLES, 3, generator=generator(0, "threed.particles", 0))
    student = SceneStudent([Point(place) for place in start], Identity())
    teacher = Points(lambda: MODES, STD)
    model = Model(teacher, (2, 1, 1), Identity(), lambda prompts: {}, "points")
    follower = Critic(critic(student), CriticConfig(), {})
    rule = Residual("particles", teacher, {}, OPERATORS[operator], law_of(Uniform()), 1.0, follower)
    optim = OptimConfig(kind="adam", lr=[(0, LR), (steps // 2, LR), (steps, 0.02 * LR)], betas=(0.5, 0.9), clip=None)
    objective = Matching(Source(model, student, Law(LAW), {}), rule, Player("student", student, optim, steps))
    Trainer(objective, Team("cpu"), 0, "particles", steps, BATCH).run()
    return Spread.of(places(student))


def places(student: SceneStudent) -> Tensor:
    """Where the particles are [P,3]."""
    return torch.stack([cast(Point, scene).place.detach() for scene in student.scenes])


def exact(student: SceneStudent) -> Denoiser:
    """The critic that a net is to become: it knows all particles, and the camera."""
    return Points(lambda: places(student), 0.0)


def vsd(critic: Callable[[SceneStudent], Denoiser] = exact) -> list[Check]:
    """VSD's particles are a sample of the teacher's law; SDS's fall into one point (threed.md: .31 and 0.00 of .30)."""
    kept, fallen = particles("vsd", critic), particles("sds", exact)
    return [
        Check("VSD: spread within modes from .3", abs(kept.within - STD), 0.08, "<="),
        Check("VSD: distance of modes from 2.4", abs(kept.between - 2.4), 0.4, "<="),
        Check("SDS: spread within modes", fallen.within, 0.1, "<=", "collapsed, as it must"),
    ]
