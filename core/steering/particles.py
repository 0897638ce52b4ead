"""Sequential Monte Carlo along a trajectory: Feynman-Kac steering, twisted proposals, importance sampling, best of n.

Legend: G groups (prompts), N particles a group, rows g*N .. g*N + N - 1 of a batch belong to group g. Weights are
kept as logarithms [G,N] in float64 and carried on whenever a group is not resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Output, Prediction, repeat_cond
from limbeck.core.diffusion.discrete import DiscretePrediction, TokenProcess, soft_rows
from limbeck.core.diffusion.sampling import Answer, Kernel, Step, trajectory

Scheme = Literal["multinomial", "systematic", "stratified", "residual"]
Potential = Literal["difference", "max", "sum", "immediate"]
Value = Callable[[Step], Tensor]  # an estimate [B] of the reward to come, at the state a step starts from
Final = Callable[[Tensor], Tensor]  # the reward [B] of x0 [B,*S]


def normalised(log_weights: Tensor) -> Tensor:
    """Weights [G,N] that sum to one in each group; even where all of a group's weights are zero."""
    dead = torch.isneginf(log_weights).all(-1, keepdim=True)
    return torch.softmax(torch.where(dead, 0.0, log_weights.double()), -1)


def effective(log_weights: Tensor) -> Tensor:
    """The effective sample size 1/sum w^2 of each group [G]."""
    return 1 / normalised(log_weights).square().sum(-1)


def resample(log_weights: Tensor, scheme: Scheme, gen: torch.Generator) -> Tensor:
    """Ancestors [G,N] within each group; the expected number of children of particle i is N w_i in every scheme."""
    weights = normalised(log_weights)
    if scheme == "residual":
        return _residual(weights, gen)
    return _inverse(weights, _points(weights.shape, scheme, gen).to(weights.device))


def _points(shape: torch.Size, scheme: str, gen: torch.Generator) -> Tensor:
    """Where the cumulative weights are cut, [G,N] in [0,1): free, one a stratum, or one offset for all strata."""
    groups, n = shape
    u = torch.rand(groups, 1 if scheme == "systematic" else n, generator=gen, dtype=torch.float64, device=gen.device)
    return u if scheme == "multinomial" else (torch.arange(n, device=u.device) + u) / n


def _inverse(weights: Tensor, points: Tensor) -> Tensor:
    cumulative = weights.cumsum(-1)
    return torch.searchsorted(cumulative / cumulative[:, -1:], points, right=True).clamp(max=weights.shape[-1] - 1)


def _residual(weights: Tensor, gen: torch.Generator) -> Tensor:
    """floor(N w) children for certain, the rest drawn from what is left (Liu and Chen 1998)."""
    n = weights.shape[-1]
    sure = (n * weights).floor()
    left = n * weights - sure
    drawn = _inverse(left + 1e-300, _points(weights.shape, "multinomial", gen).to(weights.device))
    out = []
    for counts, extra in zip(sure.long(), drawn, strict=True):
        certain = torch.repeat_interleave(torch.arange(n, device=weights.device), counts)
        out.append(torch.cat([certain, extra[: n - len(certain)]]))
    return torch.stack(out)


@dataclass
class Particles:
    """Log weights [G,N] with what was lived through since: resamplings, ancestors at the start, potentials so far."""

    log_weights: Tensor
    ancestors: Tensor  # [G,N] particle of the start that each comes from
    previous: Tensor  # [G,N] the last reward estimate (difference), the running maximum (max) or sum (sum)
    spent: Tensor  # [G,N] log of the potentials already paid along the lineage
    resampled: list[int] = field(default_factory=list)  # steps at which any group was

    @classmethod
    def start(cls, groups: int, n: int, potential: Potential, first: float, device: torch.device) -> Particles:
        """Even weights; `first` is the reward estimate before the first one (its potential compares with it)."""
        zero = torch.zeros(groups, n, dtype=torch.float64, device=device)
        begin = {"difference": first, "max": -math.inf, "sum": 0.0, "immediate": 0.0}[potential]
        return cls(zero, torch.arange(n, device=device).expand(groups, n), zero + begin, zero.clone())

    def select(self, index: Tensor, chosen: Tensor, step: int) -> Tensor:
        """Give the groups in `chosen` [G] the ancestors index [G,N] and even weights -> batch rows [G*N]."""
        groups, n = index.shape
        own = torch.arange(n, device=index.device).expand(groups, n)
        index = torch.where(chosen[:, None], index, own)
        for name in ("ancestors", "previous", "spent"):
            setattr(self, name, getattr(self, name).gather(1, index))
        kept = torch.logsumexp(self.log_weights, 1, keepdim=True) - math.log(n)
        self.log_weights = torch.where(chosen[:, None], kept, self.log_weights)  # the mean weight: evidence is kept
        self.resampled.append(step)
        return (torch.arange(groups, device=index.device)[:, None] * n + index).flatten()

    def distinct(self) -> Tensor:
        """How many particles of the start still have descendants, [G]."""
        return torch.tensor([len(set(row)) for row in self.ancestors.tolist()])


