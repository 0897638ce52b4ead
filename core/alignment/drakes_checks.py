"""Closed-form checks of DRAKES (`limbeck verify drakes`): its path KL, its gradient, and reward against KL on words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.alignment import config as settings
from limbeck.core.alignment.backprop import Ascent, Terms, backpropagate
from limbeck.core.alignment.tuning import Tuning
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Denoiser, Model
from limbeck.core.diffusion.discrete import MaskProcess, TokenNetwork, soft_rows
from limbeck.core.diffusion.sampling import mask, trajectory
from limbeck.core.distillation.source import Source
from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.rewards.config import Judging
from limbeck.core.rewards.panel import Judge, Panel
from limbeck.core.rewards.toy import LENGTH, MASK, Words, Writer, soft_letters
from limbeck.core.run.checks import Check
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.players import Player
from limbeck.core.run.rng import Draws, generator
from limbeck.core.run.trainer import Trainer
from limbeck.core.scheduled import Scheduled

STEPS = 16
OPTIM = OptimConfig(kind="adam", lr=1e-3, weight_decay=0.0, clip=1.0)


class Student(nn.Module):
    """A denoiser as the reward methods want it."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser


def drakes(
    steps: int = STEPS,
    last: int = STEPS,
    tau: float = 1.0,
    kl: Scheduled = 1.0,
    kl_steps: Literal["last", "all"] = "last",
    kl_through: bool = False,
    remat: bool = True,
) -> settings.Drakes:
    """Settings of sixteen steps, all of them soft, unless told otherwise."""
    walk = settings.TokenWalk(steps=steps)
    return settings.Drakes(
        optim=OPTIM, walk=walk, last=last, tau=tau, kl=kl, kl_steps=kl_steps, kl_through=kl_through, remat=remat
    )


def tuning(student: Denoiser, reference: Denoiser, reward: Reward, length: int, optim: OptimConfig = OPTIM) -> Tuning:
    """A student, its frozen reference and a reward that judges itself."""
    model = Model(reference.requires_grad_(False), (length,), Identity(), lambda prompts: {}, "check")
    held, panel = Student(student.requires_grad_(True)), Panel(((reward, 1.0),), Identity())
    judge = Judge(Judging(every=10**9, patience=None), panel)
    return Tuning(Source(model, held, None, {}), panel, judge, Player("student", held, optim, 1))


def terms(made: Tuning, config: settings.Drakes, batch: int, step: int = 0) -> Terms:
    """The loss terms of one step."""
    return backpropagate(made, config, Context(step, "check", Draws(0, step, batch), 1, 0, torch.device("cpu")))


def linear(values: Tensor) -> Reward:
    """sum_v x[l,v] values[v] of rows [B,L,V]."""

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return (x[..., : len(values)] * values.to(x)).sum((1, 2))

    return Reward(score, "linear", "onehot", differentiable=True, accepts_soft=True)


class Biases(nn.Module):
    """The same logits [V] whatever the state."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.logits.expand(*x.shape[:2], -1)


def coin(logits: Tensor) -> TokenNetwork:
    """One letter drawn by softmax(logits)."""
    return TokenNetwork(Biases(logits), MaskProcess(len(logits)))


def one_letter(seed: str) -> Tensor:
    """Logits of four letters."""
    return 1.5 * torch.randn(4, generator=generator(0, seed, 0), dtype=torch.float64)


def letter_kl(steps: int, batch: int = 20_000) -> tuple[float, float]:
    """(mean path KL of one letter drawn in that many hard steps, the KL of its two laws)."""
    logits = one_letter("check.drakes.student"), one_letter("check.drakes.reference")
    made = tuning(coin(logits[0]), coin(logits[1]), linear(torch.zeros(4)), 1)
    config = drakes(steps, last=1, kl_steps="all")
    p, q = (torch.log_softmax(each, 0) for each in logits)
    return float(terms(made, config, batch)["kl"].detach()), float((p.exp() * (p - q)).sum())


def perturbed(std: float = 0.5) -> Writer:
    """A writer away from its teacher."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        writer = Writer(Words())
        nn.init.normal_(next(writer.net[-1].parameters()), std=std)
    return writer


@torch.no_grad()
def law(writer: Denoiser, count: int = 20_000) -> Tensor:
    """The law over the 81 words of hard walks."""
    x, gen = torch.full((count, LENGTH), MASK), generator(0, "check.drakes.law", 0)
    for step in trajectory(writer, mask(), x, torch.linspace(1, 0, STEPS + 1), None, gen):
        x = step.x_next
    return Words().law(x)


def divergence(found: Tensor) -> float:
    """KL of a law over the 81 words from the teacher's."""
    return float((found * (found.clamp_min(1e-300) / Words().table).log()).sum())


def words_kl(batch: int = 4000) -> float:
    """The mean path KL of a perturbed writer, over hard states."""
    made = tuning(perturbed(), Words().teacher(), soft_letters(), LENGTH)
    return float(terms(made, drakes(last=1, kl_steps="all"), batch)["kl"].detach())


