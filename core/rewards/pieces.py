"""Factories of the rewards that are made of rewards, and of the one behind a server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Generator, Tensor

from limbeck.core.rewards import base, config
from limbeck.core.rewards.remote import remote as connect
from limbeck.core.run import outside
from limbeck.core.run.build import Build


def inner(of: Any, build: Build) -> base.Reward:
    """The reward that a combinator's `of:` names."""
    made = build.part("reward", of)
    return made if isinstance(made, base.Reward) else base.as_reward(made, of.kind)


def hinge(config: config.Hinge, build: Build) -> base.Reward:
    """-max(0, target - r)."""
    return base.hinge(inner(config.of, build), config.target)


def clipped(config: config.Clipped, build: Build) -> base.Reward:
    """r within [low, high], which its name says: a mean that stands at a bound is no reward to boast of."""
    of = inner(config.of, build)
    bounds = [f"{word} {value:g}" for word, value in (("from", config.low), ("to", config.high)) if value is not None]
    return replace(base.clipped(of, config.low, config.high), name=" ".join([of.name, *bounds]))


def ensemble(config: config.Ensemble, build: Build) -> base.Reward:
    """Mean, minimum or lower confidence bound."""
    return base.ensemble([inner(of, build) for of in config.of], config.rule, config.width)


def standardised(config: config.Standardised, build: Build) -> base.Reward:
    """(r - mean)/std."""
    return base.standardised(inner(config.of, build), config.mean, config.std)


def zscored(config: config.Zscored, build: Build) -> base.Reward:
    """(r - mean)/std within a prompt."""
    return base.zscored(inner(config.of, build), config.eps)


def cached(config: config.Cached, build: Build) -> base.Reward:
    """Scored once by content."""
    return base.cached(inner(config.of, build), config.limit)


def remote(config: config.Remote, build: Build) -> base.Reward:
    """The reward of a server: on this machine, or where the command line says that this name is."""
    if config.name is None:
        return connect(f"http://127.0.0.1:{config.port}", config.patience)
    address = outside.addresses().get(config.name)
    return _absent(config.name) if address is None else connect(address, config.patience)


def _absent(name: str) -> base.Reward:
    """A server that nobody has named: pieces that ask nothing of it (samples, exports of a run) can be built."""

    def score(x: Tensor, cond: base.Condition, *, t: Tensor | None, gen: Generator | None) -> Tensor:
        raise outside.missing("address", name)

    return base.Reward(score, f"remote {name}")
