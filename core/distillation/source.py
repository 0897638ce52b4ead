"""What a step trains on: the student's sample and real data, each drawn once per step and shared by all losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.config import TimeLaw
from limbeck.core.diffusion.denoiser import Encoded, Model, Sample
from limbeck.core.diffusion.guidance import blended
from limbeck.core.diffusion.time import Law, law
from limbeck.core.run.build import Batch, Build
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput


class Timed(Protocol):
    """Settings of a loss at times t."""

    time: TimeLaw
    t_group: int


@dataclass(frozen=True)
class Source:
    """Teacher, student and data of a run. A student is a module with `sample(noise, cond)`; with several `times`
    it also has `rollout` (no gradient, from pure noise to step k) and `denoise`.
    """

    model: Model
    student: nn.Module
    data: Any
    null: Encoded  # one row

    @classmethod
    def of(cls, build: Build) -> Source:
        """The run's own pieces; the teacher is frozen."""
        model: Model = build.piece("teacher")
        frozen = build.recipe.student is not None
        model.denoiser.requires_grad_(not frozen)
        student = build.piece("student") if frozen else model.denoiser
        data = build.piece("data") if build.has("data") else None
        return cls(model, student, data, model.encode([model.uncond]))

    def times(self, config: Timed) -> Law:
        """The law of t of a loss; what the teacher sees together shares one t."""
        return law(config.time, self.model.group(config.t_group))

    def sample(self, ctx: Context) -> tuple[Tensor, Encoded]:
        """The student's x [b, *S], with its graph where the student trains in this phase, and its condition."""
        found = self.sampled(ctx)
        return found.x, found.cond

    def sampled(self, ctx: Context) -> Sample:
        """The same with whatever else the student knows of it (depth, opacity)."""
        return ctx.once("student.sample", lambda: self._sample(ctx))

    def condition(self, ctx: Context) -> Encoded:
        """This process's prompts of the step, encoded, and what else the data asks of a sample (a camera)."""
        prompts, asked = self.asked(ctx)
        return blended(self.model.encode(prompts), asked)

    def asked(self, ctx: Context) -> tuple[list[str], Encoded]:
        """The same before prompts are encoded."""
        prompts = self.prompts(ctx)
        found: tuple[list[str], Encoded] = self.data.ask(ctx, prompts) if hasattr(self.data, "ask") else (prompts, {})
        return found

    def _sample(self, ctx: Context) -> Sample:
        student: Any = self.student
        cond = self.condition(ctx)
        noise = ctx.draws.normal("student.noise", tuple(self.model.shape))
        count = len(getattr(student, "times", ()))
        if count <= 1:
            found: Sample = student.sample(noise, cond)
            return found
        k = int(torch.randint(count, (1,), generator=ctx.draws.gen("student.k")))  # one k for all processes
        renoise = [ctx.draws.normal(f"student.renoise{i}", tuple(self.model.shape)) for i in range(k)]
        x_in, t = student.rollout(noise, cond, k, renoise)
        return Sample(student.denoise(x_in, t, cond).x0, cond)

    def prompts(self, ctx: Context, share: int = 1) -> list[str]:
        """This process's prompts of the step, one for each `share` neighbours of the batch."""
        rows = slice(ctx.draws.rows.start // share, ctx.draws.rows.stop // share)
        return self.all_prompts(ctx, share)[rows]

    def all_prompts(self, ctx: Context, share: int = 1) -> list[str]:
        """The prompts of all processes, drawn once a step."""
        count, stream = ctx.global_batch // share, "data.prompts" if share == 1 else f"data.prompts.{share}"
        if self.data is None:
            return [self.model.uncond] * count
        found: list[str] = ctx.once(stream, lambda: self.data.prompts(count, ctx.draws.gen(stream), slice(None)))
        return found

    def real(self, ctx: Context) -> tuple[Tensor, Encoded]:
        """Data x0 [b, *S] in the space of the teacher, and its condition."""
        return ctx.once("data.real", lambda: self._real(ctx))

    def batch(self, ctx: Context) -> Batch | None:
        """This process's rows of data as they are, with their prompts."""
        return ctx.once("data.batch", lambda: self._batch(ctx))

    def _batch(self, ctx: Context) -> Batch | None:
        if self.data is None:
            return None
        found: Batch = self.data.batch(ctx.global_batch, ctx.draws.gen("data.batch"), ctx.draws.rows)
        return found

    def _real(self, ctx: Context) -> tuple[Tensor, Encoded]:
        batch = self.batch(ctx)
        if batch is None or batch.x is None:
            raise BadInput("this loss needs real data and `data` gives none; set adversary: null or change data")
        with torch.no_grad():
            x0 = batch.x.to(ctx.device)
            x0 = x0 if batch.encoded else self.model.codec.encode(x0)
            if tuple(x0.shape[1:]) != tuple(self.model.shape):  # a convolutional net would train on them all the same
                raise BadInput(
                    f"data gives samples of shape {list(x0.shape[1:])}, the teacher has {list(self.model.shape)}; "
                    "give both one size"
                )
            return x0, self.model.encode(batch.prompts) | {k: v.to(ctx.device) for k, v in batch.cond.items()}


def plain(config: OptimConfig) -> OptimConfig:
    """Without the method's own class (it only carries defaults), so that losses with equal settings share a player."""
    return OptimConfig(**config.model_dump())
