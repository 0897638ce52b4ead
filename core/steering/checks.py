"""Closed-form checks of steering (`limbeck verify`): exact tilts of words and of Gaussian mixtures, ReNO's norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Prediction
from limbeck.core.diffusion.discrete import MaskProcess
from limbeck.core.diffusion.mixture import GaussianMixture, TokenTable
from limbeck.core.diffusion.process import VP
from limbeck.core.diffusion.sampling import Kernel, Step, ddim, first_hitting, mask, trajectory
from limbeck.core.rewards.toy import LENGTH, MASK, Words, variation
from limbeck.core.run.checks import Check
from limbeck.core.run.rng import generator
from limbeck.core.steering.gradient import GradientGuided
from limbeck.core.steering.noise import Ascent, off_shell, optimise
from limbeck.core.steering.particles import Potential, Scheme, Steered, Steering, Twisted, best_of, importance, steer
from limbeck.core.steering.value import Choice, lookahead, plug_in, select

TIMES = torch.linspace(1, 0, LENGTH + 1)  # one letter a step
TOTAL = 16_000


def masked(n: int) -> Tensor:
    """n words of masks alone [n,4]."""
    return torch.full((n, LENGTH), MASK)


def words_steered(
    n: int, potential: Potential = "difference", exact: bool = True, scheme: Scheme = "systematic",
    twist: bool = False, total: int = TOTAL,
) -> tuple[float, Steered]:  # fmt: skip
    """Total variation of FK-steered words from the exact tilt, with the exact soft value or one drawn guess."""
    words, gen = Words(), generator(0, "check.fk", 0)
    teacher = words.teacher()

    def exact_value(step: Step) -> Tensor:
        return words.value(teacher, step.x)

    def soft_value(pred: Prediction) -> Tensor:
        post = teacher.posterior(pred.x_t, pred.t, {})
        return words.beta * torch.log(post @ torch.exp(words.reward / words.beta))

    denoiser: Denoiser = Twisted(teacher, soft_value, words.beta) if twist else teacher
    value = exact_value if exact else plug_in(words.score, words.beta, 1, gen)
    settings = Steering(n, words.beta, potential, scheme)
    out = steer(denoiser, first_hitting(), masked(total // n * n), TIMES, settings, value, words.score, None, gen)
    return variation(words.law(out.x), words.tilt()), out


def words_selected(candidates: int, choice: Choice = "sample", exact: bool = True, n: int = 8_000) -> Tensor:
    """The law of words selected by SVDD, over the 81."""
    words, gen = Words(), generator(0, "check.svdd", 0)
    teacher = words.teacher()

    def value(x: Tensor, s: Tensor, cond: Encoded) -> Tensor:
        return words.score(x) if bool((s <= 0).all()) else words.value(teacher, x)

    used = value if exact else lookahead(teacher, words.score, words.beta)
    x = select(teacher, first_hitting(), masked(n), TIMES, used, candidates, words.beta, None, gen, choice)
    return words.law(x)


@dataclass(frozen=True)
class Hills:
    """Two Gaussian hills on a line and the reward c x: the tilt has means m + s^2 c/T and known weights."""

    c: float = 1.0
    temperature: float = 1.0
    std: float = 0.5

    def teacher(self) -> GaussianMixture:
        """The exact denoiser of .7 N(-1, s^2) + .3 N(1, s^2)."""
        return GaussianMixture(torch.tensor([[-1.0], [1.0]]), self.std, VP("cosine"), [0.7, 0.3])

    def tilt(self) -> tuple[Tensor, Tensor]:
        """Means [2] and weights [2] of the tilted mixture."""
        means, push = torch.tensor([-1.0, 1.0], dtype=torch.float64), self.c / self.temperature
        weights = torch.tensor([0.7, 0.3], dtype=torch.float64) * torch.exp(means * push)
        return means + self.std**2 * push, weights / weights.sum()

    def mean(self) -> float:
        """E x under the tilt."""
        means, weights = self.tilt()
        return float(means @ weights)


def hills_steered(n: int, twist: bool = False, steps: int = 60, total: int = 16_384) -> Tensor:
    """x [total,1] of the hills, steered by c x0_hat."""
    hills, gen = Hills(), generator(0, "check.hills", 0)
    teacher: Denoiser = hills.teacher()

    def value(pred: Prediction) -> Tensor:
        return hills.c * pred.x0[:, 0]

    denoiser = Twisted(teacher, value, hills.temperature) if twist else teacher
    x, times = torch.randn(total, 1, generator=gen), torch.linspace(0.999, 0, steps + 1)
    settings = Steering(n, hills.temperature)
    plain = (lambda step: value(denoiser.plain)) if isinstance(denoiser, Twisted) else (lambda step: value(step.pred))
    return steer(denoiser, ddim(1.0), x, times, settings, plain, lambda x: hills.c * x[:, 0], None, gen).x


def fk_tilt() -> list[Check]:
    """FK steering reaches the exact tilt; more particles come nearer; every potential and scheme agrees."""
    exact = words_steered(64)[0]
    few = words_steered(4)[0]
    return [
        Check("words, exact values, 64 particles: total variation", exact, 0.04, "<="),
        Check("4 particles over 64", few / exact, 5.0, ">="),
        Check("words, one guess, difference", words_steered(64, exact=False)[0], 0.07, "<="),
        Check("words, one guess, max", words_steered(64, "max", exact=False)[0], 0.08, "<="),
        Check("words, residual resampling", words_steered(64, scheme="residual")[0], 0.04, "<="),
        Check("hills: mean against the tilt's", abs(float(hills_steered(128).mean()) - Hills().mean()), 0.1, "<="),
    ]


def twisted_tilt() -> list[Check]:
    """Twisted proposals are as exact, and need fewer particles."""
    plain, moved = words_steered(4)[0], words_steered(4, twist=True)[0]
    hills = abs(float(hills_steered(16, twist=True).mean()) - Hills().mean())
    return [
        Check("words, 64 particles: total variation", words_steered(64, twist=True)[0], 0.04, "<="),
        Check("4 twisted over 4 plain particles", moved / plain, 0.7, "<="),
        Check("hills, 16 particles: mean against the tilt's", hills, 0.1, "<="),
    ]


@dataclass(frozen=True)
class Pairs:
    """Two independent letters of three and a reward that is a sum over letters: tilted by itself, each stays alone."""

    teacher: Denoiser
    single: Tensor  # p of each letter [2,3]
    reward: Tensor  # of each letter [2,3]

    @classmethod
    def of(cls) -> Pairs:
        """The pair of the check."""
        single = torch.softmax(torch.tensor([[0.3, 0.1, -0.5], [0.0, 1.0, 0.2]], dtype=torch.float64), 1)
        reward = torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.7, -0.6]], dtype=torch.float64)
        return cls(TokenTable(single[0][:, None] * single[1], MaskProcess(3)), single, reward)

    def linear(self, rows: Tensor) -> Tensor:
        """r [B] of rows [B,2,3]."""
        return (rows.double() * self.reward).sum((1, 2))

    def tilt(self, scale: float) -> Tensor:
        """p e^(scale r) over the nine."""
        one, two = torch.softmax(self.single.log() + scale * self.reward, 1)
        return (one[:, None] * two).flatten()

    def guided(self, scale: float, kernel: Kernel, n: int = 40_000) -> Tensor:
        """The law of pairs drawn under classifier guidance, over the nine."""
        gen, x = generator(0, "check.cg", 0), torch.full((n, 2), 3)
        for step in trajectory(
            GradientGuided(self.teacher, self.linear, scale), kernel, x, torch.linspace(1, 0, 9), gen=gen
        ):
            x = step.x_next
        return torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9).double() / n


def cg_tilt() -> list[Check]:
    """Classifier guidance is exact where its first order is: a linear reward on independent letters."""
    pairs = Pairs.of()
    return [
        Check("scale 0: from the model", variation(pairs.guided(0.0, mask()), pairs.tilt(0)), 0.01, "<="),
        Check("scale 2: from the tilt", variation(pairs.guided(2.0, mask()), pairs.tilt(2)), 0.01, "<="),
        Check("one letter a step", variation(pairs.guided(2.0, first_hitting()), pairs.tilt(2)), 0.01, "<="),
        Check("the model from the tilt", variation(pairs.tilt(0), pairs.tilt(2)), 0.2, ">="),
    ]


def svdd_tilt() -> list[Check]:
    """SVDD with exact values comes to the tilt as M grows; argmax collapses; M = 1 is the model itself."""
    words = Words()
    laws = {m: words_selected(m) for m in (1, 5, 20)}
    greedy = words_selected(10, "argmax")
    return [
        Check("M = 1: total variation from the model", variation(laws[1], words.table), 0.05, "<="),
        Check("M = 5: from the tilt", variation(laws[5], words.tilt()), 0.24, "<="),
        Check("M = 20: from the tilt", variation(laws[20], words.tilt()), 0.08, "<="),
        Check("argmax of 10: from the tilt", variation(greedy, words.tilt()), 0.5, ">="),
    ]


def simple_choices() -> list[Check]:
    """Importance sampling among many is the tilt; the best of n has a higher reward than a draw."""
    words, gen = Words(), generator(0, "check.choices", 0)
    x = words.teacher().sample(4 * TOTAL, gen)
    drawn = x[importance(words.score(x), 64, words.beta, gen, keep=16).flatten()]
    best = words.score(x[best_of(words.score(x), 4)]).mean()
    order = (words.reward.argsort(), words.reward.sort().values)
    below = words.table[order[0]].cumsum(0)
    expected = float(((below**4 - (below - words.table[order[0]]) ** 4) * order[1]).sum())
    return [
        Check("importance sampling, 64: total variation", variation(words.law(drawn), words.tilt()), 0.08, "<="),
        Check("best of 4: mean reward against the exact one", abs(float(best) - expected), 0.02, "<="),
    ]


def reno_norm() -> list[Check]:
    """ReNO's regulariser alone brings |z| to sqrt(d - 1); with a reward it is climbed and the norm stays."""
    z = torch.randn(4, 256, generator=generator(0, "check.reno", 0), dtype=torch.float64)
    end = settled(off_shell, 3 * z)
    found = optimise(lambda z: -((z.sum(1) / 16 - 2) ** 2), z, Ascent())
    drift = found.noise.norm(dim=1) / z.norm(dim=1) - 1
    return [
        Check("norm against sqrt(d - 1)", float((end.norm(dim=1) - 255**0.5).abs().max()), 1e-3, "<="),
        Check("what is left of the reward's distance from its best", float(found.reward.min()), -0.01, ">="),
        Check("largest change of a noise's norm", float(drift.abs().max()), 0.05, "<="),
    ]


def settled(regulariser: Callable[[Tensor], Tensor], z: Tensor, steps: int = 400, lr: float = 0.2) -> Tensor:
    """z [B,*S] after plain descent of a regulariser."""
    for _ in range(steps):
        z = z.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(regulariser(z).sum(), z)
        z = z - lr * slope
    return z.detach()
