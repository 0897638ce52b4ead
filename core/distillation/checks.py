"""Closed-form checks of the distillation methods (`limbeck verify`); the tests call them on wrong variants too.

All but ring4 is float64 by quadrature, with exact critics; ring4 trains nets on one thread.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Prediction
from limbeck.core.diffusion.guidance import combine
from limbeck.core.diffusion.process import EDM, VP, Process
from limbeck.core.diffusion.time import weight
from limbeck.core.distillation.matching import implicit_loss
from limbeck.core.distillation.operators import (
    DIVERGENCES,
    asd,
    auto_bsd,
    bsd,
    csd,
    dmd,
    dot,
    sds,
    surrogate,
    vsd,
)
from limbeck.core.distillation.toy import draw, exact, row
from limbeck.core.run.build import Build
from limbeck.core.run.checks import Check
from limbeck.core.run.distributed import Team
from limbeck.core.run.recipe import load
from limbeck.core.run.rng import generator
from limbeck.core.run.trainer import Trainer

Branches = dict[str, Prediction | Tensor]
Residual = Callable[[Branches], Tensor]
Guide = Callable[[Prediction, Prediction, float], Prediction]
GUIDANCE = 4.5


def normal(m: Tensor | float, s: Tensor | float, x_t: Tensor, t: Tensor, process: Process) -> Prediction:
    """The exact denoiser of N(m, s^2) at x_t [N, 1]."""
    alpha, sigma = process.coefficients(t, x_t)
    return Prediction(sigma * (x_t - alpha * m) / (alpha**2 * s**2 + sigma**2), x_t, t, process, "eps")


def hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [n] of the standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


@dataclass
class Line:
    """A 1-D student mu + s z with the quadrature of (z, eps), and one time with alpha .8, sigma .6."""

    nodes: int = 12
    mu: float = -1.0
    s: float = 1.2
    process: Process = field(default_factory=lambda: VP("cosine"))
    guided: Guide = combine

    def __post_init__(self) -> None:
        n, w = hermite(self.nodes)
        self.z, self.eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(n, n, indexing="ij"))
        self.w = torch.outer(w, w).reshape(-1)
        self.t = self.process.t_of_ratio(torch.full_like(self.w, 0.75))
        self.theta = torch.tensor([self.mu, self.s], dtype=torch.float64, requires_grad=True)

    def sample(self) -> Tensor:
        """x [N, 1] with its graph."""
        return self.theta[0] + self.theta[1] * self.z

    def branches(self, x: Tensor, guidance: float = 1.0, critic_guidance: float = 1.0) -> Branches:
        """Exact predictions at x_t: class N(1, .5^2), unconditional N(0, 1), critic of the student itself."""
        x_t = self.process.add_noise(x, self.eps, self.t)
        mu, s = self.theta.detach()
        cond, uncond = (normal(m, d, x_t, self.t, self.process) for m, d in ((1.0, 0.5), (0.0, 1.0)))
        own = normal(mu, s, x_t, self.t, self.process)
        teacher, critic = self.guided(cond, uncond, guidance), combine(own, uncond, critic_guidance)
        return {"x": x, "eps": self.eps, "cond": cond, "uncond": uncond, "teacher": teacher, "critic": critic}

    def step(self, residual: Residual, lr: float, guidance: float = 1.0, critic_guidance: float = 1.0) -> None:
        """One gradient step of the expected sigma^2 r."""
        x = self.sample()
        r = residual(self.branches(x.detach(), guidance, critic_guidance))
        w = self.w * weight("sigma2", self.process, self.t)
        (gradient,) = torch.autograd.grad(surrogate(x, r, w, b_global=1), self.theta)
        self.theta.data.sub_(lr * gradient)

    def descend(
        self, residual: Residual, steps: int = 200, lr: float = 0.5, guidance: float = 1.0, critic_guidance: float = 1.0
    ) -> tuple[float, float]:
        """(mean, standard deviation) of the student at the end."""
        for _ in range(steps):
            self.step(residual, lr, guidance, critic_guidance)
        mean, std = self.theta.tolist()
        return mean, abs(std)


def sds_csd_identity(guided: Guide = combine) -> list[Check]:
    """SDS(g) - SDS(1) = (g - 1) CSD, which a convention that is off by one breaks."""
    line = Line(guided=guided)
    x = line.sample().detach()
    high, low = (line.branches(x, guidance=g) for g in (7.5, 1.0))
    gap = sds.on(high) - sds.on(low) - 6.5 * csd.on(low)
    return [Check("SDS(7.5) - SDS(1) - 6.5 CSD", float(gap.abs().max()), 1e-13, "<=")]


def fixed_points(residual: Residual = vsd.on, critic_guidance: float = 1.0) -> list[Check]:
    """VSD with an exact critic ends at the teacher (1, .5); SDS at its mode (1, 0)."""
    mean, std = Line().descend(residual, critic_guidance=critic_guidance)
    mode, spread = Line().descend(sds.on)
    return [
        Check("VSD mean from 1", abs(mean - 1), 1e-4, "<="),
        Check("VSD std from .5", abs(std - 0.5), 1e-4, "<="),
        Check("SDS mean from 1", abs(mode - 1), 1e-4, "<="),
        Check("SDS std from 0", spread, 1e-3, "<=", "one point: why sds alone is no generator"),
    ]


def swiftbrush_guidance(critic_guidance: float = GUIDANCE) -> list[Check]:
    """Same guidance on teacher and critic: no gradient at the teacher; the fixed point is the unguided class."""
    at_teacher = Line(mu=1.0, s=0.5)
    both = at_teacher.branches(at_teacher.sample().detach(), GUIDANCE, critic_guidance)
    mean, std = Line().descend(vsd.on, guidance=GUIDANCE, critic_guidance=critic_guidance)
    return [
        Check("gradient at student = teacher", float((at_teacher.w[:, None] * vsd.on(both).abs()).sum()), 1e-12, "<="),
        Check("mean from 1", abs(mean - 1), 1e-3, "<="),
        Check("std from .5", abs(std - 0.5), 1e-3, "<="),
    ]


@dataclass
class Mixture1d:
    """A 1-D Gaussian mixture noised by sigma (VE): log density, score and denoiser, differentiable."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def log_p(self, x: Tensor, sigma: float) -> Tensor:
        """log density of x + sigma eps."""
        parts = [
            np.log(w) - 0.5 * ((x - m) ** 2 / (s * s + sigma * sigma) + np.log(2 * np.pi * (s * s + sigma * sigma)))
            for w, m, s in zip(self.weights, self.means, self.stds, strict=True)
        ]
        return torch.logsumexp(torch.stack(parts), 0)

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x] by responsibilities."""
        variance = torch.tensor(self.stds, dtype=x.dtype) ** 2
        means, total = torch.tensor(self.means, dtype=x.dtype), variance + sigma**2
        log_weights = torch.tensor(self.weights, dtype=x.dtype).log()
        logits = log_weights - 0.5 * ((x[..., None] - means) ** 2 / total + total.log())
        return (logits.softmax(-1) * (variance * x[..., None] + sigma**2 * means) / total).sum(-1)


TEACHER = Mixture1d((0.35, 0.65), (-1.5, 1.0), (0.5, 0.7))


def divergence_weights() -> list[Check]:
    """The gradient of int q f(p/q) is -E_q[h(r) (s_p - s_q) dx/dtheta] for all eight divergences."""
    return [Check(name, divergence_error(name, DIVERGENCES[name].h), 1e-6, "<=") for name in DIVERGENCES]


def divergence_error(name: str, h: Callable[[Tensor], Tensor], sigma: float = 0.8) -> float:
    """Relative error of the score form against autograd, on a grid, for a student N(.4, .6^2)."""
    x = torch.linspace(-9, 9, 6001, dtype=torch.float64)
    theta = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)

    def log_q(at: Tensor) -> Tensor:
        total = theta[1] ** 2 + sigma**2
        return -0.5 * ((at - theta[0]) ** 2 / total + torch.log(2 * torch.pi * total))

    r = torch.exp(TEACHER.log_p(x, sigma) - log_q(x))
    (exact,) = torch.autograd.grad((log_q(x).exp() * DIVERGENCES[name].f(r)).sum(), theta)
    at = x.clone().requires_grad_(True)
    (score_p,) = torch.autograd.grad(TEACHER.log_p(at, sigma).sum(), at)
    (score_q,) = torch.autograd.grad(log_q(at).sum(), at)
    mu, s = theta.detach()
    moves = torch.stack([torch.ones_like(x), s * (x - mu) / (s**2 + sigma**2)])  # E[dx/dtheta | x_t]
    scored = -(log_q(x).exp() * h(r) * (score_p - score_q) * moves).sum(1).detach()
    return float((scored - exact).norm() / exact.norm())


def sim_identity(c: float = 0.5, detach_x_t: bool = False, detach_nets: bool = False) -> list[Check]:
    """SIM's loss has the gradient of E d(s_student - s_teacher) at fixed points; both detached variants have not."""
    error = sim_error(c, detach_x_t, detach_nets)
    return [Check(f"gradient against the direct derivative, c = {c}", error, 1e-5, "<=")]


