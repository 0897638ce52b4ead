"""Regression on pieces of paths: the student's answer at (x_t, t) is the one whose jump lands on a later state.

Progressive distillation (Salimans and Ho 2022) takes two teacher steps for the piece; reflow (Liu et al. 2022) takes
the straight line from a noise to the end that the teacher's ODE gives it; stored trajectories give pieces between key
times (AccVideo). Legend: b local batch, *S sample dims; one t per sample, whatever its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Prediction
from limbeck.core.diffusion.guidance import with_scale
from limbeck.core.diffusion.process import Process
from limbeck.core.diffusion.sampling import ddim, ddim_inverse, ddim_jump, trajectory
from limbeck.core.diffusion.time import Law, law
from limbeck.core.distillation import config as settings
from limbeck.core.distillation.consistency import Followed, Leg, Shadow, continuous, guided_teacher
from limbeck.core.distillation.denoising import draw_t, errors
from limbeck.core.distillation.source import Source, plain
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.scheduled import Scheduled

Legs = Callable[[Context], Leg]
Secant = Callable[[Leg, Process], Prediction]


def secant(leg: Leg, process: Process) -> Prediction:
    """The prediction at (x, t) whose DDIM jump to s lands on x_next; for rectified flow its `flow` is the secant's
    velocity (x_next - x)/(sigma_s - sigma_t). Where s = 0 its x0 is x_next itself.
    """
    x0 = ddim_inverse(leg.x, leg.x_next, leg.t, leg.s, process)
    return Prediction(x0, leg.x, leg.t, process, "x0")


@dataclass
class Halving:
    """Two steps of the guided teacher for one of the student: J(J(z, t, mid), mid, s), mid = (t + s)/2.

    The teacher is the student as the stage began, so that stages follow each other: `lent` puts those weights in.
    """

    name: str
    source: Source
    teacher: Denoiser
    times: Tensor  # the student's grid, falling [N+1]
    guidance: Scheduled
    lent: Callable[[], AbstractContextManager[None]] = nullcontext

    @torch.no_grad()
    def __call__(self, ctx: Context) -> Leg:
        """z of data at a time of the grid, and where two half steps end."""
        x0, cond = self.source.real(ctx)
        i = ctx.draws.integers(f"{self.name}.i", len(self.times) - 1)
        grid = self.times.to(i.device)
        t, s = grid[i], grid[i + 1]
        eps = ctx.draws.normal(f"{self.name}.eps", tuple(x0.shape[1:])).to(x0)
        z, scale = self.teacher.process.add_noise(x0, eps, t), ctx.at(self.guidance)
        cond = with_scale(cond, scale)
        with self.lent():
            teacher = guided_teacher(self.teacher, self.source.null, scale)
            return Leg(z, t, two_steps(teacher, z, t, s, cond), s, cond)


def two_steps(teacher: Denoiser, z: Tensor, t: Tensor, s: Tensor, cond: Encoded) -> Tensor:
    """J(J(z, t, mid), mid, s) of the teacher, z [B, *S]."""
    middle = (t + s) / 2
    z = ddim_jump(z, t, middle, teacher.predict(z, t, cond).x0, teacher.process)
    return ddim_jump(z, middle, s, teacher.predict(z, middle, cond).x0, teacher.process)


@dataclass
class Straight:
    """From a point of the straight line between noise and end to the end; the pairs are the guided teacher's.

    With `batches` the pairs of the first so many steps are kept and used again. They are made when they are first
    needed, and depend on seed and step alone, so that a resumed run makes the same ones.
    """

    name: str
    source: Source
    times: Law
    walk: settings.Pairing
    batches: int | None = None
    kept: dict[tuple[int, int], tuple[Tensor, Tensor, Encoded]] = field(default_factory=dict)

    def __call__(self, ctx: Context) -> Leg:
        """x_t = alpha_t x0 + sigma_t z at a fresh t, and x0 at s = 0."""
        z, x0, cond = self.pairs(ctx)
        process = self.source.model.denoiser.process
        t = draw_t(ctx, self.name, self.times, process)
        return Leg(process.add_noise(x0, z, t), t, x0, torch.zeros_like(t), cond)

    def pairs(self, ctx: Context) -> tuple[Tensor, Tensor, Encoded]:
        """Noise z, end x0 [b, *S] and condition of this step, or of the step whose pairs it uses again."""
        step = ctx.step if self.batches is None else ctx.step % self.batches
        if (step, ctx.part) in self.kept:
            return self.kept[step, ctx.part]
        made = self._walked(Context(step, ctx.stage, ctx.draws.of(step), ctx.world, ctx.rank, ctx.device))
        if self.batches is not None:
            self.kept[step, ctx.part] = made
        return made

    @torch.no_grad()
    def _walked(self, ctx: Context) -> tuple[Tensor, Tensor, Encoded]:
        """The teacher's ODE from fresh noise. z is the noise under which the line starts where the walk does."""
        model, scale = self.source.model, ctx.at(self.walk.guidance)
        cond = with_scale(self.source.condition(ctx), scale)
        noise, times = ctx.draws.normal(f"{self.name}.noise", tuple(model.shape)), model.grid(self.walk.steps)
        t = times[0].expand(len(noise)).to(noise.device)
        start = x = model.begin(noise, t, cond)
        teacher = guided_teacher(model.denoiser, self.source.null, scale)
        for step in trajectory(teacher, ddim(), x, times, cond):
            x = step.x_next
        return Prediction(x, start, t, model.denoiser.process, "x0").eps, x, cond


