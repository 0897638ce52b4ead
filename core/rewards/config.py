"""Torch-free settings of reward pieces."""

from pydantic import Field

from limbeck.core.run.recipe import Strict


class Judging(Strict):
    """How often the held-out side is evaluated, and after how many falls a run stops (null: never)."""

    every: int = Field(10, ge=1)  # steps
    patience: int | None = Field(5, ge=1)


class Rewards(Strict):
    """Every reward of the recipe on that many samples."""

    count: int = Field(512, ge=2)
    chunk: int = Field(128, ge=1)  # samples at a time
