"""Preferences as a data piece: pairs of samples with a verdict, some of them held out. Legend: b pairs, *S sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Generator, Tensor

from limbeck.core.rewards import preference
from limbeck.core.rewards.config import Preferences as Settings
from limbeck.core.rewards.files import files
from limbeck.core.rewards.preference import Preference
from limbeck.core.run.build import Batch, Build
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.core.run.rng import derive


@dataclass(frozen=True)
class Pairs:
    """b verdicts on samples [b,*S] of one prompt each; of a tie either sample may stand first."""

    winner: Tensor
    loser: Tensor
    prompts: list[str]
    strength: Tensor  # [b] float32 in (0, 1]
    tie: Tensor  # [b] bool
    axes: list[str]
    users: list[str]
    index: Tensor  # [b] int64, each pair's number on its side of the split


class PairData(Protocol):
    """What losses on preferences ask of the slot `data`, beside what every data piece gives."""

    count: int  # pairs to learn from

    def pairs(self, n: int, gen: Generator, rows: slice, ties: bool = True) -> Pairs:
        """Draws n pairs of those to learn from (without ties on demand), then takes this process's rows."""

    def held_out(self, start: int, stop: int) -> Pairs | None:
        """Pairs start:stop of those that only measure; None past their end."""


class Preferences:
    """A file of preferences; its samples are read when they are drawn."""

    def __init__(self, config: Settings, read: Callable[[str, Path], Tensor]) -> None:
        self.path, self.read = Path(config.path), read
        found = _chosen(preference.read(self.path), config)
        held = [derive(0, f"held out/{_key(pair, config)}") / 2**63 < config.held_out for pair in found]
        self.learned = [pair for pair, out in zip(found, held, strict=True) if not out]
        self.held = [pair for pair, out in zip(found, held, strict=True) if out]
        self.count = len(self.learned)
        self._decisive = [i for i, pair in enumerate(self.learned) if not pair.tie]
        if not self.learned or (config.held_out and not self.held):
            raise BadInput(
                f"{self.path}: {len(self.learned)} of {len(found)} pairs to learn from, {len(self.held)} held out; "
                "add pairs, change held_out, or set by: pair"
            )

    def pairs(self, n: int, gen: Generator, rows: slice, ties: bool = True) -> Pairs:
        """With replacement; BadInput when only ties are left."""
        known = range(self.count) if ties else self._decisive
        if not known:
            raise BadInput(f"{self.path}: every pair is a tie, and this loss learns from winners")
        return self._made(self.learned, [known[i] for i in torch.randint(len(known), (n,), generator=gen)[rows]])

    def held_out(self, start: int, stop: int) -> Pairs | None:
        """In the order of the file."""
        rows = range(len(self.held))[start:stop]
        return self._made(self.held, rows) if rows else None

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """Winners with their prompts, for losses that train on samples."""
        found = self.pairs(n, gen, rows, ties=False)
        return Batch(found.winner, found.prompts)

    def prompts(self, n: int, gen: Generator, rows: slice = slice(None)) -> list[str]:
        """Prompts of pairs to learn from."""
        return [self.learned[i].prompt for i in torch.randint(self.count, (n,), generator=gen)[rows].tolist()]

    def _made(self, side: list[Preference], rows: Sequence[int]) -> Pairs:
        chosen = [side[i] for i in rows]
        samples = [self.read(name, self.path.parent) for p in chosen for name in (p.winner, p.loser)]
        shapes = {tuple(x.shape) for x in samples}
        if len(shapes) > 1:
            raise BadInput(f"{self.path}: samples of shapes {' and '.join(map(str, sorted(shapes)))}; they must agree")
        both = torch.stack(samples)
        columns = ([p.prompt for p in chosen], [p.axis for p in chosen], [p.user for p in chosen])
        strength, tie = torch.tensor([p.strength for p in chosen]), torch.tensor([p.tie for p in chosen])
        return Pairs(both[::2], both[1::2], columns[0], strength, tie, columns[1], columns[2], torch.tensor(rows))


def _chosen(found: list[Preference], config: Settings) -> list[Preference]:
    """Those of the axis and the user that the recipe asks for."""
    for name in ("axis", "user"):
        wanted = getattr(config, name)
        if wanted is not None:
            known = {getattr(pair, name) for pair in found}
            if wanted not in known:
                raise BadInput(f'{config.path}: there is no {name} "{clean(wanted, 40)}"{did_you_mean(wanted, known)}')
            found = [pair for pair in found if getattr(pair, name) == wanted]
    return found


def _key(pair: Preference, config: Settings) -> str:
    """What decides a pair's side: its prompt, so that none is on both sides; without one the two samples."""
    return pair.prompt if pair.prompt and config.by == "prompt" else "\0".join(sorted((pair.winner, pair.loser)))


def build(config: Settings, build: Build) -> Preferences:
    """Factory of the data `preferences`."""
    return Preferences(config, files(build).read)
