"""Simple rewards on sequences: G and C within a window, no long runs, folding energy. Legend: B, L, V."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.sequence import tokens
from limbeck.domains.sequence.config import Fold, Gc, Homopolymer
from limbeck.domains.sequence.text import RNA


def gc(config: Gc, build: Build) -> Reward:
    """Factory of the reward sequence.gc: 0 inside [low, high], minus the distance outside."""
    if config.high < config.low:
        raise BadInput(f"sequence.gc: low {config.low:g} is above high {config.high:g}; exchange them")

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        if x.shape[2] != 4:
            raise BadInput("sequence.gc reads DNA or RNA; this model's letters are others")
        share = x[..., 1:3].float().sum(2).mean(1)
        return -((config.low - share).relu() + (share - config.high).relu())

    return Reward(score, "gc", "onehot", differentiable=True, accepts_soft=True)


def longest_run(x: Tensor) -> Tensor:
    """Letters of the longest run of one letter [B] in ids [B,L]."""
    place = torch.arange(x.shape[1], device=x.device)
    fresh = torch.cat([torch.ones_like(x[:, :1], dtype=torch.bool), x[:, 1:] != x[:, :-1]], 1)
    begun = torch.where(fresh, place, 0).cummax(1).values
    return (place - begun).amax(1) + 1


def homopolymer(config: Homopolymer, build: Build) -> Reward:
    """Factory of the reward sequence.homopolymer: minus the letters by which the longest run is too long."""

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return -(longest_run(x) - config.longest).relu().float()

    return Reward(score, "homopolymer", "tokens")


def fold(config: Fold, build: Build) -> Reward:
    """Factory of the reward sequence.fold: minus ViennaRNA's minimum free energy a base (kcal/mol), or plus it."""
    try:
        vienna: Any = importlib.import_module("RNA")
    except ImportError:
        text = "run `pip install ViennaRNA` (its own licence: commercial users must ask its authors)"
        raise BadInput(f"sequence.fold needs ViennaRNA: {text}, or use another reward") from None
    sign = -1.0 if config.goal == "stable" else 1.0

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        energies = [float(vienna.fold(text)[1]) / len(text) for text in tokens.decode(x, RNA)]
        return sign * torch.tensor(energies, device=x.device)

    return Reward(score, "fold", "tokens")