def sim_error(c: float, detach_x_t: bool, detach_nets: bool, sigma: float = 0.8, nodes: int = 80) -> float:
    """Relative error of SIM's gradient for a student N(.4, .6^2) with the exact critic, VE."""
    n, w = hermite(nodes)
    z, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(n, n, indexing="ij"))
    weights = torch.outer(w, w).reshape(-1)
    theta = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)
    process = EDM()
    t = process.t_of_ratio(torch.full_like(weights, sigma))

    def student(x_t: Tensor, at: Tensor) -> Tensor:
        return (at[1] ** 2 * x_t + sigma**2 * at[0]) / (at[1] ** 2 + sigma**2)

    def pair(x_t: Tensor) -> tuple[Prediction, Prediction]:
        teacher = TEACHER.denoise(x_t, sigma)
        return tuple(Prediction(d, x_t, t, process, "x0") for d in (teacher, student(x_t, theta.detach())))  # type: ignore[return-value]

    x = theta[0] + theta[1] * z
    x_t = (x.detach() if detach_x_t else x) + sigma * eps
    teacher, critic = pair(x_t)
    if detach_nets:
        teacher, critic = teacher.detach(), critic.detach()
    (found,) = torch.autograd.grad((weights * implicit_loss(x, teacher, critic, c)).sum(), theta)
    fixed = x_t.detach()
    y = student(fixed, theta) - TEACHER.denoise(fixed, sigma)
    (exact,) = torch.autograd.grad((weights * (torch.sqrt(y.square().flatten() + c**2) - c)).sum(), theta)
    return float((found - exact).norm() / exact.norm())


