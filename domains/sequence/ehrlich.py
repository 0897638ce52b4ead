"""Ehrlich functions: closed-form design problems with an optimum that is known (Stanton et al. 2024, section 4).

f(x) = prod_i max_l floor(q share of motif i that is present at l with its spacing)/q, and 0 where x has a banned pair
of neighbours. Deviations: a motif begins with a letter that may follow the last one of the motif before (so that the
motifs can always be joined), and every letter has the same share of banned successors.
Legend: c motifs of k letters, V letters, B sequences, L length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence.text import ALPHABETS

BANNED = 0.3  # of a letter's successors


@dataclass(frozen=True)
class Ehrlich:
    """banned [V,V] bool, motifs [c,k] ids, offsets [c,k] from a motif's first letter, q steps, L letters."""

    banned: Tensor
    motifs: Tensor
    offsets: Tensor
    quantise: int
    length: int

    def feasible(self, x: Tensor) -> Tensor:
        """Whether ids [B,L] have no banned neighbours, [B]."""
        return ~self.banned.to(x.device)[x[:, :-1], x[:, 1:]].any(1)

    def presence(self, x: Tensor) -> Tensor:
        """The quantised presence of each motif in ids [B,L], [B,c]."""
        found = []
        for motif, offset in zip(self.motifs.tolist(), self.offsets.tolist(), strict=True):
            places = self.length - offset[-1]
            hits = torch.stack([x[:, o : o + places] == a for a, o in zip(motif, offset, strict=True)])
            found.append(hits.sum(0).amax(1) * self.quantise // len(motif) / self.quantise)
        return torch.stack(found, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """f [B] of ids [B,L]."""
        return self.presence(x).prod(1) * self.feasible(x)

    def optimum(self) -> Tensor:
        """A sequence [L] of value 1: each motif with its gaps filled by the letter before, one after the other."""
        out: list[int] = []
        for motif, offset in zip(self.motifs.tolist(), self.offsets.tolist(), strict=True):
            start = len(out)
            for letter, place in zip(motif, offset, strict=True):
                out += out[-1:] * (start + place - len(out)) + [letter]
        return torch.tensor(out + out[-1:] * (self.length - len(out)))


def make(size: int, motifs: int, motif: int, length: int, quantise: int, seed: int) -> Ehrlich:
    """The function of a seed; BadInput for numbers that do not go together."""
    if motif > size:
        raise BadInput(f"sequence.ehrlich: a motif of {motif} different letters needs as many; there are {size}")
    if motif * motifs > length:
        raise BadInput(f"sequence.ehrlich: {motifs} motifs of {motif} letters do not fit into {length}; take fewer")
    if quantise > motif:
        raise BadInput(f"sequence.ehrlich: quantise {quantise} is more than the {motif} letters of a motif")
    gen = generator(seed, "sequence.ehrlich", 0)
    order = torch.randperm(size, generator=gen)
    banned, found = bans(order, gen), torch.zeros(0, dtype=torch.int64)
    for _ in range(motifs):
        found = torch.cat([found, path(banned, order, motif, found[-1:], gen)])
    room = length // motifs - 1
    gaps = [torch.randperm(room, generator=gen)[: motif - 1].sort().values + 1 for _ in range(motifs)]
    offsets = torch.stack([torch.cat([torch.zeros(1, dtype=torch.int64), gap]) for gap in gaps])
    return Ehrlich(banned, found.view(motifs, motif), offsets, quantise, length)


def bans(order: Tensor, gen: Generator) -> Tensor:
    """Banned pairs [V,V]; never a letter with itself nor along the cycle `order`, so that all can be reached."""
    size = len(order)
    chance = torch.rand(size, size, generator=gen)
    chance[torch.arange(size), torch.arange(size)] = 2
    chance[order, order.roll(-1)] = 2
    worst = chance.argsort(1)[:, : min(size - 2, round(BANNED * size))]
    return torch.zeros(size, size, dtype=torch.bool).scatter(1, worst, True)


def path(banned: Tensor, order: Tensor, count: int, last: Tensor, gen: Generator) -> Tensor:
    """`count` different letters, each of which may follow the one before (the first may follow `last` [0] or [1])."""
    for _ in range(100):
        found = last.tolist()[:1]
        for i in range(count):
            free = ~banned[found[-1]] if found else torch.ones(len(banned), dtype=torch.bool)
            free[found[len(found) - i :]] = False
            if not bool(free.any()):
                break
            found.append(int(torch.multinomial(free.double(), 1, generator=gen)))
        if len(found) == count + len(last):
            return torch.tensor(found[len(last) :])
    start = int((order == last).int().argmax()) if len(last) else 0
    return order.roll(-start)[:count]


def ehrlich(config: settings.Ehrlich, build: Build) -> Reward:
    """Factory of the reward sequence.ehrlich."""
    size, quantise = ALPHABETS[config.alphabet].size, config.quantise or config.motif
    function = make(size, config.motifs, config.motif, config.length, quantise, config.seed)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        if x.shape[1] != config.length:
            raise BadInput(f"sequence.ehrlich: length is {config.length} and the sequences have {x.shape[1]} letters")
        return function(x)

    return Reward(score, "ehrlich", "tokens")
