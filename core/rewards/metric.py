"""The recipe's rewards on the student's samples: those trained on and those that only judge, side by side."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded, Model
from limbeck.core.rewards.config import Rewards
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
    drawn = list(samples(config, build))
    for split in ("train", "held_out"):
        for i, one in enumerate(getattr(build.recipe.rewards, split)):
            reward: Any = build.piece(f"rewards.{split}.{i}")
            values = torch.cat([reward(x, cond).float().cpu() for x, cond in drawn])
            mean, std = float(values.mean()), float(values.std())
            yield {"reward": one.kind, "role": split.replace("_", " "), "mean": mean, "std": std}


def samples(config: Rewards, build: Build) -> Iterator[tuple[Tensor, Encoded]]:
    """The student's decoded samples [b, *S] for the data's prompts, with fixed noise."""
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
        cond = model.encode(prompts)
        yield model.codec.decode(student.sample(noise[0], cond, list(noise[1:])).x), cond
