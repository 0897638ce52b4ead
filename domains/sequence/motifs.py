"""Binding motifs of JASPAR 2020 (CORE): a differentiable scan, occupancy as a reward, hits for features and counts.

A window's score is its log-odds in nats, log(p/background), p = (count + sqrt(N) background)/(N + sqrt(N)) of N sites.
Soft rows give the expected score. Legend: B sequences, L length, W motif width, P = L - W + 1 windows, S strands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence import tokens
from limbeck.domains.sequence.text import DNA, Alphabet

ASSET = Path(__file__).parent / "assets" / "jaspar"
FILE = "core2020.safetensors"
BIN = 0.005  # nats that scores are rounded to, so that their distribution is exact


@dataclass(frozen=True)
class Motif:
    """Counts of sites [W,4] in the order ACGT."""

    id: str
    name: str
    group: str
    counts: Tensor

    def scores(self, gc: float = 0.5) -> Tensor:
        """Log-odds [W,4] float32 against independent letters with this share of G and C, in steps of BIN."""
        back = background(gc)
        total = self.counts.double().sum(1, keepdim=True)
        p = (self.counts.double() + total.sqrt() * back) / (total + total.sqrt())
        return ((p / back).log() / BIN).round().mul(BIN).float()

    def threshold(self, pvalue: float, gc: float = 0.5) -> float:
        """The least score that a background window reaches with at most this chance; the best one where none is rarer.

        Exact, by convolution over the places.
        """
        whole = (self.scores(gc) / BIN).round().long()
        low = whole.amin(1)
        chance = np.ones(1)
        for row in (whole - low[:, None]).tolist():
            wider = np.zeros(len(chance) + max(row))
            for step, share in zip(row, background(gc).tolist(), strict=True):
                wider[step : step + len(chance)] += share * chance
            chance = wider
        rare = np.nonzero(np.cumsum(chance[::-1])[::-1] <= pvalue)[0]
        return float((int(rare[0]) if len(rare) else len(chance) - 1) + int(low.sum())) * BIN


class Hit(NamedTuple):
    """A site of a motif: letters start:end (from 0), strand + or -, log-odds in nats."""

    id: str
    name: str
    start: int
    end: int
    strand: str
    score: float


def background(gc: float) -> Tensor:
    """Shares of A, C, G and T, float64."""
    return torch.tensor([1 - gc, gc, gc, 1 - gc], dtype=torch.float64) / 2


@cache
def library() -> dict[str, Motif]:
    """All motifs by id, older versions included."""
    found = load_file(ASSET / FILE)
    lines = bytes(found["lines"].tolist()).decode().splitlines()
    parts = torch.split(found["counts"], found["widths"].tolist())
    rows = [(line.split("\t"), counts) for line, counts in zip(lines, parts, strict=True)]
    return {id: Motif(id, name, group, counts) for (id, name, group), counts in rows}


def motif(text: str) -> Motif:
    """A motif by id, by id without version (the newest), or by a name that one motif has; BadInput otherwise."""
    known, wanted = library(), text.strip().upper()
    if wanted in known:
        return known[wanted]
    newest = {id.split(".")[0]: found for id, found in sorted(known.items(), key=lambda item: _order(item[0]))}
    same = [newest[wanted]] if wanted in newest else [m for m in newest.values() if m.name.upper() == wanted]
    if len(same) > 1:
        which = ", ".join(f"{m.id} ({m.group})" for m in same)
        raise BadInput(f"{clean(text, 40)} is the name of several motifs; give an id: {which}")
    if not same:
        words = {word.upper(): word for m in known.values() for word in (m.id, m.name)}
        hint = did_you_mean(wanted, words) or "; give an id such as MA0139.1 or a name such as CTCF"
        raise BadInput(f"JASPAR 2020 has no motif {clean(text, 40)}{hint}")
    return same[0]


def _order(id: str) -> tuple[str, int]:
    base, version = id.split(".")
    return base, int(version)


def scan(x: Tensor, scores: Tensor, strands: str = "both") -> Tensor:
    """Scores [B,S,P] of every window of rows x [B,L,4]; the second strand reads the same window turned round."""
    if x.shape[2] != 4 or x.shape[1] < len(scores):
        raise BadInput(f"a motif of {len(scores)} bases cannot be sought in {x.shape[1]} letters of {x.shape[2]} kinds")
    kernels = torch.stack([scores, scores.flip(0, 1)] if strands == "both" else [scores])
    return F.conv1d(x.float().transpose(1, 2), kernels.transpose(1, 2).to(x.device))


def occupancy(found: Tensor, half: float) -> Tensor:
    """The chance [B] that any window [B,S,P] is bound, 1 - prod(1 - sigmoid(score - half))."""
    return -torch.expm1(F.logsigmoid(half - found).sum((1, 2)))


def reduced(found: Tensor, rule: str, half: float) -> Tensor:
    """[B] of scores [B,S,P]: occupancy, `odds` (log-mean-exp: the log of the mean odds of a window) or `best`."""
    if rule == "occupancy":
        return occupancy(found, half)
    flat = found.flatten(1)
    return flat.amax(1) if rule == "best" else flat.logsumexp(1) - math.log(flat.shape[1])


def hits(
    texts: Sequence[str],
    found: Motif,
    alphabet: Alphabet = DNA,
    strands: str = "both",
    pvalue: float = 1e-4,
    gc: float = 0.5,
) -> list[list[Hit]]:
    """Sites of a motif in texts of one length, by place; windows with a letter that is not certain have none."""
    x = tokens.encode(list(texts), alphabet)
    scores, limit = found.scores(gc), found.threshold(pvalue, gc)
    scored, width = scan(tokens.onehot(x, 4), scores, strands), len(scores)
    sure = (x < 4).unfold(1, width, 1).all(2)[:, None]
    out: list[list[Hit]] = [[] for _ in texts]
    for b, s, p in ((scored > limit - BIN / 2) & sure).nonzero().tolist():
        out[b].append(Hit(found.id, found.name, p, p + width, "+-"[s], float(scored[b, s, p])))
    return [sorted(row, key=lambda hit: (hit.start, hit.strand)) for row in out]


def build(config: settings.Motif, build: Build) -> Reward:
    """Factory of the reward sequence.motif."""
    found = motif(config.id)
    scores, half = found.scores(config.gc), found.threshold(config.pvalue, config.gc)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return reduced(scan(x, scores, config.strands), config.reduce, half)

    return Reward(score, f"motif {found.name}", "onehot", differentiable=True, accepts_soft=True)
