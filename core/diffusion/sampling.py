"""Kernels (one stochastic step with its density), solvers (several evaluations a step) and the trajectory.

t is where a step starts and s < t where it ends; both are [B] and may differ per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Prediction, index_cond, repeat_cond, rows
from limbeck.core.diffusion.discrete import FirstHitting, TokenKernel, TokenProcess, first_hitting, mask, uniform
from limbeck.core.diffusion.draws import Generator, normal
from limbeck.core.diffusion.process import VP, Flow, Process, expand
from limbeck.core.diffusion.time import times

__all__ = [
    "FirstHitting",
    "GaussianKernel",
    "Kernel",
    "Solver",
    "Step",
    "TokenKernel",
    "ancestral",
    "ddim",
    "ddim_inverse",
    "ddim_jump",
    "euler",
    "first_hitting",
    "flow_sde",
    "heun",
    "jump",
    "mask",
    "renoise",
    "sample",
    "substeps",
    "times",
    "trajectory",
    "travel",
    "uniform",
    "usual",
]


class Kernel(Protocol):
    """One reverse step x_t -> x_s: how to draw it and how likely a drawn one is under any prediction."""

    def propose(self, pred: Prediction, x: Tensor, t: Tensor, s: Tensor, gen: Generator | None) -> Tensor:
        """Draw x_s."""

    def log_prob(self, pred: Prediction, x: Tensor, x_s: Tensor, t: Tensor, s: Tensor, reduce: str = "sum") -> Tensor:
        """log density of a stored transition [B], summed or averaged over the sample."""

    def kl(
        self, pred_a: Prediction, pred_b: Prediction, x: Tensor, t: Tensor, s: Tensor, reduce: str = "sum"
    ) -> Tensor:
        """KL of the step under a from the step under b [B]."""

    def relax(self, tau: float) -> Kernel:
        """A step with gradient through the draw."""

    def is_deterministic(self, t: Tensor, s: Tensor) -> Tensor:
        """Which rows have no density, bool of t's shape."""


@runtime_checkable
class Solver(Protocol):
    """A step that evaluates the denoiser again."""

    def advance(
        self,
        denoiser: Denoiser,
        pred: Prediction,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Encoded,
        gen: Generator | None,
    ) -> Tensor:
        """x_s, given the prediction at (x, t)."""


