"""The recipe's rewards at work: what is trained on, what only judges, the gap between them, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.diffusion.codec import Codec
from limbeck.core.diffusion.denoiser import Model
from limbeck.core.rewards.base import Condition, Reward, as_reward, sum_of
from limbeck.core.rewards.config import Judging
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.scheduled import Scheduled, at

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Panel:
    """Weighted rewards on one sample, each in the space it asks for; each must give one number a sample."""

    parts: tuple[tuple[Reward, Scheduled], ...]
    codec: Codec

    @classmethod
    def of(cls, build: Build, split: Split) -> Panel:
        """The rewards that the recipe lists under `train` or `held_out`."""
        if build.recipe.rewards is None:
            raise BadInput("this loss needs rewards: {train: […], held_out: […]} in the recipe")
        model: Model = build.piece("teacher")
        listed = build.config(f"rewards.{split}")
        parts = [(as_reward(build.piece(f"rewards.{split}.{i}"), one.kind), one.weight) for i, one in enumerate(listed)]
        return cls(tuple(parts), model.codec)

    def needed_differentiable(self, method: str) -> Panel:
        """Itself, for a method that follows the gradient of every part."""
        for reward, _ in self.parts:
            reward.needed_differentiable(method)
        return self

    def each(self, x: Tensor, cond: Condition, gen: torch.Generator | None = None) -> list[Tensor]:
        """Every part's values [B] on samples x [B,*S] of the model's own space; each other space is read once."""
        named = sorted({reward.space for reward, _ in self.parts} - {"latent", "any"})
        seen = {"latent": x} | {space: self.codec.read(x, space) for space in named}
        if any(reward.space == "any" for reward, _ in self.parts):
            seen["any"] = seen[named[0]] if named else self.codec.read(x, "any")
        return [reward(seen[reward.space], cond, gen=gen) for reward, _ in self.parts]

    def total(self, ctx: Context, x: Tensor, cond: Condition, gen: torch.Generator | None = None) -> Tensor:
        """The weighted sum [B]."""
        return self.value(x, cond, gen, ctx.step)

    def value(self, x: Tensor, cond: Condition, gen: torch.Generator | None = None, step: int = 0) -> Tensor:
        """The weighted sum [B], with the weights of a step."""
        return sum_of(self.each(x, cond, gen), [at(weight, step) for _, weight in self.parts])


class Judge:
    """Follows both sides of the recipe's rewards over a run and stops it when they part.

    The gap is the gain of the trained rewards minus that of the held-out ones, each in standard deviations of the first
    samples seen. Over-optimisation: the held-out mean falls below its best at `patience` evaluations in a row while the
    trained one is above where it was at that best.
    """

    def __init__(self, config: Judging, held_out: Panel) -> None:
        self.config, self.held_out = config, held_out
        # per side (trained, held out): sums of values, of squares and their count since the last evaluation
        self.sums = torch.zeros(2, 3, dtype=torch.float64)
        self.first = torch.full((2, 2), torch.nan, dtype=torch.float64)  # mean and deviation at the first evaluation
        self.best = torch.full((2,), torch.nan, dtype=torch.float64)  # the means at the held-out side's best
        self.falls = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def observe(self, ctx: Context, x: Tensor, cond: Condition, trained: Tensor) -> None:
        """Account for this step's samples x [b,*S] with their trained reward [b]; logs at every evaluation."""
        held = self.held_out.total(ctx, x.detach(), cond)
        for side, values in enumerate((trained.detach(), held)):
            v = values.double().cpu()
            self.sums[side] += torch.stack([v.sum(), v.square().sum(), torch.ones_like(v).sum()])
        ctx.log("reward/train", trained.mean())
        if self.due(ctx):
            self._evaluate(ctx)

    def due(self, ctx: Context) -> bool:
        """Whether this step ends with an evaluation."""
        return ctx.last and (ctx.step + 1) % self.config.every == 0

    def _evaluate(self, ctx: Context) -> None:
        sums = ctx.mean(self.sums.to(ctx.device)).cpu()
        mean = sums[:, 0] / sums[:, 2]
        std = (sums[:, 1] / sums[:, 2] - mean.square()).clamp_min(1e-12).sqrt()
        self.sums.zero_()
        if bool(self.first.isnan().any()):
            self.first = torch.stack([mean, std], 1)
        gain = (mean - self.first[:, 0]) / self.first[:, 1]
        ctx.log("held_out", float(mean[1]))
        ctx.log("gap", float(gain[0] - gain[1]))
        if not bool(mean[1] <= self.best[1]):  # also true at first, when there is no best
            self.best, self.falls = mean, torch.zeros_like(self.falls)
            return
        self.falls = self.falls + 1 if bool(mean[0] > self.best[0]) else torch.zeros_like(self.falls)
        if self.config.patience is not None and int(self.falls) >= self.config.patience:
            ctx.finish = (
                f"the held-out reward was below its best for {int(self.falls)} evaluations while the trained one rose "
                "(over-optimisation)"
            )

    def state(self) -> dict[str, Tensor]:
        """Everything between two steps."""
        return {f"judge/{name}": getattr(self, name) for name in ("sums", "first", "best", "falls")}

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring it back."""
        for name in ("sums", "first", "best", "falls"):
            setattr(self, name, state[f"judge/{name}"].clone())
