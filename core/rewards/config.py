"""Torch-free settings of reward pieces."""

from pydantic import Field

from limbeck.core.run.recipe import Strict


class Rewards(Strict):
    """Every reward of the recipe on that many samples."""

    count: int = Field(512, ge=2)
    chunk: int = Field(128, ge=1)  # samples at a time
