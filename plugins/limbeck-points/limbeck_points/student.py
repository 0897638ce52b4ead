"""A net that makes a set of points in one step."""

import torch
from torch import Tensor, nn

from limbeck.api import Build, Encoded, Sample
from limbeck_points.config import Student
from limbeck_points.data import POINTS, SHAPES


class Net(nn.Module):
    """Noise [B, P, 2] and a label -> points [B, P, 2]."""

    def __init__(self, config: Student) -> None:
        super().__init__()
        sizes = [2 * POINTS + len(SHAPES), *[config.width] * config.depth]
        layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(config.width, 2 * POINTS))

    def sample(self, noise: Tensor, cond: Encoded, renoise: list[Tensor] | None = None) -> Sample:
        """One step."""
        label = nn.functional.one_hot(cond["label"].clamp(min=0), len(SHAPES)).to(noise)
        return Sample(self.net(torch.cat([noise.flatten(1), label], 1)).view_as(noise), cond)


def build(config: Student, build: Build) -> Net:
    """Factory of the student."""
    return Net(config).to(build.device)
