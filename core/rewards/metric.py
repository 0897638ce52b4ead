"""The recipe's rewards on the student's samples: those trained on and those that only judge, side by side."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Model
from limbeck.core.rewards.base import Condition
from limbeck.core.rewards.config import Rewards
from limbeck.core.rewards.panel import Panel
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator

Row = dict[str, float | str]


def build(config: Rewards, build: Build) -> Callable[[], list[Row]]:
    """Factory of the metric `rewards`: one row a reward, with its mean and standard deviation over the samples."""
    if build.recipe.rewards is None:
        raise BadInput("the metric rewards needs rewards: {train: […], held_out: […]} in the recipe")
    return lambda: list(rows(config, build))


def gain(before: Tensor, after: Tensor) -> dict[str, float]:
    """The mean gain of pairs [N], its 95% interval (normal, from the pairs' differences) and the gain in deviations.

    "in sd" is the gain in standard deviations of `before`.
    """
    change = (after.double() - before.double()).cpu()
    mean, half = float(change.mean()), 1.96 * float(change.std()) / len(change) ** 0.5
    spread = max(float(before.double().std()), 1e-12)
    return {"gain": mean, "low": mean - half, "high": mean + half, "in sd": mean / spread}


@torch.no_grad()
def rows(config: Rewards, build: Build) -> Iterator[Row]:
    """A row a reward; samples are drawn once for all of them, before and after from the same noise."""
    student: Any = build.piece("student")
    drawn, splits = list(samples(config, build, student)), (("train", "train"), ("held_out", "held out"))
    was = list(samples(config, build, student.before())) if hasattr(student, "before") else None
    for split, role in splits:
        panel = Panel.of(build, split)  # type: ignore[arg-type]
        after, before = judged(build, panel, drawn), judged(build, panel, was) if was else None
        for i, (reward, _) in enumerate(panel.parts):
            out: Row = {"reward": reward.name, "role": role}
            if before is not None:
                out["before"] = float(before[i].mean())
            out |= {"mean": float(after[i].mean()), "std": float(after[i].std())}
            if before is not None:
                out |= gain(before[i], after[i])
            yield out


def judged(build: Build, panel: Panel, drawn: list[tuple[Tensor, Condition]]) -> list[Tensor]:
    """Every part's values [N] over all samples."""
    gen = generator(build.seed, "rewards.draws", 0)
    return [torch.cat(parts) for parts in zip(*(panel.each(x, cond, gen) for x, cond in drawn), strict=True)]


def samples(config: Rewards, build: Build, student: Any) -> Iterator[tuple[Tensor, Condition]]:
    """A student's samples [b, *S] in the model's own space for the data's prompts, with fixed noise."""
    model: Model = build.piece("teacher")
    gen = generator(build.seed, "rewards.samples", 0)
    for start in range(0, config.count, config.chunk):
        n = min(config.chunk, config.count - start)
        prompts = [model.uncond] * n
        if build.has("data"):
            prompts = build.piece("data").prompts(n, gen, slice(None))
        count = getattr(student, "draws", 1)
        noise = torch.randn(count, n, *model.shape, generator=gen).to(build.device)
        yield student.sample(noise[0], model.encode(prompts), list(noise[1:])).x, {"prompt": prompts}