@dataclass(frozen=True)
class Steering:
    """Feynman-Kac steering (Singhal et al. 2025): potentials whose product along a path is exp(reward/temperature).

    difference: exp((r_t - r_before)/T); max, sum: of all estimates so far; immediate: r_t alone. The last potential is
    whatever makes the product right, with the true reward of x0; so estimates only guide, they do not bias.
    Deviation from the authors' code: weights are logarithms, and are kept when a group is not resampled.
    """

    particles: int
    temperature: float = 1.0
    potential: Potential = "difference"
    scheme: Scheme = "systematic"
    threshold: float = 0.5  # resample a group when its effective sample size falls below this share of N
    every: int = 1  # steps between two estimates
    first: float = 0.0  # what the first estimate is compared with (difference)
    final: bool = True  # resample at the end, so that the samples come with even weights

    def log_potential(self, state: Particles, estimate: Tensor) -> Tensor:
        """log G [G,N] of an estimate r [G,N]; remembers what the next one is compared with."""
        if self.potential == "difference":
            found = (estimate - state.previous) / self.temperature
            state.previous = estimate
            return found
        if self.potential == "max":
            state.previous = torch.maximum(state.previous, estimate)
        else:
            state.previous = state.previous + estimate if self.potential == "sum" else estimate
        return state.previous / self.temperature

    def due(self, step: Step) -> bool:
        """Whether to estimate at the start of this step (not at the first: all particles are fresh noise)."""
        return step.i > 0 and step.i % self.every == 0


@dataclass
class Steered:
    """The end of a steered trajectory: x [G*N,*S], log weights [G,N] (even if resampled), rewards [G,N], history."""

    x: Tensor
    log_weights: Tensor
    rewards: Tensor
    state: Particles
    evaluations: int  # rows of the denoiser

    def best(self) -> Tensor:
        """The row of each group's best particle [G]."""
        n = self.rewards.shape[1]
        return torch.arange(len(self.rewards), device=self.rewards.device) * n + self.rewards.argmax(1)


