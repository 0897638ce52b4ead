"""Torch-free settings of the tiny pieces."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from limbeck.core.run.config import OptimConfig


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Points(Strict):
    radius: float = 1.0


class Mean(Strict):
    pass


class Space(Strict):
    pass


class Net(Strict):
    width: int = 8
    depth: int = 1
    double: bool = False


class Pair(Strict):
    generator: OptimConfig = OptimConfig(lr=1e-2, ema=0.9, every=2)
    critic: OptimConfig = OptimConfig(lr=2e-2)
    fault: Literal["none", "loss", "gradient", "memory"] = "none"  # planted in `player` at `at`
    player: Literal["generator", "critic"] = "critic"
    at: int = -1
    finish: int = -1  # the step after which the stage is ended early
    pause: float = 0.0  # seconds a step
