"""Samplers that rewards steer, as pieces: prompts in, one sample each out. Legend: P prompts, N samples of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.config import Walk
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model
from limbeck.core.diffusion.guidance import guided_by, with_scale
from limbeck.core.diffusion.sampling import Kernel, trajectory, usual
from limbeck.core.rewards.base import Condition
from limbeck.core.rewards.panel import Panel
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.core.scheduled import at
from limbeck.core.steering import config as settings
from limbeck.core.steering import noise as noises
from limbeck.core.steering.gradient import GradientGuided
from limbeck.core.steering.particles import Steering, best_of, importance, steer
from limbeck.core.steering.value import lookahead, plug_in, select


@dataclass
class Drawn:
    """One sample x [P,*S] of each prompt, its trained reward [P], and rows of the denoiser (without guidance's) each.

    `noise` is what a one-step student started from.
    """

    x: Tensor
    reward: Tensor
    calls: int
    noise: Tensor | None = None


Sampler = Callable[[list[str], int], Drawn]  # (prompts, seed) -> one sample each


@dataclass
class Start:
    """Where N samples of each prompt begin, neighbours sharing a prompt; all rows have one condition each."""

    x: Tensor  # [P*N,*S]
    cond: Encoded
    raw: Condition
    gen: torch.Generator


@dataclass
class Bench:
    """The recipe's model under a walk, with its trained rewards."""

    model: Model
    inner: Denoiser
    panel: Panel
    walk: Walk

    @classmethod
    def of(cls, config: settings.Plain, build: Build) -> Bench:
        """The student's denoiser where the recipe has one, else the teacher's."""
        model: Model = build.piece("teacher")
        inner: Denoiser = build.piece("student").denoiser if build.has("student") else model.denoiser
        return cls(model, inner, Panel.of(build, "train"), config.walk)

    @property
    def scale(self) -> float:
        """The guidance scale."""
        return at(self.walk.guidance, 0)

    @property
    def denoiser(self) -> Denoiser:
        """Under guidance."""
        return guided_by(self.inner, self.model.encode([self.model.uncond]), self.scale)

    @property
    def kernel(self) -> Kernel:
        """The model's usual one, DDIM with the walk's eta."""
        return usual(self.model, at(self.walk.eta, 0))

    @property
    def times(self) -> Tensor:
        """The model's own grid [K+1]."""
        return self.model.grid(self.walk.steps)

    def start(self, prompts: list[str], n: int, seed: int) -> Start:
        """The first of each prompt's N samples begins the same whatever N is: comparisons are paired."""
        many = [prompt for prompt in prompts for _ in range(n)]
        gen = generator(seed, "steering.walk", 0)
        cond = with_scale(self.model.encode(many), self.scale)
        shape = (len(prompts), *self.model.shape)
        drawn = [torch.randn(shape, generator=generator(seed, "steering.noise", k)) for k in range(n)]
        noise = torch.stack(drawn, 1).flatten(0, 1)
        noise = noise.to(next(iter(cond.values())).device if cond else noise.device)
        x = self.model.begin(noise, self.times[0].expand(len(noise)).to(noise.device), cond)
        return Start(x, cond, {"prompt": many}, gen)

    def score(self, raw: Condition) -> Callable[[Tensor], Tensor]:
        """The trained reward [D*B] of samples [D*B,*S]: D guesses for each row of a condition."""

        def value(x: Tensor) -> Tensor:
            times = len(x) // len(raw["prompt"])
            return self.panel.value(x, {key: list(rows) * times for key, rows in raw.items()})

        return value

    @torch.no_grad()
    def several(self, prompts: list[str], n: int, seed: int) -> tuple[Start, Tensor, Tensor]:
        """N samples of each prompt [P*N,*S] with their rewards [P*N]."""
        begin = self.start(prompts, n, seed)
        x = begin.x
        for step in trajectory(self.denoiser, self.kernel, x, self.times, begin.cond, begin.gen):
            x = step.x_next
        return begin, x, self.score(begin.raw)(x)


def plain(config: settings.Plain, build: Build) -> Sampler:
    """Factory of plain: the model's own samples."""
    bench = Bench.of(config, build)

    def draw(prompts: list[str], seed: int) -> Drawn:
        _, x, reward = bench.several(prompts, 1, seed)
        return Drawn(x, reward, config.walk.steps)

    return draw


def build_best(config: settings.BestOf, build: Build) -> Sampler:
    """Factory of best_of."""
    bench = Bench.of(config, build)

    def draw(prompts: list[str], seed: int) -> Drawn:
        _, x, reward = bench.several(prompts, config.n, seed)
        rows = best_of(reward, config.n)
        return Drawn(x[rows], reward[rows], config.n * config.walk.steps)

    return draw


def build_importance(config: settings.Importance, build: Build) -> Sampler:
    """Factory of importance: self-normalised importance sampling."""
    bench = Bench.of(config, build)

    def draw(prompts: list[str], seed: int) -> Drawn:
        begin, x, reward = bench.several(prompts, config.n, seed)
        rows = importance(reward, config.n, config.temperature, begin.gen)[:, 0]
        return Drawn(x[rows], reward[rows], config.n * config.walk.steps)

    return draw


def build_fk(config: settings.FeynmanKac, build: Build) -> Sampler:
    """Factory of fk (Singhal et al. 2025): of the particles the best, as in the paper, or one by its weight."""
    bench = Bench.of(config, build)
    fields = ("particles", "temperature", "potential", "scheme", "threshold", "every")
    steering = Steering(**{name: getattr(config, name) for name in fields}, final=config.pick == "draw")

    def draw(prompts: list[str], seed: int) -> Drawn:
        begin = bench.start(prompts, config.particles, seed)
        score = bench.score(begin.raw)
        value = plug_in(score, config.temperature, config.draws, begin.gen)
        args = (bench.denoiser, bench.kernel, begin.x, bench.times, steering, value, score, begin.cond, begin.gen)
        found = steer(*args)
        first = torch.arange(0, len(found.x), config.particles, device=found.x.device)
        rows = found.best() if config.pick == "best" else first
        return Drawn(found.x[rows], found.rewards.flatten()[rows].float(), found.evaluations // len(prompts))

    return draw


def build_svdd(config: settings.Svdd, build: Build) -> Sampler:
    """Factory of svdd (Li et al. 2024), with the plug-in value."""
    bench = Bench.of(config, build)

    @torch.no_grad()
    def draw(prompts: list[str], seed: int) -> Drawn:
        begin = bench.start(prompts, 1, seed)
        score = bench.score(begin.raw)
        ahead = bench.denoiser.begin(bench.times)  # keeps the candidates' rows apart from the walk's
        value = lookahead(ahead, score, config.temperature, config.draws, begin.gen)
        args = (bench.denoiser, bench.kernel, begin.x, bench.times, value, config.candidates, config.temperature)
        x = select(*args, begin.cond, begin.gen, config.choice)
        steps = config.walk.steps
        return Drawn(x, score(x), steps + config.candidates * (steps - 1))  # the last value is the reward itself

    return draw


def build_cg(config: settings.Classifier, build: Build) -> Sampler:
    """Factory of cg; the trained rewards must have a gradient."""
    bench = Bench.of(config, build)
    panel = bench.panel.needed_differentiable("cg")

    @torch.no_grad()
    def draw(prompts: list[str], seed: int) -> Drawn:
        begin = bench.start(prompts, 1, seed)
        guided = GradientGuided(bench.denoiser, lambda rows: panel.value(rows, begin.raw), config.scale)
        x = begin.x
        for step in trajectory(guided, bench.kernel, x, bench.times, begin.cond, begin.gen):
            x = step.x_next
        return Drawn(x, bench.score(begin.raw)(x), config.walk.steps)

    return draw


def build_reno(config: settings.Reno, build: Build) -> Sampler:
    """Factory of reno (Eyring et al. 2024) on a differentiable few-step student."""
    model, panel = build.piece("teacher"), Panel.of(build, "train").needed_differentiable("reno")
    student: Any = build.piece("student") if build.has("student") else None
    if student is None or not hasattr(student, "times"):
        raise BadInput("reno moves the noise of a few-step student; give the recipe one, or use fk")
    student.requires_grad_(False)
    ascent = noises.Ascent(**{name: getattr(config, name) for name in ("steps", "lr", "momentum", "clip", "norm")})

    def draw(prompts: list[str], seed: int) -> Drawn:
        cond, raw, shape = model.encode(prompts), {"prompt": prompts}, (len(prompts), *model.shape)
        drawn = [
            torch.randn(shape, generator=generator(seed, "steering.noise", k)).to(build.device)
            for k in range(student.draws)
        ]

        def sample(z: Tensor) -> Tensor:
            found: Tensor = student.sample(z, cond, drawn[1:]).x
            return found

        with torch.enable_grad():
            found = noises.optimise(lambda z: panel.value(sample(z), raw), drawn[0], ascent)
        with torch.no_grad():
            return Drawn(sample(found.noise), found.reward, (config.steps + 1) * student.steps, found.noise)

    return draw


def in_parts(sampler: Sampler, prompts: list[str], seed: int, chunk: int) -> Drawn:
    """A sampler on many prompts, a part at a time, each with a seed of its own."""
    parts = [sampler(prompts[i : i + chunk], seed + i) for i in range(0, len(prompts), chunk)]
    start = [part.noise for part in parts if part.noise is not None]
    x, reward = torch.cat([part.x for part in parts]), torch.cat([part.reward for part in parts])
    return Drawn(x, reward, parts[0].calls, torch.cat(start) if start else None)
