"""Oracles: nets that read a sequence and say one number, how they are learned, judged and used as rewards.

Legend: M members of an ensemble, N sequences, b rows of this process, L length, V letters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.distillation.source import plain
from limbeck.core.rewards import base, stored
from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.rewards.learned import Scorers, draws_of, scorers
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.core.run.players import Player, Single
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence import tokens
from limbeck.domains.sequence.data import Labelled
from limbeck.domains.sequence.nets import READERS
from limbeck.domains.sequence.text import ALPHABETS

ASSETS = Path(__file__).parent / "assets" / "oracles"
Row = dict[str, float | str]


def reader(config: settings.Reader, build: Build) -> nn.Module:
    """Factory of the student sequence.reader."""
    size = ALPHABETS[config.alphabet].size
    return READERS[config.net](size, config.width, config.kernel, config.dropout).to(build.device)


def read(member: Any, x: Tensor, gen: torch.Generator) -> Tensor:
    """What a member says while it learns, in deviations from the data's mean, [b]."""
    found: Tensor = member.raw(x, gen)
    return found


def loss(task: str, raw: Tensor, y: Tensor) -> Tensor:
    """Of raw outputs [M,b] for values y [b] (0 or 1, or standardised): [M,b]."""
    y = y.expand_as(raw)
    if task == "classify":
        return F.binary_cross_entropy_with_logits(raw, y, reduction="none")
    return (raw - y).square()


@dataclass
class Fitting(Single):
    """One phase on fresh rows; members share a batch and weigh it by their own bootstrap of the whole data."""

    config: settings.Fit
    model: Scorers
    data: Labelled
    size: int
    player: Player
    weights: Tensor | None  # [M,N]

    def __post_init__(self) -> None:
        super().__init__(self.player)

    def terms(self, ctx: Context) -> dict[str, Tensor]:
        """The sum over members, so that none slows another down."""
        gen = ctx.draws.gen("data.labelled")
        index = torch.randint(self.data.count, (ctx.global_batch,), generator=gen)[ctx.draws.rows]
        return {"fit": self.at(index, ctx.device, ctx.draws.gen(f"fit.dropout{ctx.draws.rows.start}"))}

    def at(self, index: Tensor, device: torch.device, gen: torch.Generator) -> Tensor:
        """The loss on rows of the data; gen draws what is dropped."""
        x = tokens.onehot(self.data.x[index].long(), self.size).to(device)
        centre, scale = moments(self.config.task, self.data.y)
        y = ((self.data.y[index] - centre) / scale).to(device)
        found = loss(self.config.task, torch.stack([read(member, x, gen) for member in self.model.members]), y)
        return (found if self.weights is None else found * self.weights[:, index].to(found)).mean(1).sum()


def moments(task: str, y: Tensor) -> tuple[float, float]:
    """Mean and deviation that values are standardised by; none for yes and no."""
    return (0.0, 1.0) if task == "classify" else (float(y.mean()), max(float(y.std()), 1e-6))


def fit(config: settings.Fit, build: Build) -> Fitting:
    """Factory of the objective sequence.fit."""
    return fitting(config, build, build.piece("student"), build.piece("data"))


def fitting(config: settings.Fit, build: Build, student: nn.Module, data: Labelled) -> Fitting:
    """The objective of any student on any data; the members learn in deviations from the data's mean."""
    if not isinstance(data, Labelled):
        raise BadInput("sequence.fit needs sequences with values; use data: {kind: sequence.table, path: …}")
    model = scorers(student.train())
    centre, scale = moments(config.task, data.y)
    for member in model.members:
        member.get_buffer("centre").fill_(centre)
        member.get_buffer("scale").fill_(scale)
    weights = (
        draws_of(data.count, len(model.members), build.seed) if config.bootstrap and len(model.members) > 1 else None
    )
    player = build.player("student", student, plain(config.optim))
    size = next(model.members[0].parameters()).shape[1]
    return Fitting(config, model, data, size, player, weights)


@torch.no_grad()
def answers(model: Scorers, x: Tensor, size: int, device: torch.device, chunk: int = 512) -> Tensor:
    """What every member says [M,N] of ids x [N,L]."""
    model.eval()
    rows = (tokens.onehot(part.long(), size).to(device) for part in torch.split(x, chunk))
    return torch.cat([torch.stack([member(part, {}) for member in model.members]).cpu() for part in rows], 1)


