"""Regression on what the teacher makes of the student's own sample: noise up to t, then some steps back down.

DreamGaussian (Tang et al. 2023), section 3.3: image-to-image with the square error as the loss of a texture. Legend:
b local batch, *S sample dims, K steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded, Model
from limbeck.core.diffusion.guidance import guided_by, with_scale
from limbeck.core.diffusion.sampling import ddim, trajectory
from limbeck.core.diffusion.time import Law
from limbeck.core.distillation import config as settings
from limbeck.core.distillation.denoising import noised
from limbeck.core.distillation.matching import Matching
from limbeck.core.distillation.operators import surrogate
from limbeck.core.distillation.source import Source, plain
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.scheduled import Scheduled


@dataclass
class Refined:
    """A rule: x moves to the end of K even DDIM steps from its noisy self at t to 0; the gradient on x is x - end.

    Deviation: in the teacher's space, so that nothing is decoded; the paper compares pixels.
    """

    model: Model
    null: Encoded
    times: Law
    steps: int
    guidance: Scheduled

    def __call__(self, ctx: Context, x: Tensor, cond: Encoded) -> Tensor:
        """|x - end|^2 / 2 over the sample, the mean over the batch; the end is a constant."""
        with torch.no_grad():
            x_t, t, _ = noised(ctx, "refine", x.detach(), self.times, self.model.denoiser.process)
            end = self.end(x_t, t, cond, ctx.at(self.guidance))
            ctx.log("refine/change", (x - end).square().mean().sqrt())
        return surrogate(x, x - end)

    def end(self, x_t: Tensor, t: Tensor, cond: Encoded, guidance: float) -> Tensor:
        """Where the teacher leads x_t [b, *S] of time t [b]."""
        walker = guided_by(self.model.denoiser, self.null, guidance)
        grid = t * torch.linspace(1, 0, self.steps + 1, device=t.device)[:, None]
        for step in trajectory(walker, ddim(), x_t, grid, with_scale(cond, guidance)):
            x_t = step.x_next
        return x_t


def build(config: settings.Refine, build: Build) -> Matching:
    """Factory of refine."""
    source = Source.of(build)
    rule = Refined(source.model, source.null, source.times(config), config.steps, config.guidance)
    return Matching(source, rule, build.player("student", source.student, plain(config.optim)))
