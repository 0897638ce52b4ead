"""Is a learned reward right, and does it know how sure it may be: accuracy, calibration error and temperature.

Everything is said of logits z [b] = s (r_w - r_l), the first sample being the preferred one, and of ties [b].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.rewards import config as settings
from limbeck.core.rewards.learned import Scorers, logits, scorers
from limbeck.core.rewards.pairs import PairData
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput

Row = dict[str, float | str]
STEEPEST = 1e4  # of 1/temperature, for rewards that are never wrong


def accuracy(z: Tensor, tie: Tensor) -> float:
    """The share of pairs that are ordered as the verdict says; ties are left out, equal rewards are half right."""
    z = z[~tie]
    return float(((z > 0).double() + (z == 0).double() / 2).mean())


def calibration_error(z: Tensor, tie: Tensor, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017) of sigmoid(r_a - r_b), in equal bins of confidence from 1/2 to 1.

    Confidence is that of the side the reward prefers, so that it matters not which sample stands first. A tie is half
    a success for either side, as in training.
    """
    sure = torch.sigmoid(z.double().abs())
    right = torch.where(tie, 0.5, (z > 0).double() + (z == 0).double() / 2)
    place = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, sure - right)
    return float(gaps.abs().sum() / len(z))


def temperature(z: Tensor, tie: Tensor) -> float:
    """T for which sigmoid(z / T) fits the verdicts best (least cross entropy), by bisection of its convex slope.

    1: as sure as it may be; above: overconfident; negative: it prefers the losers.
    """
    z, won = z.double(), torch.where(tie, 0.5, 1.0).double()
    low, high = -STEEPEST, STEEPEST
    for _ in range(80):
        middle = (low + high) / 2
        pull = won * torch.sigmoid(-middle * z) - (1 - won) * torch.sigmoid(middle * z)  # won - p, without rounding
        if float((pull * z).mean()) > 0:
            low = middle
        else:
            high = middle
    return 1 / high


@dataclass(frozen=True)
class Measured:
    """What the members said of b pairs, as gaps [M,b], beside the verdicts."""

    gap: Tensor
    strength: Tensor
    tie: Tensor
    axis: list[str]
    user: list[str]

    def rows(self, kind: str, label: str) -> Measured:
        """The pairs of one axis or of one user."""
        chosen = [i for i, found in enumerate(getattr(self, kind)) if found == label]
        axis, user = ([column[i] for i in chosen] for column in (self.axis, self.user))
        return Measured(self.gap[:, chosen], self.strength[chosen], self.tie[chosen], axis, user)

    def line(self, name: str, bins: int) -> Row:
        """One row of the table; disagreement is the members' standard deviation of sigmoid(gap)."""
        z, tie = logits(self.gap.mean(0), self.strength, self.tie), self.tie
        out: Row = {"pairs": name, "count": float(len(z)), "ties": float(tie.double().mean())}
        out |= {"accuracy": accuracy(z, tie), "calibration error": calibration_error(z, tie, bins)}
        apart = torch.sigmoid(self.gap).std(0, correction=0).mean()
        return out | {"temperature": temperature(z, tie), "disagreement": float(apart)}


@torch.no_grad()
def measure(model: Scorers, data: PairData, chunk: int, device: torch.device) -> Measured:
    """All held-out pairs, `chunk` at a time; BadInput when none of them has a winner."""
    gaps: list[Tensor] = []
    parts: list[tuple[Tensor, Tensor, list[str], list[str]]] = []
    while (part := data.held_out(chunk * len(parts), chunk * (len(parts) + 1))) is not None:
        gaps.append(model.gaps(part, device).double().cpu())
        parts.append((part.strength, part.tie, part.axes, part.users))
    if not parts or all(bool(tie.all()) for _, tie, _, _ in parts):
        raise BadInput("the metric preference measures on held-out pairs with a winner and there are none; add some")
    strength, tie = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    axis, user = [label for part in parts for label in part[2]], [label for part in parts for label in part[3]]
    return Measured(torch.cat(gaps, 1), strength, tie, axis, user)


def build(config: settings.Preference, build: Build) -> Callable[[], list[Row]]:
    """Factory of the metric preference: one row for all held-out pairs, then one an axis or user with a winner."""

    def table() -> list[Row]:
        found = measure(scorers(build.piece("student").eval()), build.piece("data"), config.chunk, build.device)
        lines = [found.line("all", config.bins)]
        for kind in config.by:
            for label in sorted(set(getattr(found, kind))):
                part = found.rows(kind, label)
                if not bool(part.tie.all()):
                    lines.append(part.line(f"{kind} {label or '(none)'}", config.bins))
        return lines

    return table