def auroc(score: Tensor, y: Tensor) -> float:
    """The chance that a positive scores above a negative; ties count half."""
    known, order = score.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    counts = torch.bincount(order, minlength=len(known)).double()
    rank = (counts.cumsum(0) - counts / 2 + 0.5)[order]
    positive = y > 0.5
    n, m = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / max(1, n * m))


def spearman(a: Tensor, b: Tensor) -> float:
    """The correlation of ranks [N]."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def judged(found: Tensor, y: Tensor) -> Row:
    """What answers [M,N] are worth for values y [N]: AUROC for yes and no, else correlations; and of the spread."""
    mean = found.mean(0)
    if bool(((y == 0) | (y == 1)).all()):
        return {"AUROC": auroc(mean, y), "accuracy": float(((mean > 0) == (y > 0.5)).float().mean())}
    out: Row = {"Pearson": float(torch.corrcoef(torch.stack([mean, y]))[0, 1]), "Spearman": spearman(mean, y)}
    out["RMSE"] = float((mean - y).square().mean().sqrt())
    if len(found) > 1:
        out["spread"] = float(found.std(0).mean())
        out["spread against error"] = spearman(found.std(0), (mean - y).abs())
    return out


def metric(config: settings.OracleQuality, build: Build) -> Callable[[], list[Row]]:
    """Factory of the metric sequence.oracle."""

    def rows() -> list[Row]:
        model, data = scorers(build.piece("student")), build.piece("data")
        size = next(model.members[0].parameters()).shape[1]
        out: list[Row] = [{"learned from": data.count, "tested on": len(data.test_x)}]
        out[0] |= judged(answers(model, data.test_x, size, build.device), data.test_y)
        for share in sorted(config.curve, reverse=True):
            part = share_of(data, share)
            again = learned_again(build, part)
            out.append({"learned from": part.count, "tested on": len(data.test_x)})
            out[-1] |= judged(answers(scorers(again), data.test_x, size, build.device), data.test_y)
        return out

    return rows


def share_of(data: Labelled, share: float) -> Labelled:
    """A share of what there is to learn from."""
    order = torch.randperm(data.count, generator=generator(0, "sequence.curve", 0))[: max(8, int(share * data.count))]
    return replace(data, x=data.x[order], y=data.y[order])


def learned_again(build: Build, data: Labelled) -> nn.Module:
    """A fresh student on other data, with the recipe's own loss, steps and batch (plain Adam at its rate)."""
    recipe = build.recipe
    student: nn.Module = build.part("student", recipe.student)
    config = build.config(f"stages.{len(recipe.stages) - 1}.losses.0")
    fit = fitting(config, replace(build), student, data)
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    for step in range(recipe.steps):
        gen = generator(build.seed, "sequence.again", step)
        index = torch.randint(data.count, (recipe.batch,), generator=gen)
        optimiser.zero_grad()
        with torch.enable_grad():
            torch.autograd.backward(fit.at(index, build.device, gen))
        optimiser.step()
    return student


def names() -> list[str]:
    """The oracles that come with limbeck."""
    return sorted(path.stem for path in ASSETS.glob("*.safetensors"))


def opened(name: str, device: torch.device) -> Scorers:
    """An embedded oracle by its name, a run folder, or an exported file."""
    path = ASSETS / f"{name}.safetensors" if name in names() else Path(name).expanduser()
    if not path.exists():
        hint = did_you_mean(name, names()) or f"; embedded oracles: {', '.join(names()) or 'none'}"
        raise BadInput(f"there is no oracle {clean(name, 80)}{hint}")
    return scorers(stored.opened(path, device))


def build(config: settings.Oracle, build: Build) -> Reward:
    """Factory of the reward sequence.oracle: logits of an oracle of yes and no, values of the rest."""
    model = opened(config.model, build.device)
    joined = base.ensemble(stored.rewards(model, None), config.rule, config.width)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        given = joined(x, cond, gen=gen)
        if config.strands == "given":
            return given
        return (given + joined(x.flip(1, 2), cond, gen=gen)) / 2  # A<->T and C<->G are mirror images in ACGT

    name = f"oracle {Path(config.model).stem}"
    return Reward(score, name, "onehot", differentiable=True, accepts_soft=True)