@torch.no_grad()
def steer(
    denoiser: Denoiser,
    kernel: Kernel,
    x: Tensor,
    times: Tensor,
    settings: Steering,
    value: Value,
    reward: Final,
    cond: Encoded | None = None,
    gen: torch.Generator | None = None,
) -> Steered:
    """Walk G*N particles from x [G*N,*S] along times [K+1]; cond has a row each (or one for all).

    Particles are weighted and chosen at the start of a step, by an estimate from the prediction that the step has
    made anyway, then the chosen ones move: steering costs no evaluation of the denoiser. A `Twisted` denoiser adds its
    importance weights.
    """
    gen = gen or torch.Generator()
    n, count = settings.particles, len(times) - 1
    if len(x) % n:
        raise ValueError(f"{len(x)} rows are no whole groups of {n} particles")
    state = Particles.start(len(x) // n, n, settings.potential, settings.first, x.device)
    twisted = denoiser if isinstance(denoiser, Twisted) else None

    def on_step(step: Step) -> Answer:
        if settings.due(step):
            paid = settings.log_potential(state, value(step).double().view(-1, n))
            state.log_weights, state.spent = state.log_weights + paid, state.spent + paid
        poor = effective(state.log_weights) < settings.threshold * n
        move = Move(step.pred, step.x, step.t, step.s, step.proposal)
        answer: Answer = None
        if bool(poor.any()):
            index = state.select(resample(state.log_weights, settings.scheme, gen), poor, step.i)
            move = Move(step.pred.pick(index), step.x[index], step.t[index], step.s[index])
            move.end = kernel.propose(move.pred, move.x, move.t, move.s, gen)  # children apart, also of one parent
            answer = index, move.end
        if twisted is not None:
            plain = twisted.plain if answer is None else twisted.plain.pick(index)
            state.log_weights = state.log_weights + move.log_ratio(kernel, plain).view(-1, n)
        return answer

    for step in trajectory(denoiser, kernel, x, times, repeat_cond(cond or {}, len(x)), gen, on_step=on_step):
        x = step.x_next
    rewards = reward(x).double().view(-1, n)
    state.log_weights = state.log_weights + rewards / settings.temperature - state.spent  # the product comes out right
    if settings.final:
        everyone = torch.ones(len(rewards), dtype=torch.bool, device=x.device)
        picked = state.select(resample(state.log_weights, settings.scheme, gen), everyone, count)
        x, rewards = x[picked], rewards.flatten()[picked].view(-1, n)
    return Steered(x, state.log_weights, rewards, state, count * len(x))


@dataclass
class Move:
    """A transition of all rows: the prediction it was drawn from, x_t [B,*S] at t, and where it ends at s."""

    pred: Prediction
    x: Tensor
    t: Tensor
    s: Tensor
    end: Tensor | None = None

    def log_ratio(self, kernel: Kernel, plain: Prediction) -> Tensor:
        """log p(x_s | x_t) of the plain prediction minus that of the one drawn from [B]; 0 for a step without noise."""
        assert self.end is not None
        if bool(kernel.is_deterministic(self.t, self.s).all()):
            return torch.zeros(len(self.x), dtype=torch.float64, device=self.x.device)
        args = (self.x, self.end, self.t, self.s)
        return (kernel.log_prob(plain, *args) - kernel.log_prob(self.pred, *args)).double()


class Twisted(Denoiser):
    """Twisted SMC (Wu et al. 2023): proposals moved along the gradient of a value, with exact importance weights.

    `value(pred)` [B] must be differentiable in pred.x_t (token rows for discrete processes). Continuous predictions
    move by sigma^2/alpha grad V/T in x0, as classifier guidance does; masked tokens by the gradient's difference
    between a token and the mask (a first-order Taylor step). Any value is exact; a good one has even weights.
    """

    def __init__(self, inner: Denoiser, value: Callable[[Prediction], Tensor], temperature: float) -> None:
        super().__init__(inner.process, inner.kind)
        self.inner, self.value, self.temperature = inner, value, temperature
        self.plain: Prediction  # of the last question, for the weights

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        return self.inner(x_t, t, cond, features)

    def predict(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Prediction:
        """The moved prediction; the plain one is kept."""
        with torch.enable_grad():
            x = self._open(x_t)
            pred = self.inner.predict(x, t, cond, features)
            (slope,) = torch.autograd.grad(self.value(pred).sum(), x)
        self.plain = pred.detach()
        return self._moved(self.plain, slope / self.temperature)

    def _open(self, x_t: Tensor) -> Tensor:
        process = self.process
        whole = soft_rows(x_t, process.vocab) if isinstance(process, TokenProcess) else x_t.detach().clone()
        return whole.requires_grad_(True)

    def _moved(self, plain: Prediction, slope: Tensor) -> Prediction:
        if isinstance(plain, DiscretePrediction):
            logits = plain.logp_x0 + (slope[..., :-1] - slope[..., -1:]).to(plain.logp_x0)
            return DiscretePrediction(logits, plain.x_t, plain.t, plain.process, plain.kind)
        alpha, sigma = plain.process.coefficients(plain.t, plain.x0)
        return plain.replace(plain.x0 + sigma**2 / alpha * slope.to(plain.x0))

    def begin(self, times: Tensor) -> Denoiser:
        self.inner = self.inner.begin(times)
        return self

    def pick(self, index: Tensor) -> Denoiser:
        self.inner = self.inner.pick(index)
        return self


def best_of(rewards: Tensor, n: int) -> Tensor:
    """Rows [G] of the best of every n neighbours, for rewards [G*n]."""
    groups = rewards.view(-1, n)
    return torch.arange(len(groups), device=rewards.device) * n + groups.argmax(1)


def importance(rewards: Tensor, n: int, temperature: float, gen: torch.Generator, keep: int = 1) -> Tensor:
    """Rows [G,keep] drawn with chance exp(r/T) among every n neighbours (self-normalised importance sampling)."""
    weights = normalised(rewards.view(-1, n) / temperature)
    drawn = _inverse(weights, torch.rand(len(weights), keep, generator=gen, dtype=torch.float64).to(weights.device))
    return torch.arange(len(weights), device=rewards.device)[:, None] * n + drawn
