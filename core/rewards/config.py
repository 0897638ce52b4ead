"""Torch-free settings of reward pieces."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from limbeck.core.run.config import OptimConfig
from limbeck.core.run.recipe import Name, Reward, Strict, Student


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

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("give `low`, `high` or both, or name the reward itself instead of `clipped`")
        return self


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


class Zscored(Strict):
    """(r - mean)/(std + eps) over the samples of one prompt that are judged together."""

    of: Reward
    eps: float = Field(1e-6, gt=0)


class Cached(Strict):
    """Each pair of sample and condition is scored once."""

    of: Reward
    limit: int = Field(65536, ge=1)


class Remote(Strict):
    """A reward served on this machine by `limbeck reward-server`; with a name, where `--reward-address` says."""

    port: int = Field(8765, ge=1, le=65535)
    name: Name | None = None
    patience: float = Field(120.0, ge=0)  # seconds to wait for a server that is away


class Program(Strict):
    """The user's own program, whose command `--reward-program NAME=COMMAND` gives."""

    name: Name
    timeout: float = Field(300.0, gt=0)  # seconds for one batch
    chunk: Annotated[int, Field(ge=1)] | None = None  # samples at a time; null: the whole batch


class Preferences(Strict):
    """A file of preferences (.jsonl or .parquet) and the share of it that only measures."""

    path: str = Field(min_length=1)
    held_out: float = Field(0.2, ge=0, lt=1)
    by: Literal["prompt", "pair"] = "prompt"  # what is held out whole; pairs without a prompt: themselves
    axis: str | None = None  # only pairs judged on this axis
    user: str | None = None  # only this user's


class Writer(Strict):
    """The policy over toy words."""

    width: int = Field(128, ge=1)


class Tilt(Strict):
    """How the student's words compare with the exact tilt p e^(r/beta)."""

    beta: float = Field(0.5, gt=0)
    count: int = Field(20_000, ge=2)
    steps: int = Field(16, ge=1)


class Head(Strict):
    """A small net on samples or features of that many numbers; `depth: 0` is a linear reward."""

    inputs: int = Field(ge=1)
    width: int = Field(64, ge=1)
    depth: int = Field(1, ge=0, le=16)
    axes: list[str] = []  # one answer for each; none: one for every pair


class Scorers(Strict):
    """Several scorers of one kind that start and learn apart."""

    of: Student
    members: int = Field(4, ge=1, le=64)


class BradleyTerry(Strict):
    """Trains the student, a scorer, on the pairs of `data`."""

    optim: OptimConfig = OptimConfig(lr=1e-3, weight_decay=1e-2)
    bootstrap: bool = True  # each member sees its own sample of the pairs, drawn with replacement


class Preference(Strict):
    """The student, a scorer, on held-out pairs."""

    by: list[Literal["axis", "user"]] = []  # a row for each of these too
    bins: int = Field(10, ge=2, le=1000)  # of confidence
    chunk: int = Field(256, ge=1)  # pairs at a time


class Learned(Strict):
    """A reward that was learned by bradley-terry: its run folder, or the .safetensors that was exported from it."""

    path: str = Field(min_length=1)
    rule: Literal["mean", "min", "lower"] = "mean"
    width: float = Field(1.0, ge=0)  # of `lower`: mean - width * standard deviation
    axis: str | None = None  # one of its axes; null: all of them
