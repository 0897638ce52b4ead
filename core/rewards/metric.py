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


@torch.no_grad()
def rows(config: Rewards, build: Build) -> Iterator[Row]:
    """`rewards.train.0` and so on; samples are drawn once for all of them."""
    drawn, splits = list(samples(config, build)), (("train", "train"), ("held_out", "held out"))
    for split, role in splits:
        panel = Panel.of(build, split)  # type: ignore[arg-type]
        gen = generator(build.seed, "rewards.draws", 0)
        columns = zip(*(panel.each(x, cond, gen) for x, cond in drawn), strict=True)
        for (reward, _), parts in zip(panel.parts, columns, strict=True):
            values = torch.cat(parts).cpu()
            yield {"reward": reward.name, "role": role, "mean": float(values.mean()), "std": float(values.std())}


def samples(config: Rewards, build: Build) -> Iterator[tuple[Tensor, Condition]]:
    """The student's samples [b, *S] in the model's own space for the data's prompts, with fixed noise."""
    model: Model = build.piece("teacher")
    gen = generator(build.seed, "rewards.samples", 0)
    for start in range(0, config.count, config.chunk):
        n = min(config.chunk, config.count - start)
        prompts = [model.uncond] * n
        if build.has("data"):
            prompts = build.piece("data").prompts(n, gen, slice(None))
        student: Any = build.piece("student")
        count = max(1, len(getattr(student, "times", ())))  # a student of several steps needs a noise for each
        noise = torch.randn(count, n, *model.shape, generator=gen).to(build.device)
        yield student.sample(noise[0], model.encode(prompts), list(noise[1:])).x, {"prompt": prompts}
