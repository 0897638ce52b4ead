"""Checks of InstructVideo: what a frame weighs, where the walk starts, which of its steps learn, which frames gain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from limbeck.core.alignment import backprop
from limbeck.core.alignment import config as alignment
from limbeck.core.alignment.tuning import Tuning
from limbeck.core.check import Check
from limbeck.core.diffusion.codec import Codec, Identity
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Output
from limbeck.core.diffusion.process import Flow
from limbeck.core.distillation.source import Source
from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.rewards.config import Judging
from limbeck.core.rewards.panel import Judge, Panel
from limbeck.core.run.build import Batch
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.players import Player
from limbeck.core.run.rng import Draws, generator
from limbeck.core.run.trainer import Trainer
from limbeck.domains.video.instruct import attenuation, of_frames, segmental

Weight = Callable[[Tensor, int, float], Tensor]
Remaining = Callable[[Tensor, float], Tensor]
EDIT = alignment.Draft(
    last=1, edit=alignment.Edit(), walk=alignment.Walk(steps=20, eta=0.0, guidance=1.0), judge=Judging(patience=None)
)
SHAPE = (1, 16, 2, 2)
CARD = (0.003, 0.143, 0.385, 0.007)  # mean weights of four segments of sixteen frames, decay 1


def weights(weight: Weight = attenuation) -> list[Check]:
    """The mean weight of each of four segments of sixteen frames, and of all: exact, and of the frames drawn.

    The exact ones are .0026, .1428, .3882 and .0071, of all .135; .385 and .134 were measured on draws.
    """
    index = segmental(20_000, 16, 4, generator(0, "check.segments", 0))
    drawn, exact = weight(index, 16, 1.0).mean(0), weight(torch.arange(16), 16, 1.0).view(4, 4).mean(1)
    off = (exact - torch.tensor(CARD)).abs().max()
    return [
        Check("largest difference from .003, .143, .385, .007", float(off), 4e-3, "<="),
        Check("the same of the frames drawn", float((drawn - exact).abs().max()), 0.01, "<="),
        Check("the mean against .134", abs(float(exact.mean()) - 0.134), 2e-3, "<="),
    ]


def start(remaining: Remaining = backprop.remaining) -> list[Check]:
    """Of the twenty indices 951, 901, ..., 1 the walk takes twelve, from 551 down."""
    grid = torch.tensor([*range(951, 0, -50), -1])
    taken = remaining(grid, 0.6)
    return [
        Check("the first index against 551", abs(float(taken[0]) - 551), 0.0, "<="),
        Check("steps against 12", abs(len(taken) - 1 - 12), 0.0, "<="),
        Check(
            "steps for a share of .29 of 100 against 29", abs(len(remaining(torch.arange(101), 0.29)) - 30), 0.0, "<="
        ),
    ]


class Stepwise(Denoiser):
    """Clips of frames about a level each: the exact denoiser of N(level, 1) with a level for each step of the walk."""

    def __init__(self, steps: int, frames: int) -> None:
        super().__init__(Flow(), "x0")
        self.steps = steps
        self.levels = nn.Parameter(torch.zeros(steps, frames))

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        alpha, sigma = self.process.coefficients(t, x_t)
        step = (self.steps * (1 - t)).round().long().clamp(0, self.steps - 1)
        level = self.levels[step][:, None, :, None, None]
        return level + alpha * (x_t - alpha * level) / (alpha**2 + sigma**2)


class Still:
    """Grey clips without prompts."""

    def prompts(self, n: int, gen: torch.Generator, rows: slice) -> list[str]:
        """Empty ones."""
        return [""] * n

    def batch(self, n: int, gen: torch.Generator, rows: slice) -> Batch:
        """x [b,1,F,2,2]."""
        return Batch(torch.randn(n, *SHAPE, generator=gen)[rows], [""] * (rows.stop - rows.start))


def brightness(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
    """The mean of each picture [B,1,H,W]."""
    return x.flatten(1).mean(1)


def brightened(decay: float, codec: Codec | None = None) -> Tuning:
    """A toy video model whose levels are to be tuned for brightness."""
    used = codec or Identity()
    student = nn.Module()
    student.denoiser = Stepwise(20, SHAPE[1])
    frozen = Stepwise(20, SHAPE[1]).requires_grad_(False)
    model = Model(frozen, SHAPE, used, lambda prompts: {}, "levels")
    reward = of_frames(Reward(brightness, "brightness", "pixels", differentiable=True), 4, decay)
    panel = Panel(((reward, 1.0),), used)
    player = Player("student", student, OptimConfig(kind="sgd", lr=1.0, betas=(0.0, 0.0), clip=None), 100)
    return Tuning(Source(model, student, Still(), {}), panel, Judge(EDIT.judge, panel), player)


def slope(config: alignment.Draft = EDIT, codec: Codec | None = None) -> Tensor:
    """The reward's gradient on the level of every frame in every step [20,F]; zeros where none arrives."""
    tuning = brightened(1.0, codec)
    ctx = Context(0, "s", Draws(0, 0, 16), 1, 0, torch.device("cpu"))
    loss = backprop.backpropagate(tuning, config, ctx)["reward"]
    levels = tuning.student.get_parameter("levels")
    if not loss.requires_grad:
        return torch.zeros_like(levels)
    found = torch.autograd.grad(-loss, levels, allow_unused=True)[0]
    return torch.zeros_like(levels) if found is None else found


def gradient(config: alignment.Draft = EDIT, codec: Codec | None = None) -> list[Check]:
    """Only the last step learns, and it does."""
    each = slope(config, codec).abs().sum(1)
    return [
        Check("gradient of all steps before the last", float(each[:-1].sum()), 0.0, "<="),
        Check("gradient of the last", float(each[-1]), 1e-4, ">=", "0 where decoding breaks the graph"),
    ]


def tuned(decay: float, steps: int = 60) -> Tensor:
    """How much brighter every frame became [F] under a reward of that decay."""
    tuning = brightened(decay)
    objective = backprop.Ascent(tuning, lambda ctx: backprop.backpropagate(tuning, EDIT, ctx))
    Trainer(objective, Team("cpu"), 0, "s", steps, 32).run()
    return tuning.student.get_parameter("levels").detach()[-1]


def centre() -> list[Check]:
    """The middle frame becomes brightest with weights that fall off; without, all frames alike."""
    fading, even = tuned(1.0), tuned(0.0)
    return [
        Check("brightest frame against the eighth", abs(float(fading.argmax()) - 8), 0.0, "<="),
        Check("the first frame over the brightest", float(fading[0] / fading[8]), 0.01, "<="),
        Check("without weights: darkest over brightest", float(even.min() / even.max()), 0.7, ">="),
    ]
