"""Rewards learned from preferences (Bradley and Terry 1952): scorers, their training, calibration, and their use.

A scorer is any module (x [B,*S], cond) -> [B] or, one column an axis, [B,R]. Legend: M members, b pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.distillation.source import plain
from limbeck.core.rewards import config as settings
from limbeck.core.rewards.base import Condition
from limbeck.core.rewards.pairs import Pairs
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.core.run.players import Player, Single
from limbeck.core.run.rng import generator


class Head(nn.Module):
    """An MLP on flattened samples or features; without hidden layers a linear reward."""

    def __init__(self, inputs: int, width: int, depth: int, axes: int) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        hidden = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.SiLU())]
        self.inputs, self.net = inputs, nn.Sequential(*hidden, nn.Linear(sizes[-1], axes))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        """[B], or [B,R] for several axes; the condition is not read."""
        flat = x.flatten(1)
        if flat.shape[1] != self.inputs:
            raise BadInput(f"student.inputs: {self.inputs} numbers are expected, a sample has {flat.shape[1]}")
        out: Tensor = self.net(flat)
        return out[:, 0] if out.shape[1] == 1 else out


class Scorers(nn.Module):
    """Members that learn apart; `axes` names the columns of their answers (none: one number for every pair)."""

    def __init__(self, members: list[nn.Module], axes: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.members, self.axes = nn.ModuleList(members), axes

    def each(self, x: Tensor, cond: Condition) -> Tensor:
        """[M,B] or [M,B,R]."""
        return torch.stack([member(x, cond) for member in self.members])

    def gaps(self, pairs: Pairs, device: torch.device) -> Tensor:
        """r_winner - r_loser on the axis of each pair [M,b]; both sides in one forward."""
        both = torch.cat([pairs.winner, pairs.loser]).to(device)
        values = self.each(both, {"prompt": pairs.prompts * 2})
        if values.ndim == 3:
            column = torch.tensor([self.column(axis) for axis in pairs.axes] * 2, device=device)
            values = values.gather(2, column.expand(len(values), -1)[..., None])[..., 0]
        winner, loser = values.chunk(2, 1)
        return winner - loser

    def column(self, axis: str) -> int:
        """The number of an axis; BadInput for one that the scorer does not know."""
        if axis not in self.axes:
            known = ", ".join(self.axes)
            raise BadInput(f'no axis "{clean(axis, 40)}"{did_you_mean(axis, self.axes)}; this scorer judges {known}')
        return self.axes.index(axis)


def scorers(student: nn.Module) -> Scorers:
    """A student as an ensemble; any other module is its only member."""
    return student if isinstance(student, Scorers) else Scorers([student], tuple(getattr(student, "axes", ())))


def build_head(config: settings.Head, build: Build) -> Scorers:
    """Factory of the student `preference.head`."""
    head = Head(config.inputs, config.width, config.depth, max(1, len(config.axes)))
    return Scorers([head], tuple(config.axes)).to(build.device)


def build_ensemble(config: settings.Scorers, build: Build) -> Scorers:
    """Factory of the student `preference.ensemble`: members of one kind, each from weights of its own."""
    made = [scorers(build.part("student", config.of, f"member{i}")) for i in range(config.members)]
    return Scorers([member for one in made for member in one.members], made[0].axes)


def logits(gap: Tensor, strength: Tensor, tie: Tensor) -> Tensor:
    """s (r_w - r_l) [...,b]: a judge of strength s sees the gap that much smaller; a tie has no strength."""
    return gap * torch.where(tie, torch.ones_like(strength), strength).to(gap)


def bradley_terry(gap: Tensor, strength: Tensor, tie: Tensor) -> Tensor:
    """-log sigmoid(s (r_w - r_l)) for gaps [...,b]; of a tie half of it and half of its mirror, least at a gap of 0."""
    z = logits(gap, strength, tie)
    return torch.where(tie, -(F.logsigmoid(z) + F.logsigmoid(-z)) / 2, -F.logsigmoid(z))


def draws_of(count: int, members: int, seed: int) -> Tensor:
    """How often each of `count` pairs is in each member's bootstrap sample [M,count], float32 of mean one."""
    rows = []
    for member in range(members):
        gen = generator(seed, f"bradley-terry.bootstrap{member}", 0)
        rows.append(torch.bincount(torch.randint(count, (count,), generator=gen), minlength=count).float())
    return torch.stack(rows)


@dataclass
class BradleyTerry(Single):
    """One phase on fresh pairs. Members share a batch; each weighs its pairs by its own bootstrap of the whole file."""

    model: Scorers
    data: Any
    player: Player
    weights: Tensor | None = None  # [M,N]

    def __post_init__(self) -> None:
        super().__init__(self.player)

    def terms(self, ctx: Context) -> dict[str, Tensor]:
        gen, rows = ctx.draws.gen("data.pairs"), ctx.draws.rows
        pairs: Pairs = ctx.once("bradley-terry.pairs", lambda: self.data.pairs(ctx.global_batch, gen, rows))
        strength, tie = pairs.strength.to(ctx.device), pairs.tie.to(ctx.device)
        gap = self.model.gaps(pairs, ctx.device)
        loss = bradley_terry(gap, strength, tie)
        if self.weights is not None:
            loss = loss * self.weights[:, pairs.index].to(loss)
        right = torch.where(tie, 0.5, (gap.detach() > 0).double()).mean()
        return {"bradley_terry": loss.mean(1).sum(), "_agreed": right}  # the sum: no member slows another down


def build(config: settings.BradleyTerry, build: Build) -> BradleyTerry:
    """Factory of the objective bradley-terry."""
    student, data = build.piece("student"), build.piece("data")
    if not hasattr(data, "pairs"):
        raise BadInput("bradley-terry learns from pairs and `data` gives none; use data: {kind: preferences, path: …}")
    model = scorers(student.train())
    weights = draws_of(data.count, len(model.members), build.seed) if config.bootstrap else None
    return BradleyTerry(model, data, build.player("student", student, plain(config.optim)), weights)