def _levels(process: Process, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma in float64, of the rank of `like`."""
    alpha, sigma = process.levels(t.to(like.device))
    return expand(alpha, like), expand(sigma, like)


def ddim_jump(x: Tensor, t: Tensor, s: Tensor, x0: Tensor, process: Process) -> Tensor:
    """J(x,t,s; x0) = alpha_s x0 + sigma_s (x - alpha_t x0)/sigma_t (DDIM eq. 12 with no noise); s may exceed t."""
    (a_t, s_t), (a_s, s_s) = _levels(process, t, x), _levels(process, s, x)
    ratio = s_s / s_t
    return (a_s - ratio * a_t).to(x0.dtype) * x0 + ratio.to(x0.dtype) * x


def ddim_inverse(x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, process: Process) -> Tensor:
    """The x0 whose jump from (x_t, t) lands on x_s: the target of progressive distillation."""
    (a_t, s_t), (a_s, s_s) = _levels(process, t, x_t), _levels(process, s, x_t)
    ratio = s_s / s_t
    return (x_s - ratio.to(x_s.dtype) * x_t) / (a_s - ratio * a_t).to(x_s.dtype)


def travel(x: Tensor, s: Tensor, p: Tensor, noise: Tensor, process: Process) -> Tensor:
    """Forward noise from s to p > s: (alpha_p/alpha_s) x + sqrt(sigma_p^2 - (alpha_p/alpha_s)^2 sigma_s^2) noise."""
    (a_s, s_s), (a_p, s_p) = _levels(process, s, x), _levels(process, p, x)
    scale = a_p / a_s
    std = (s_p**2 - (scale * s_s) ** 2).clamp_min(0).sqrt()
    return scale.to(x.dtype) * x + std.to(x.dtype) * noise


Moments = Callable[[Prediction, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GaussianKernel:
    """x_s ~ N(mean, std^2) with moments(pred, x, t, s); `noiseless(t, s)` says which rows have std 0."""

    moments: Moments
    noiseless: Callable[[Tensor, Tensor], Tensor]

    def propose(self, pred: Prediction, x: Tensor, t: Tensor, s: Tensor, gen: Generator | None) -> Tensor:
        """mean + std xi; gradient flows through the mean (the draw is reparameterised)."""
        mean, std = self.moments(pred, x, t, s)
        if bool(self.noiseless(t, s).all()):
            return mean
        if gen is None:
            raise ValueError("this kernel draws; give it a torch.Generator")
        return mean + std * normal(mean, gen)

    def log_prob(self, pred: Prediction, x: Tensor, x_s: Tensor, t: Tensor, s: Tensor, reduce: str = "sum") -> Tensor:
        """-(x_s - mean)^2/(2 std^2) - log std - log(2 pi)/2 over the sample, [B]; x_s should be detached."""
        self._dense(t, s)
        mean, std = self.moments(pred, x, t, s)
        each = -0.5 * ((x_s - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        return reduce_sample(each, reduce)

    def kl(
        self, pred_a: Prediction, pred_b: Prediction, x: Tensor, t: Tensor, s: Tensor, reduce: str = "sum"
    ) -> Tensor:
        """|mean_a - mean_b|^2/(2 std^2), [B]; the standard deviation is the same."""
        self._dense(t, s)
        mean_a, std = self.moments(pred_a, x, t, s)
        return reduce_sample(0.5 * ((mean_a - self.moments(pred_b, x, t, s)[0]) / std) ** 2, reduce)

    def relax(self, tau: float) -> GaussianKernel:
        """Itself: Gaussian draws are reparameterised already."""
        return self

    def is_deterministic(self, t: Tensor, s: Tensor) -> Tensor:
        return self.noiseless(t, s)

    def _dense(self, t: Tensor, s: Tensor) -> None:
        if bool(self.noiseless(t, s).any()):
            raise ValueError("a deterministic step has no density: leave out rows where kernel.is_deterministic(t, s)")


def reduce_sample(value: Tensor, reduce: str) -> Tensor:
    """[B,*S] to [B] by "sum" or "mean"."""
    if reduce not in ("sum", "mean"):
        raise ValueError(f'reduce is {reduce!r}; use "sum" or "mean"')
    return value.flatten(1).sum(1) if reduce == "sum" else value.flatten(1).mean(1)


def _always(t: Tensor, s: Tensor) -> Tensor:
    return torch.ones_like(t, dtype=torch.bool)


def ddim(eta: float = 0.0, floor: float = 0.0) -> GaussianKernel:
    """DDIM (eq. 12 and 16): alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau xi; eta = 1 is the ancestral step.

    tau = eta (sigma_s/sigma_t) sqrt(sigma_t^2 - (alpha_t sigma_s/alpha_s)^2), DDIM's own for VP. It holds for every
    process: with the true x0 the marginal of x_s is exact for each eta. `floor` is the least tau where eta > 0:
    policy methods need a density at the last step, which has none otherwise.
    """

    def moments(pred: Prediction, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        x0, eps = pred.x0, pred.eps
        (a_t, s_t), (a_s, s_s) = _levels(pred.process, t, x), _levels(pred.process, s, x)
        tau = (eta * (s_s / s_t) * (s_t**2 - (a_t * s_s / a_s) ** 2).clamp_min(0).sqrt()).clamp_min(floor)
        keep = (s_s**2 - tau**2).clamp_min(0).sqrt()
        return a_s.to(x0.dtype) * x0 + keep.to(x0.dtype) * eps, tau.to(x0.dtype)

    if eta == 0:
        return GaussianKernel(moments, _always)
    return GaussianKernel(moments, lambda t, s: (s >= t) | ((s <= 0) & (floor == 0)))


def usual(model: Model, eta: float = 0.0, floor: float = 0.0) -> Kernel:
    """The kernel of a model's walks: its own, else MDLM's step for tokens and DDIM for the rest."""
    if model.kernel is not None:
        return model.kernel
    return TokenKernel() if isinstance(model.denoiser.process, TokenProcess) else ddim(eta, floor)


def ancestral() -> GaussianKernel:
    """DDPM's posterior step."""
    return ddim(1.0)


def renoise() -> GaussianKernel:
    """alpha_s x0 + sigma_s xi: the multi-step sampler of consistency models, LCM and DMD2."""

    def moments(pred: Prediction, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = pred.process.coefficients(s, pred.x0)
        return alpha * pred.x0, sigma

    return GaussianKernel(moments, lambda t, s: s <= 0)


def jump(gamma: float = 0.0) -> GaussianKernel:
    """The consistency jump of CTM and TCD: J to (1 - gamma) s without noise, then forward noise to s.

    gamma = 0 is the plain jump, gamma = 1 is `renoise`.
    """

    def moments(pred: Prediction, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        x0, middle = pred.x0, (1 - gamma) * s
        landed = ddim_jump(x.to(x0.dtype), t, middle, x0, pred.process)
        (a_m, s_m), (a_s, s_s) = _levels(pred.process, middle, x), _levels(pred.process, s, x)
        std = (s_s**2 - (a_s / a_m * s_m) ** 2).clamp_min(0).sqrt()
        return (a_s / a_m).to(x0.dtype) * landed, std.to(x0.dtype)

    return GaussianKernel(moments, _always if gamma == 0 else lambda t, s: s <= 0)


def flow_sde(noise: float = 0.7) -> GaussianKernel:
    """Flow-GRPO's Euler step of the reverse SDE, g^2 = noise^2 sigma/(1 - sigma), in the variable sigma.

    x + (u - g^2/2 score) (sigma_s - sigma_t) + g sqrt(sigma_t - sigma_s) xi. Where alpha_t = 0 the first step takes
    1 - sigma_s in g, as in the authors' code.
    """

    def moments(pred: Prediction, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(pred.process, Flow):
            raise ValueError("flow_sde is for rectified flow; use ddim(eta) for this process")
        flow, eps = pred.flow, pred.eps
        (a_t, s_t), (a_s, s_s) = _levels(pred.process, t, x), _levels(pred.process, s, x)
        g2 = noise**2 * s_t / torch.where(a_t > 0, a_t, a_s)
        drift = flow + (g2 / (2 * s_t)).to(flow.dtype) * eps  # score = -eps/sigma
        mean = x.to(flow.dtype) + (s_s - s_t).to(flow.dtype) * drift
        return mean, (g2 * (s_t - s_s)).clamp_min(0).sqrt().to(flow.dtype)

    return GaussianKernel(moments, _always if noise == 0 else lambda t, s: s >= t)


@dataclass(frozen=True)
class Euler:
    """First order: the DDIM jump, which is Euler in sigma for VE and rectified flow and in sigma/alpha for VP."""

    def advance(
        self,
        denoiser: Denoiser,
        pred: Prediction,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Encoded,
        gen: Generator | None,
    ) -> Tensor:
        return ddim(0.0).propose(pred, x, t, s, None)


@dataclass(frozen=True)
class Heun:
    """Second order (EDM alg. 1 without churn): the slope at both ends; the step to s = 0 is Euler's.

    Slopes: eps in sigma for VE, eps - x0 in sigma for rectified flow, v in the angle atan(sigma/alpha) for VP.
    """

    def advance(
        self,
        denoiser: Denoiser,
        pred: Prediction,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Encoded,
        gen: Generator | None,
    ) -> Tensor:
        euler_step = ddim(0.0).propose(pred, x, t, s, None)
        last = s <= 0
        if bool(last.all()):
            return euler_step
        second = denoiser.predict(euler_step, torch.where(last, t, s), cond)
        corrected = _trapezoid(pred, second, x, t, s)
        return torch.where(expand(last, x), euler_step, corrected)


def _trapezoid(first: Prediction, second: Prediction, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    (clock_t, slope), (clock_s, end) = _slope(first, t, x), _slope(second, s, x)
    return x + (clock_s - clock_t).to(slope.dtype) * (slope + end) / 2


def _slope(pred: Prediction, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The clock in which the path is smoothest, and dx/dclock: the angle atan(sigma/alpha) and v for VP, else sigma."""
    alpha, sigma = _levels(pred.process, t, x)
    if isinstance(pred.process, VP):
        return torch.atan2(sigma, alpha), pred.v
    return sigma, pred.flow if isinstance(pred.process, Flow) else pred.eps


@dataclass(frozen=True)
class Substeps:
    """n equal sub-steps in t of one kernel."""

    kernel: Kernel
    n: int

    def advance(
        self,
        denoiser: Denoiser,
        pred: Prediction,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Encoded,
        gen: Generator | None,
    ) -> Tensor:
        for i in range(self.n):
            a, b = t + (s - t) * (i / self.n), t + (s - t) * ((i + 1) / self.n)
            here = pred if i == 0 else denoiser.predict(x, a, cond)
            x = self.kernel.propose(here, x, a, s if i + 1 == self.n else b, gen)
        return x


def euler() -> Euler:
    """First-order solver of the probability-flow ODE."""
    return Euler()


def heun() -> Heun:
    """Second-order solver of the probability-flow ODE."""
    return Heun()


def substeps(kernel: Kernel, n: int) -> Substeps:
    """A solver that takes n steps of `kernel` (SCott's sub-steps)."""
    return Substeps(kernel, n)


@dataclass
class Step:
    """One step of a trajectory: state x at t [B], its prediction, the state x_next at s [B] (after `on_step`)."""

    i: int
    t: Tensor
    s: Tensor
    x: Tensor
    pred: Prediction
    x_next: Tensor
    proposal: Tensor
    kernel: Kernel | Solver

    @property
    def logp(self) -> Tensor | None:
        """log density of the proposed transition [B] (detached end point); None for solvers and noiseless steps."""
        if isinstance(self.kernel, Solver) or bool(self.kernel.is_deterministic(self.t, self.s).any()):
            return None
        return self.kernel.log_prob(self.pred, self.x, self.proposal.detach(), self.t, self.s)


Answer = Tensor | tuple[Tensor, Tensor] | None
OnStep = Callable[[Step], Answer]


class _Remat(Denoiser):
    """A denoiser whose activations are recomputed in the backward pass."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.process, inner.kind)
        self.inner = inner

    def predict(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Prediction:
        t, cond = rows(t.to(x_t.device), len(x_t)), repeat_cond(cond, len(x_t))
        raw = checkpoint(self.inner, x_t, t, cond, use_reentrant=False)
        return self.inner.wrap(raw, x_t, t)


def rematerialised(denoiser: Denoiser) -> Denoiser:
    """Where gradients are on, the denoiser with its activations recomputed in the backward pass; else itself."""
    return _Remat(denoiser) if torch.is_grad_enabled() else denoiser


def _advance(
    denoiser: Denoiser,
    rule: Kernel | Solver,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Encoded,
    gen: Generator | None,
) -> tuple[Prediction, Tensor]:
    pred = denoiser.predict(x, t, cond)
    if isinstance(rule, Solver):
        return pred, rule.advance(denoiser, pred, x, t, s, cond, gen)
    return pred, rule.propose(pred, x, t, s, gen)


def trajectory(
    denoiser: Denoiser,
    kernel: Kernel | Solver,
    x: Tensor,
    times: Tensor,
    cond: Encoded | None = None,
    gen: Generator | None = None,
    grad_last: int = 0,
    remat: bool = True,
    on_step: OnStep | None = None,
) -> Iterator[Step]:
    """Walk from x [B,*S] along times [K+1] (or [K+1,B]), yielding every Step; gradient through the last `grad_last`.

    `on_step(step)` may return a state to go on with, or an index [N] (whole numbers, one axis) to resample the batch
    by, or both (children drawn anew from the chosen parents): state, condition, per-row times and guidance follow.
    `remat` recomputes activations in the backward pass.
    """
    denoiser, cond = denoiser.begin(times), repeat_cond(cond or {}, len(x))
    count = len(times) - 1
    grid = times.to(x.device)
    for i in range(count):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= count - grad_last):
            walker = rematerialised(denoiser) if remat else denoiser
            t, s = rows(grid[i], len(x)), rows(grid[i + 1], len(x))
            pred, proposal = _advance(walker, kernel, x, t, s, cond, gen)
            step = Step(i, t, s, x, pred, proposal, proposal, kernel)
            index, step.x_next = _chosen(on_step(step) if on_step is not None else None, proposal)
            if index is not None:
                cond, denoiser = index_cond(cond, index), denoiser.pick(index)
                grid = grid[:, index] if grid.ndim > 1 else grid
        yield step
        x = step.x_next


def _chosen(answer: Answer, proposal: Tensor) -> tuple[Tensor | None, Tensor]:
    """What `on_step` said, as (index, state)."""
    if isinstance(answer, tuple):
        return answer
    if answer is None:
        return None, proposal
    return (answer, proposal[answer]) if _is_index(answer) else (None, answer)


def _is_index(answer: Tensor) -> bool:
    """An index has one axis of whole numbers; a state has a batch axis and at least one more."""
    return answer.ndim == 1 and not answer.is_floating_point()


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    kernel: Kernel | Solver,
    gen: Generator | None = None,
    cond: Encoded | None = None,
) -> Tensor:
    """The end of a trajectory from pure noise, without gradient."""
    x = denoiser.process.start(noise, rows(times[0], len(noise)).to(noise.device))
    with torch.no_grad():
        for step in trajectory(denoiser, kernel, x, times, cond, gen):
            x = step.x_next
    return x
