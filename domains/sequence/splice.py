"""How good a splice site is: the donor and acceptor nets of MMSplice in plain torch, and the reward on them.

Cheng et al. 2019 (MMSplice: modular modeling improves the predictions of genetic variant effects on splicing). The
weights are the authors' own (assets/mmsplice). Legend: B sequences, L length, V = 4 letters in the order ACGT or ACGU.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.sequence.config import Splice

ASSET = Path(__file__).parent / "assets" / "mmsplice"
EPS = 1e-3  # Keras' batch normalisation


class Donor(nn.Module):
    """The start of an intron: 5 exon bases and 13 intron bases [B,18,4] to logits [B]."""

    before, width = 5, 18  # bases of the window before the one that `position` names, and in all

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(72, 128), nn.BatchNorm1d(128, EPS)
        self.second, self.norm2 = nn.Linear(128, 64), nn.BatchNorm1d(64, EPS)
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.first(x.flatten(1))))
        found: Tensor = self.head(F.relu(self.norm2(self.second(h))))[:, 0]
        return found


class Acceptor(nn.Module):
    """The end of an intron: 50 intron bases and 3 exon bases [B,53,4] to logits [B]."""

    before, width = 49, 53

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv1d(4, 32, 15, padding=7), nn.BatchNorm1d(32, EPS)
        self.second, self.norm2 = nn.Conv1d(32, 32, 1), nn.BatchNorm1d(32, EPS)
        self.head = nn.Linear(53 * 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(F.relu(self.first(x.transpose(1, 2))))
        h = self.norm2(F.relu(self.second(h)))
        found: Tensor = self.head(h.transpose(1, 2).flatten(1))[:, 0]
        return found


SITES: dict[str, type[Donor] | type[Acceptor]] = {"donor": Donor, "acceptor": Acceptor}


def load(site: str, device: torch.device | str = "cpu") -> Donor | Acceptor:
    """The net of `donor` or `acceptor` with its weights, frozen."""
    net = SITES[site]()
    net.load_state_dict(load_file(ASSET / f"{site}.safetensors"), strict=True)
    return net.eval().requires_grad_(False).to(device)


def window(x: Tensor, site: str, position: int) -> Tensor:
    """The rows [B,W,4] that a net reads of x [B,L,4]; `position` counts from 1 (see config.Splice)."""
    start = position - 1 - SITES[site].before
    stop = start + SITES[site].width
    if x.shape[2] != 4:
        raise BadInput("sequence.splice reads DNA or RNA; this model's letters are others")
    if start < 0 or stop > x.shape[1]:
        low, high = 1 + SITES[site].before, x.shape[1] - SITES[site].width + 1 + SITES[site].before
        where = f"choose {low} to {high}" if high >= low else f"the net reads {SITES[site].width} bases"
        raise BadInput(f"sequence.splice: {site} at position {position} of {x.shape[1]} bases does not fit; {where}")
    return x[:, start:stop]


def splice(config: Splice, build: Build) -> Reward:
    """Factory of the reward sequence.splice: the probability of a site, or its logit, which does not saturate."""
    net = load(config.site, build.device)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        logit: Tensor = net(window(x.float(), config.site, config.position))
        return logit if config.scale == "logit" else logit.sigmoid()

    return Reward(score, f"splice {config.site}", "onehot", differentiable=True, accepts_soft=True)
