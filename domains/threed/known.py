"""Objects that are known: their pictures at held-out cameras, what an asset is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.run.build import Build
from limbeck.domains.threed.cameras import Cameras


@dataclass(frozen=True)
class Known:
    """True pictures image [V,3,H,W] in [-1, 1] on white and alpha [V,1,H,W] at cameras that no training step drew."""

    cameras: Cameras
    image: Tensor
    alpha: Tensor

    @classmethod
    def of(cls, build: Build, prompt: str) -> Known | None:
        """The object of this prompt, where the run's teacher knows its objects (`known(prompt)` of its denoiser)."""
        denoiser: Any = build.piece("teacher").denoiser
        found: Known | None = denoiser.known(prompt) if hasattr(denoiser, "known") else None
        return found


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between pictures in [-1, 1], the peak being their whole range: the mean over views [V,...]."""
    error = ((a - b) / 2).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((-10 * error.log10()).mean())


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of pictures [V,C,H,W] in [-1, 1]: windows of 7 pixels, the mean."""
    mean = partial(F.avg_pool2d, kernel_size=7, stride=1)
    x, y = (a + 1) / 2, (b + 1) / 2
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    small, less = 0.01**2, 0.03**2
    top = (2 * mx * my + small) * (2 * cov + less)
    return float((top / ((mx * mx + my * my + small) * (vx + vy + less))).mean())


def overlap(a: Tensor, b: Tensor) -> float:
    """Silhouettes' intersection over union of alpha [V,1,H,W], opaque above one half: the mean over views."""
    one, two = (a > 0.5).flatten(1), (b > 0.5).flatten(1)
    return float(((one & two).sum(1) / (one | two).sum(1).clamp(min=1)).mean())
