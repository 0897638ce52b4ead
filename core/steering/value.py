"""Estimates of the reward to come, and per-sample selection by them (SVDD). Legend: B samples, M candidates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Prediction, repeat_cond
from limbeck.core.diffusion.discrete import DiscretePrediction, categorical
from limbeck.core.diffusion.sampling import Kernel, Step, trajectory
from limbeck.core.steering.particles import Value

Score = Callable[[Tensor], Tensor]  # x0 [B,*S] -> reward [B]
StateValue = Callable[[Tensor, Tensor, Encoded], Tensor]  # (x_s, s [B], cond) -> the reward to come [B]
Choice = Literal["sample", "argmax"]


def guesses(pred: Prediction, draws: int | None, gen: torch.Generator | None) -> Tensor:
    """Likely x0 [D,B,*S]: the prediction itself, or `draws` samples of each token's posterior (None: its argmax)."""
    if not isinstance(pred, DiscretePrediction):
        return pred.x0[None]
    if draws is None:
        return pred.logp_x0.argmax(-1)[None]
    return torch.stack([categorical(pred.logp_x0.exp(), cast(torch.Generator, gen)) for _ in range(draws)])


def expected(
    pred: Prediction, score: Score, temperature: float, draws: int | None = None, gen: torch.Generator | None = None
) -> Tensor:
    """The plug-in value T log mean exp(r/T) [B] over the guesses of one prediction; with one guess, its reward.

    Deviation from FK steering's code, which takes log mean exp r and multiplies by 1/T afterwards.
    """
    found = guesses(pred, draws, gen)
    scores = score(found.flatten(0, 1)).double().view(len(found), -1)
    return temperature * (torch.logsumexp(scores / temperature, 0) - math.log(len(found)))


def plug_in(score: Score, temperature: float, draws: int | None = None, gen: torch.Generator | None = None) -> Value:
    """A `Value` for `steer`, from the prediction that the step has made anyway."""
    return lambda step: expected(step.pred, score, temperature, draws, gen)


def lookahead(
    denoiser: Denoiser, score: Score, temperature: float, draws: int | None = None, gen: torch.Generator | None = None
) -> StateValue:
    """SVDD-PM: the plug-in value at (x_s, s), one evaluation of the denoiser; the reward itself at s = 0."""

    def value(x: Tensor, s: Tensor, cond: Encoded) -> Tensor:
        if bool((s <= 0).all()):
            return score(x).double()
        return expected(denoiser.predict(x, s, cond), score, temperature, draws, gen)

    return value


@torch.no_grad()
def select(
    denoiser: Denoiser,
    kernel: Kernel,
    x: Tensor,
    times: Tensor,
    value: StateValue,
    candidates: int,
    temperature: float,
    cond: Encoded | None = None,
    gen: torch.Generator | None = None,
    choice: Choice = "sample",
) -> Tensor:
    """SVDD (Li et al. 2024): of M candidates x_s of each sample one is kept, with chance exp(value/T); x0 [B,*S].

    Samples do not interact. "argmax" is what the authors' code does: a greedy search, whose samples are not
    distributed as the tilted law. For finite M the law lies between the model and the tilt.
    """
    gen, cond = gen or torch.Generator(), repeat_cond(cond or {}, len(x))
    everywhere = {key: rows.repeat(candidates, *[1] * (rows.ndim - 1)) for key, rows in cond.items()}

    def on_step(step: Step) -> Tensor:
        args = (step.pred, step.x, step.t, step.s, gen)
        found = torch.stack([step.proposal, *(kernel.propose(*args) for _ in range(candidates - 1))])
        scores = value(found.flatten(0, 1), step.s.repeat(candidates), everywhere).view(candidates, -1)
        kept = scores.argmax(0) if choice == "argmax" else categorical(_chances(scores.T / temperature), gen)
        return found[kept, torch.arange(found.shape[1], device=found.device)]

    for step in trajectory(denoiser, kernel, x, times, cond, gen, on_step=on_step):
        x = step.x_next
    return x


def _chances(logits: Tensor) -> Tensor:
    return torch.softmax(logits.double(), -1)