def asd_shift(shift: float = 0.1, shared: bool = True) -> list[Check]:
    """ASD on a point mass: the noise cancels and w(t) (alpha/sigma - alpha2/sigma2)(x - mu) is left, pulling to mu."""
    process = VP("linear")
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64).repeat_interleave(64)
    t2 = t + shift * t
    gen = torch.Generator().manual_seed(0)
    x, eps, other = (torch.randn(len(t), 1, generator=gen, dtype=torch.float64) for _ in range(3))
    mu = 0.3
    now, later = (
        normal(mu, 0.0, process.add_noise(x, noise, time), time, process)
        for time, noise in ((t, eps), (t2, eps if shared else other))
    )
    r = asd(now, later)
    factor = (1 / process.ratio(t) - 1 / process.ratio(t + 0.1 * t))[:, None]
    errors = [asd_noise_error(time) for time in (0.05, 0.2, 0.5, 0.8)]
    falls = max(b / a for a, b in zip(errors, errors[1:], strict=False))
    return [
        Check("coefficient", float((r - factor * (x - mu)).abs().max()), 1e-12, "<="),
        Check("pull towards the teacher", float((r * (x - mu)).min()), 0.0, ">="),
        Check("noise error, later over earlier", falls, 0.5, "<=", "why the larger t can be the critic"),
    ]


