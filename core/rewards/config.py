"""Torch-free settings of reward pieces."""

from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.run.recipe import Reward, Strict


class Judging(Strict):
    """How often the held-out side is evaluated, and after how many falls a run stops (null: never)."""

    every: Annotated[int, Field(ge=1)] = 10  # steps
    patience: Annotated[int, Field(ge=1)] | None = 5


class Rewards(Strict):
    """Every reward of the recipe on that many samples."""

    count: int = Field(512, ge=2)
    chunk: int = Field(128, ge=1)  # samples at a time


class Hinge(Strict):
    """-max(0, target - r)."""

    of: Reward
    target: float


class Clipped(Strict):
    """r within [low, high]."""

    of: Reward
    low: float | None = None
    high: float | None = None


class Ensemble(Strict):
    """Several rewards of one scale as one; `lower`: mean - width * standard deviation."""

    of: list[Reward] = Field(min_length=1)
    rule: Literal["mean", "min", "lower"] = "lower"
    width: float = Field(1.0, ge=0)


class Standardised(Strict):
    """(r - mean)/std."""

    of: Reward
    mean: float = 0.0
    std: float = Field(1.0, gt=0)


class Cached(Strict):
    """Each pair of sample and condition is scored once."""

    of: Reward
    limit: int = Field(65536, ge=1)


class Remote(Strict):
    """A reward served on this machine by `limbeck reward-server`."""

    port: int = Field(8765, ge=1, le=65535)
    patience: float = Field(120.0, ge=0)  # seconds to wait for a server that is away