@dataclass
class Regression:
    """The student's answer against the secant of each leg, in a space and with a weight."""

    denoiser: Denoiser
    legs: Legs
    config: settings.Compared
    goal: Secant = secant

    def __call__(self, ctx: Context) -> Tensor:
        """The mean loss."""
        leg = self.legs(ctx)
        goal = self.goal(leg, self.denoiser.process)
        return errors(self.denoiser.predict(leg.x, leg.t, leg.cond), goal.x0, goal.eps, self.config).mean()


def straightness(denoiser: Denoiser, x: Tensor, times: Tensor, cond: Encoded | None = None) -> float:
    """Mean over a walk of |flow - (z - end)|^2 over |z - end|^2, flow = eps - x0; 0 for straight paths.

    The measure S of "Flow Straight and Fast" (Liu et al. 2022, eq. 6), made free of scale.
    """
    with torch.no_grad():
        steps = list(trajectory(denoiser, ddim(), x, times, cond))
    chord = x - steps[-1].x_next
    off = torch.stack([(step.pred.flow - chord).square().mean() for step in steps])
    return float(off.mean() / chord.square().mean())


def _trained(source: Source, name: str) -> Denoiser:
    """The student's denoiser."""
    found = getattr(source.student, "denoiser", None)
    if not isinstance(found, Denoiser):
        raise BadInput(f"the loss {name} trains a denoiser that is sampled in steps, and the student is none")
    return found


def build_progressive(config: settings.Progressive, build: Build) -> Followed:
    """Factory of the objective `progressive`: one halving; stages follow each other by `init_from`."""
    source = continuous(Source.of(build), "progressive")
    denoiser = _trained(source, "progressive")
    player = build.player("student", source.student, plain(config.optim))
    shadow = Shadow(player)
    legs = Halving("progressive", source, denoiser, source.model.grid(config.steps), config.guidance, shadow.on)
    return Followed("progressive", Regression(denoiser, legs, config), player, shadow)


def build_reflow(config: settings.Reflow, build: Build) -> Followed:
    """Factory of the objective `reflow`."""
    source = continuous(Source.of(build), "reflow")
    batches = None if config.pairs is None else -(-config.pairs // build.recipe.batch)
    legs = Straight("reflow", source, law(config.time), config.walk, batches)
    player = build.player("student", source.student, plain(config.optim))
    return Followed("reflow", Regression(_trained(source, "reflow"), legs, config), player)
