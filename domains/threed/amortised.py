"""One net for many prompts: text to three feature planes in one forward, a shared head reads them (ScaleDreamer).

Legend: B prompts, F features, S grid points along a side of a plane, N points.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Codec
from limbeck.core.diffusion.denoiser import Encoded, Model
from limbeck.core.run.build import Build
from limbeck.core.text import WIDTH
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.fields import RGB, Head, planar
from limbeck.domains.threed.net import twice
from limbeck.domains.threed.objects import vectors
from limbeck.domains.threed.scene import Scene, SceneStudent
from limbeck.domains.threed.volume import Nerf

COARSE = 4  # grid points along a side of what the text writes first


class Writer(nn.Module):
    """Planes [B,3,F,S,S] of sentences [B,384]: a linear layer makes them at 4x4, convolutions double them."""

    def __init__(self, config: settings.Amortised) -> None:
        super().__init__()
        self.width = config.width
        self.first = nn.Linear(WIDTH, 3 * config.width * COARSE**2)
        doublings = int(math.log2(config.size // COARSE))
        self.convs = nn.ModuleList(nn.Conv2d(config.width, config.width, 3, padding=1) for _ in range(doublings))
        self.last = nn.Conv2d(config.width, config.features, 3, padding=1)

    def forward(self, sentences: Tensor) -> Tensor:
        """Unit vectors are scaled to entries of mean square one."""
        x = self.first(sentences * math.sqrt(WIDTH)).view(-1, self.width, COARSE, COARSE)  # planes as a batch
        for conv in self.convs:
            x = torch.relu(conv(twice(x))) + twice(x)
        out: Tensor = self.last(x)
        return out.view(-1, 3, *out.shape[1:])


class Written(nn.Module):
    """A body (see fields.py) on planes [3,F,S,S] that were written; the head is shared by all."""

    def __init__(self, planes: Tensor, head: Head, radius: float) -> None:
        super().__init__()
        self.planes, self.head, self.radius, self.channels = planes, head, radius, RGB

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] and colour [N,3] at points [N,3]."""
        one, two, three = planar(self.planes, points, self.radius)
        density, colour = self.head(one + two + three, points)
        return density, colour

    def density(self, points: Tensor) -> Tensor:
        """Density [N] at points [N,3]."""
        return self(points)[0]  # type: ignore[no-any-return]

    def grids(self) -> list[Tensor]:
        """The planes."""
        return list(self.planes)


class Amortised(SceneStudent):
    """The slot `student`: the scene of whatever prompt a step has."""

    def __init__(self, config: settings.Amortised, codec: Codec) -> None:
        super().__init__([], codec)
        self.config, self.writer = config, Writer(config)
        netted = settings.Netted(hidden=config.hidden, height=config.height, reach=config.reach, sharp=config.sharp)
        self.head = Head(config.features, netted, RGB)

    def scene(self, planes: Tensor) -> Nerf:
        """The scene on planes [3,F,S,S]."""
        return Nerf(Written(planes, self.head, self.config.radius), self.config.sampling)

    def particle(self, cond: Encoded) -> Scene:
        """That of the step's prompt, which all rows share."""
        return cast(Scene, self.scene(self.writer(cond["sentence"][:1])[0]))

    @torch.no_grad()
    def made(self, prompts: list[str]) -> list[tuple[str, Scene]]:
        """A scene a prompt, all planes from one forward."""
        sentences = vectors(prompts).to(self.writer.first.weight)
        scenes = [cast(Scene, self.scene(planes)) for planes in self.writer(sentences)]
        return list(zip(prompts, scenes, strict=True))


def build(config: settings.Amortised, build: Build) -> Amortised:
    """Factory of the student `threed.amortised`."""
    model: Model = build.piece("teacher")
    return Amortised(config, model.codec).to(build.device)
