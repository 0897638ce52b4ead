"""Is a sample the shape that was asked for, how near is it to one, and are the samples as varied as the data?"""

from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.api import Build
from limbeck_points.config import Quality
from limbeck_points.data import SHAPES, references
from limbeck_points.space import draw


def measure(sets: Tensor, labels: Tensor) -> dict[str, float]:
    """The share nearest to their own shape, the root mean square distance a point, the spread within a shape."""
    known, kinds = references(200)
    distance, nearest = torch.cdist(sets.flatten(1), known.flatten(1)).min(1)
    spread = torch.stack([sets[labels == k].std(0).mean() for k in range(len(SHAPES))]).mean()
    right, size = (kinds[nearest] == labels).float().mean(), sets[0].numel() ** 0.5
    return {"right shape": float(right), "distance": float(distance.mean() / size), "spread": float(spread)}


def build(config: Quality, build: Build) -> Callable[[], list[dict[str, float | str]]]:
    """Factory of the metric."""
    labels = torch.arange(len(SHAPES)).repeat_interleave(config.count // len(SHAPES))
    prompts = [SHAPES[k] for k in labels.tolist()]
    models = ("teacher", "student")
    return lambda: [{"model": which} | measure(draw(build, prompts, build.seed, which), labels) for which in models]