@torch.no_grad()
def revealed_kl(batch: int = 4000) -> float:
    """The authors' form on hard states: the gap of the two laws times the chance that a token is revealed, no dt."""
    writer, reference, total = perturbed(), Words().teacher(), 0.0
    x, gen = torch.full((batch, LENGTH), MASK), generator(0, "check.drakes.revealed", 0)
    for step in trajectory(writer, mask(), x, torch.linspace(1, 0, STEPS + 1), None, gen):
        p, q = step.pred.logp_x0, reference.predict(step.x, step.t, {}).logp_x0  # type: ignore[attr-defined]
        rows, gap = soft_rows(step.x, MASK), p.exp() * (p - q) - p.exp() + q.exp()
        total += float(((1 - rows[..., -1:]) * rows[..., :-1] * gap).sum((1, 2)).mean())
        x = step.x_next
    return total


def path_kl() -> list[Check]:
    """Exact for one letter whatever the number of steps; a bound for words; the authors' form sees nothing."""
    found = {steps: letter_kl(steps) for steps in (16, 128)}
    return [
        *(
            Check(f"one letter in {steps} steps against its KL of {exact:.3f}", abs(path / exact - 1), 0.05, "<=")
            for steps, (path, exact) in found.items()
        ),
        Check("path KL of words over that of their laws", words_kl() / divergence(law(perturbed())), 1.0, ">="),
        Check("the form that counts revealed tokens, on hard states", abs(revealed_kl()), 0.0, "<="),
    ]


def slope(tau: float, steps: int = 1, batch: int = 50_000) -> tuple[float, float]:
    """(cosine, ratio of norms) of the gradient through soft steps and the exact one of E r, for one letter."""
    logits, values = one_letter("check.drakes.student"), one_letter("check.drakes.values")
    made = tuning(coin(logits), coin(logits), linear(values), 1)
    config = drakes(steps, steps, tau, kl=0.0)
    (found,) = torch.autograd.grad(-terms(made, config, batch)["reward"], list(made.player.tensors))
    p = torch.softmax(logits, 0)
    exact = p * (values - (p * values).sum())
    return float(torch.cosine_similarity(found, exact, 0)), float(found.norm() / exact.norm())


def gradient() -> list[Check]:
    """Soft draws hardly turn the gradient, less the colder they are, and a choice counts once, not once a step."""
    found = {tau: slope(tau) for tau in (1.0, 0.5, 0.1)}
    bounds = {1.0: (0.97, 0.4), 0.5: (0.99, 0.2), 0.1: (0.999, 0.05)}
    out = []
    for tau, (cosine, ratio) in found.items():
        out.append(Check(f"cosine with the exact gradient, tau {tau}", cosine, bounds[tau][0], ">="))
        out.append(Check(f"ratio of norms against 1, tau {tau}", abs(ratio - 1), bounds[tau][1], "<="))
    cosine, ratio = slope(1.0, STEPS, 20_000)
    out.append(Check("cosine through sixteen steps", cosine, 0.97, ">="))
    out.append(Check("ratio of norms through sixteen steps", ratio, 1.2, "<="))
    return out


@dataclass(frozen=True)
class End:
    """What a run ended at: E r, KL from the teacher, and the least KL that this E r costs."""

    reward: float
    kl: float
    least: float


def tuned(kl: float, iterations: int = 60, lr: float = 5e-3, batch: int = 128) -> Tensor:
    """The law over the 81 words after tuning a writer with DRAKES."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        writer = Writer(Words())
    made = tuning(writer, Words().teacher(), soft_letters(), LENGTH, OPTIM.model_copy(update={"lr": lr}))
    config = drakes(kl=kl)
    objective = Ascent(made, lambda ctx: backpropagate(made, config, ctx))
    Trainer(objective, Team("cpu"), 0, "check.drakes", iterations, batch).run()
    return law(writer)


def end(found: Tensor) -> End:
    """A law over the 81 words, measured; the least KL is that of the tilt with the same E r."""
    words = Words()
    reward = float((found * words.reward).sum())
    low, high = 1e-2, 1e2
    for _ in range(60):
        beta = (low * high) ** 0.5
        low, high = (beta, high) if float((words.tilt(beta) * words.reward).sum()) > reward else (low, beta)
    return End(reward, divergence(found), divergence(words.tilt(high)))


def trade_off() -> list[Check]:
    """E r rises from -.130 as the price falls, for little more KL than it must cost; at no price one word is left."""
    found = {kl: end(tuned(kl)) for kl in (0.3, 0.1, 0.03, 0.0)}
    rewards = [each.reward for each in found.values()]
    rises = [b - a for a, b in zip(rewards, rewards[1:], strict=False)]
    return [
        Check("E r at a price of .3", rewards[0], 0.3, ">="),
        Check("least rise of E r as the price falls", min(rises), 0.0, ">="),
        Check("E r at a price of .1", rewards[1], 1.0, ">="),
        Check("most KL above the least for its E r", max(e.kl - e.least for e in found.values()), 0.5, "<="),
        Check("at no price, E r against the best of 2.018", abs(rewards[-1] - 2.018), 0.02, "<="),
    ]
