"""The slot `data` of the embedded fly regions: their windows, all or the best by an oracle, and a template."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.run.build import Build
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence import fly, oracle
from limbeck.domains.sequence.data import Pool
from limbeck.domains.sequence.text import ALPHABETS


def build(config: settings.Windows, build: Build) -> Pool:
    """The slot `data`: windows of the fly's chromosome arms, with the test arm's held out."""
    train = fly.windows(config.role)
    best = None if config.best is None else high(config, train, build)
    return Pool(train, fly.windows("test"), config.template, best)


def high(config: settings.Windows, train: Tensor, build: Build) -> Tensor:
    """The share `best` of `among` windows that the oracle scores highest, ids [N,L]."""
    assert config.best is not None
    some = train[torch.randperm(len(train), generator=generator(build.seed, "windows.among", 0))[: config.among]]
    build.note(f"{config.by} scores {len(some)} windows")
    score = oracle.answers(oracle.opened(config.by, build.device), some, ALPHABETS["dna"].size, build.device).mean(0)
    return some[score.argsort(descending=True)[: max(1, round(config.best * len(some)))]]
