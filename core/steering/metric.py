"""Several samplers on the same prompts: rewards, what they gain over the first one, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from limbeck.core.rewards.metric import gain
from limbeck.core.rewards.panel import Panel
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.core.steering import config as settings
from limbeck.core.steering.samplers import Drawn, in_parts

Row = dict[str, float | str]


def build(config: settings.Comparison, build: Build) -> Callable[[], list[Row]]:
    """Factory of the metric `samplers`."""
    return lambda: list(rows(config, build))


def rows(config: settings.Comparison, build: Build) -> Iterator[Row]:
    """A row a sampler; gains are paired by prompt and first noise, with 95% intervals."""
    held, texts, first = Panel.of(build, "held_out"), prompts(config, build), None
    blocks: dict[str, Tensor] = {}
    for number, one in enumerate(config.samplers):
        name = f"{number + 1}. {one.kind}"
        build.note(f"{name}: {len(texts)} prompts")
        drawn = in_parts(build.part("sampler", one), texts, build.seed, config.chunk)
        with torch.no_grad():
            judged = held.value(drawn.x, {"prompt": texts})
        found = {"reward": drawn.reward, "held out": judged}
        first = first or found
        blocks[name] = drawn.x[: config.shown]
        yield row(name, drawn, found, first)
    if build.has("space"):
        build.piece("space").grid(build, blocks, texts[: config.shown], build.folder / "samples" / "samplers.png")


def row(name: str, drawn: Drawn, found: dict[str, Tensor], first: dict[str, Tensor]) -> Row:
    """One sampler: means, gains over the first with 95% intervals, rows of the denoiser, the noise's norm."""
    out: Row = {"sampler": name, "calls": drawn.calls}
    for key, values in found.items():
        out |= {key: float(values.mean())} | {f"{key}: {k}": v for k, v in gain(first[key], values).items()}
    if drawn.noise is not None:
        flat = drawn.noise.flatten(1)
        out["noise norm"] = float(flat.norm(dim=1).mean() / flat.shape[1] ** 0.5)  # 1 for fresh noise
    return out


def prompts(config: settings.Comparison, build: Build) -> list[str]:
    """`count` prompts of the data, or the recipe's own."""
    if config.prompts == "sample":
        return list(build.recipe.sample.prompts)
    if not build.has("data"):
        raise BadInput("the metric samplers needs prompts; give the recipe `data`, or set its prompts: sample")
    found: list[str] = build.piece("data").prompts(config.count, generator(build.seed, "samplers", 0), slice(None))
    return found