def asd_noise_error(t: float, std: float = 0.05) -> float:
    """E |eps_hat - eps|^2 of the exact denoiser of N(0, std^2), by quadrature."""
    process, n, w = VP("linear"), *hermite(20)
    x, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(std * n, n, indexing="ij"))
    time = torch.full((len(x),), t, dtype=torch.float64)
    guess = normal(0.0, std, process.add_noise(x, eps, time), time, process)
    return float((torch.outer(w, w).reshape(-1) * dot(guess.eps - eps, guess.eps - eps)).sum())


def _pair(cond: Tensor, uncond: Tensor) -> tuple[Prediction, Prediction]:
    process, t = VP("cosine"), torch.full((len(cond),), 0.4, dtype=cond.dtype)
    return tuple(Prediction(eps, torch.zeros_like(eps), t, process, "eps") for eps in (cond, uncond))  # type: ignore[return-value]


def kkt_violation(d: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
    """<d, g_i> >= |d|^2 must hold at the min-norm point d [B, *S] of [g1, g2]; violation over the pair's size."""
    size = torch.maximum(dot(g1, g1), dot(g2, g2))
    return torch.maximum(dot(d, d) - dot(d, g1), dot(d, d) - dot(d, g2)) / size


def bsd_minimum(combine_pair: Callable[[Tensor, Tensor], Tensor] | None = None) -> list[Check]:
    """BSD's direction is the min-norm point of its pair: KKT on 1000 random pairs, and the limits of the card."""
    direction = combine_pair or _bsd_of
    gen = torch.Generator().manual_seed(0)
    g1, g2 = (torch.randn(1000, 3, 4, generator=gen, dtype=torch.float64) for _ in range(2))
    g1 = g1 * torch.logspace(-2, 2, 1000, dtype=torch.float64).view(-1, 1, 1)
    one = g2[:8]
    limits = [direction(0 * one, one), direction(one, one) - one, direction(-one, one)]
    names = ("g1 = 0 gives 0", "g1 = g2 gives g2", "opposite vectors give 0")
    worst = float(kkt_violation(direction(g1, g2), g1, g2).max())
    return [
        Check("KKT violation, 1000 pairs", worst, 1e-12, "<="),
        *(Check(name, float(d.abs().max()), 1e-12, "<=") for name, d in zip(names, limits, strict=True)),
        Check("auto: KKT violation, 1000 pairs", _auto_bsd_violation(g1, g2), 1e-12, "<="),
    ]


def _bsd_of(g1: Tensor, g2: Tensor) -> Tensor:
    """bsd with lambda 18 on predictions whose pair is (g1, g2)."""
    return bsd(*_pair(g2 + g1 / 18, g2))


def _auto_bsd_violation(g1: Tensor, g2: Tensor) -> float:
    """The pair of auto_bsd is eps_c - eps_u and 1.25 (eps_u - eps); its scale ||eps_u - eps|| sigma/50 is undone."""
    cond, uncond = _pair(g2 + g1, g2)
    eps = torch.full_like(g2, 0.1)
    noise = g2 - eps
    sigma = uncond.process.sigma(uncond.t)
    d = auto_bsd(cond, uncond, eps) / (sigma / 50 * dot(noise, noise).sqrt()).view(-1, 1, 1)
    return float(kkt_violation(d, g1, 1.25 * noise).max())


def dmd_normaliser(residual: Callable[[Tensor, Prediction, Prediction], Tensor] = dmd) -> list[Check]:
    """DMD's residual does not change when everything is scaled, and not with the rest of the batch."""
    gen = torch.Generator().manual_seed(0)
    x, real, fake = (torch.randn(16, 3, 4, 4, generator=gen, dtype=torch.float64) for _ in range(3))

    def at(scale: float, rows: slice = slice(None)) -> Tensor:
        process, t = VP("cosine"), torch.full((16,), 0.4, dtype=torch.float64)[rows]
        pair = [Prediction(scale * d[rows], x[rows], t, process, "x0") for d in (real, fake)]
        return residual(scale * x[rows], *pair)

    alone = torch.cat([at(1.0, slice(i, i + 1)) for i in range(16)])
    return [
        Check("scaling x and both predictions by 7", float((at(7.0) - at(1.0)).abs().max()), 1e-12, "<="),
        Check("a sample alone against in its batch", float((alone - at(1.0)).abs().max()), 1e-12, "<="),
    ]


def train_ring4(*sets: str) -> tuple[Build, Trainer]:
    """The recipe toy/ring4 with these settings, trained in this process on one thread, without a run folder."""
    recipe = load("toy/ring4", sets)
    build, threads = Build(recipe), torch.get_num_threads()
    objective = build.objective(recipe.stages[0])
    trainer = Trainer(objective, Team("cpu"), recipe.seed, recipe.stages[0].name, recipe.steps, recipe.batch)
    torch.set_num_threads(1)
    try:
        trainer.run()
    finally:
        torch.set_num_threads(threads)
    return build, trainer


def ring4(*sets: str) -> dict[str, float]:
    """The trained student's (EMA) energy distance, worst mode, spread within modes and standard deviation of all."""
    build, trainer = train_ring4(*sets)
    with trainer.objective.players["student"].ema_weights():
        x = draw(build, 4000, build.seed)
    found = row("student", x, exact(4000, generator(build.seed, "ring4.target", 0))[0])
    return {key: value for key, value in found.items() if isinstance(value, float)} | {"std": float(x.std(0).mean())}


def _matched(method: str, *sets: str) -> list[Check]:
    found = ring4(f"stages.0.losses.0.kind={method}", *sets)
    return [
        Check("energy distance", found["energy distance"], 0.02, "<="),
        Check("worst mode's share", found["worst mode"], 0.05, "<="),
        Check("spread within modes, from .4", abs(found["spread"] - 0.4), 0.1, "<="),
    ]


def ring4_swiftbrush() -> list[Check]:
    """In VP, as the paper: its weight sigma^2 would leave the small noise levels of VE almost out."""
    times = [f"stages.0.losses.0.{part}time={{kind: uniform, lo: 0.02, hi: 0.98}}" for part in ("", "critic.")]
    return _matched("swiftbrush", "teacher.process.kind=vp", "teacher.process.schedule=cosine", *times)


def ring4_dmd2() -> list[Check]:
    """With the adversary, on exact samples as data."""
    return _matched("dmd2")


def ring4_sim() -> list[Check]:
    """Gradient through the inputs of critic and exact teacher."""
    return _matched("sim")


def ring4_f_distill() -> list[Check]:
    """Jensen-Shannon, with the ratio learned by the head."""
    return _matched("f-distill")


def ring4_sds() -> list[Check]:
    """SDS alone must fail here: one point on one mode."""
    found = ring4("stages.0.losses.0.kind=score", "stages.0.losses.0.operator=sds", "steps=900")
    return [
        Check("energy distance (a failure is right)", found["energy distance"], 0.5, ">="),
        Check("standard deviation, 1.49 in the data", found["std"], 0.3, "<=", "collapsed to a point, as it must"),
    ]
