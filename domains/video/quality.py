"""The metric `video.quality`: a student beside its teacher at several numbers of steps, and beside real clips.

Frames are judged on principal components of EfficientNet-lite0 features of real clips, motion as in metrics.py. A
frozen generator has the best consistency, flicker and smoothness: they are read beside the dynamic degree alone. One
half of the real clips plays the generator in the row "data".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from limbeck.core import fidelity
from limbeck.core.diffusion.denoiser import Encoded, FewStep, Model
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.lite0 import Lite0
from limbeck.core.run.build import Build
from limbeck.core.run.rng import generator
from limbeck.domains.video import config as settings
from limbeck.domains.video import metrics
from limbeck.domains.video.data import MotionData
from limbeck.domains.video.pipelines.codec import ClipCodec
from limbeck.domains.video.shapes import ShapeData

EXAMPLES = 2  # real clips of each caption
Row = dict[str, float | str]
Sampler = FewStep | ManyStep


class Judge:
    """What all rows are measured with: the feature net, real clips and their components. Legend: C captions."""

    def __init__(self, config: settings.Quality, frames: int) -> None:
        self.config, self.net, self.frames = config, Lite0(), frames
        self.data = MotionData(settings.Motion(frames=8 if frames <= 8 else 16))
        self.names = self.data.set.names[: config.captions]
        real = self.held("real", max(config.each, EXAMPLES))
        found = self.net.features(metrics.frames(real))
        self.mean, self.components = fidelity.principal(found)
        self.real = self.on(found)
        first = real.view(len(self.names), -1, *real.shape[1:])[:, : config.each].flatten(0, 1)
        self.still = self.real[:, : config.each * frames]
        self.moved = self.on(self.net.features(metrics.frames(metrics.changes(first))))

    def held(self, half: str, each: int) -> Tensor:
        """Fixed real clips [C*each,3,F,H,W], a caption's together."""
        return self.data.held(each, half, self.config.fps)[: each * len(self.names), :, : self.frames]

    def on(self, features: Tensor) -> Tensor:
        """lite0 features [N,1280], a caption's together, on the components [C,N/C,D]."""
        return fidelity.project(features, self.mean, self.components, len(self.names))

    def row(self, name: str, steps: int | str, x: Tensor) -> Row:
        """One line of the table, of clips x [C*each,3,F,H,W], a caption's together."""
        found = self.net.features(metrics.frames(x))
        moved = self.on(self.net.features(metrics.frames(metrics.changes(x))))
        still, kept = self.on(found), fidelity.FRECHET
        return {
            "generator": name,
            "steps": steps,
            "FD-lite0 of frames": fidelity.frechet_distance(still[..., :kept], self.still[..., :kept]),
            "FD-lite0 of changes": fidelity.frechet_distance(moved[..., :kept], self.moved[..., :kept]),
            "retrieval@1": fidelity.retrieval(still, self.real),
            "dynamic degree": metrics.dynamic_degree(x, torch.full((len(x),), self.config.fps)),
            "flicker": float(metrics.flicker(x).mean()),
            "neighbour smoothness": float(metrics.neighbour_smoothness(x).mean()),
            "subject consistency": float(metrics.consistency(found.view(len(x), x.shape[2], -1)).mean()),
            "background consistency": float(metrics.background_consistency(x, self.net.features).mean()),
            "sharpness": float(metrics.sharpness(x).mean()),
        }


@torch.no_grad()
def drawn(model: Model, sampler: Sampler, prompts: list[str], fps: float, gen: torch.Generator) -> Tensor:
    """Pixels [B,3,F,H,W] of a sampler at one frame rate."""
    device = next(model.denoiser.parameters()).device
    noise, *renoise = (torch.randn(len(prompts), *model.shape, generator=gen).to(device) for _ in range(sampler.draws))
    cond: Encoded = model.encode(prompts) | {"fps": torch.full((len(prompts),), fps, device=device)}
    return model.codec.decode(sampler.sample(noise, cond, renoise).x).clamp(-1, 1).cpu()


def clips(model: Model, sampler: Sampler, prompts: list[str], config: settings.Quality) -> Tensor:
    """A clip a prompt, a batch at a time; the same first noise for every sampler."""
    starts = range(0, len(prompts), config.batch)
    gens = (generator(config.seed, "video.quality", start) for start in starts)
    parts = [prompts[start : start + config.batch] for start in starts]
    return torch.cat([drawn(model, sampler, part, config.fps, gen) for part, gen in zip(parts, gens, strict=True)])


def seconds(model: Model, sampler: Sampler, prompts: list[str], config: settings.Quality) -> float:
    """Wall time a clip over one batch of `timed` clips, once its text is known and all is warm."""
    some, took = prompts[: config.timed], 0.0
    for _ in range(2):
        began = time.perf_counter()
        drawn(model, sampler, some, config.fps, generator(config.seed, "video.quality", 0))
        took = time.perf_counter() - began
    return took / len(some)


def directions(model: Model, sampler: Sampler, config: settings.Quality) -> float:
    """Share of moving shapes that go where their prompts say."""
    prompts = ShapeData(settings.Shapes()).prompts(config.shapes, generator(config.seed, "video.quality shapes", 0))
    return metrics.direction_accuracy(clips(model, sampler, prompts, config), prompts)


def rows(config: settings.Quality, build: Build) -> Iterator[Row]:
    """Data, the teacher at each number of steps, the student."""
    model: Model = build.piece("teacher")
    judge = Judge(config, model.codec.count if isinstance(model.codec, ClipCodec) else model.shape[1])
    yield judge.row("data", "", judge.held("floor", config.each))
    samplers: list[tuple[str, Sampler]] = [
        ("teacher", ManyStep(model, model.denoiser, steps, config.guidance)) for steps in config.teacher_steps
    ]
    samplers += [("student", build.piece("student"))] if build.has("student") else []
    for name, sampler in samplers:
        build.note(f"clips of the {name}, {sampler.steps} steps")
        prompts = [caption for caption in judge.names for _ in range(config.each)]
        row = judge.row(name, sampler.steps, clips(model, sampler, prompts, config))
        if config.shapes:
            row["direction"] = directions(model, sampler, config)
        yield row | {"seconds": seconds(model, sampler, judge.names, config)}


def build(config: settings.Quality, build: Build) -> Callable[[], list[Row]]:
    """Factory of the metric `video.quality`."""
    return lambda: list(rows(config, build))
