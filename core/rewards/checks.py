"""Closed-form checks of learned rewards (`limbeck verify`): a linear reward found again from noisy verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from limbeck.core.rewards.calibration import Measured, accuracy, calibration_error, measure, temperature
from limbeck.core.rewards.learned import BradleyTerry, Head, Scorers, draws_of
from limbeck.core.rewards.pairs import Pairs
from limbeck.core.run.checks import Check
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.distributed import Team
from limbeck.core.run.players import Player
from limbeck.core.run.rng import generator
from limbeck.core.run.trainer import Trainer

TRUTH = torch.tensor([1.0, -0.5, 0.75, 0.0, 0.25])


@dataclass
class LinearVerdicts:
    """Pairs of standard normal samples judged by sigmoid(r_a - r_b), r = TRUTH x; a share are ties, at random."""

    count: int = 4000
    measured: int = 20_000
    swapped: bool = False
    ties: float = 0.0
    table: dict[str, Pairs] = field(init=False)

    def __post_init__(self) -> None:
        sides = {"learn": self.count, "measure": self.measured}
        self.table = {side: self._drawn(n, generator(0, f"check.verdicts.{side}", 0)) for side, n in sides.items()}

    def _drawn(self, n: int, gen: Generator) -> Pairs:
        x = torch.randn(2, n, len(TRUTH), generator=gen)
        wins = torch.rand(n, generator=gen) < torch.sigmoid((x[0] - x[1]) @ TRUTH)
        order = torch.where((wins != self.swapped)[:, None], x, x.flip(0))
        tie, empty = torch.rand(n, generator=gen) < self.ties, [""] * n
        return Pairs(order[0], order[1], empty, torch.ones(n), tie, empty, empty, torch.arange(n))

    def pairs(self, n: int, gen: Generator, rows: slice, ties: bool = True) -> Pairs:
        """A draw with replacement."""
        return self._picked("learn", torch.randint(self.count, (n,), generator=gen)[rows])

    def held_out(self, start: int, stop: int) -> Pairs | None:
        """The pairs that measure."""
        rows = torch.arange(start, min(stop, self.measured))
        return self._picked("measure", rows) if len(rows) else None

    def _picked(self, side: str, rows: Tensor) -> Pairs:
        known, empty = self.table[side], [""] * len(rows)
        winner, loser, strength, tie = (getattr(known, k)[rows] for k in ("winner", "loser", "strength", "tie"))
        return Pairs(winner, loser, empty, strength, tie, empty, empty, rows)


def best_accuracy(scale: float, points: int = 20_001) -> float:
    """Bayes: E max(p, 1 - p) for p = sigmoid(g), g ~ N(0, 2 scale^2), by the trapezoid rule."""
    std = math.sqrt(2) * scale
    g = torch.linspace(-12 * std, 12 * std, points, dtype=torch.float64)
    density = torch.exp(-0.5 * (g / std) ** 2) / (std * math.sqrt(2 * math.pi))
    return float(torch.trapezoid(density * torch.sigmoid(g.abs()), g))


def learn(data: LinearVerdicts, members: int = 3, steps: int = 300, bootstrap: bool = True) -> Scorers:
    """Linear members trained by the objective itself."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Scorers([Head(len(TRUTH), 1, 0, 1) for _ in range(members)])
    weights = draws_of(data.count, members, 0) if bootstrap else None
    optim = OptimConfig(kind="adam", lr=0.05, decay="cosine", clip=None)
    made = BradleyTerry(model, data, Player("student", model, optim, steps), weights)
    Trainer(made, Team("cpu"), 0, "check", steps, 512).run()
    return model


def direction(model: nn.Module) -> float:
    """Cosine of the least aligned member with the truth."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    return min(float(torch.cosine_similarity(w[0].detach(), TRUTH, 0)) for w in weights)


def gap_of(found: Measured) -> Tensor:
    """The ensemble's r_w - r_l [b]."""
    return found.gap.mean(0)


def bradley_terry_line() -> list[Check]:
    """The direction, accuracy and sureness of what was learned; overconfidence and swapped verdicts are seen."""
    model, best = learn(LinearVerdicts()), best_accuracy(float(TRUTH.norm()))
    found = measure(model, LinearVerdicts(), 5000, torch.device("cpu"))
    z, tie = gap_of(found), found.tie
    wrong = measure(model, LinearVerdicts(swapped=True), 5000, torch.device("cpu"))
    return [
        Check("cosine of the worst member with the truth", direction(model), 0.95, ">="),
        Check("accuracy against Bayes'", abs(accuracy(z, tie) - best), 0.02, "<="),
        Check("fitted temperature against 1", abs(temperature(z, tie) - 1), 0.15, "<="),
        Check("calibration error", calibration_error(z, tie), 0.03, "<="),
        Check("calibration error when five times too sure", calibration_error(5 * z, tie), 0.1, ">="),
        Check("the temperature that is then fitted against 5", abs(temperature(5 * z, tie) - 5), 0.75, "<="),
        Check("accuracy on swapped verdicts", accuracy(gap_of(wrong), wrong.tie), 0.5, "<="),
        Check("temperature on swapped verdicts", temperature(gap_of(wrong), wrong.tie), 0.0, "<="),
    ]
