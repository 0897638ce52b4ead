"""Torch-free settings of the runner's own parts."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from limbeck.core.scheduled import Scheduled

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(BaseModel):
    """How one player is trained: optimiser, learning rate over the stage, clipping, cadence and EMA."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    kind: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: Scheduled = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # for sgd the first one is the momentum
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = 0  # steps of linear rise
    decay: Literal["constant", "cosine", "linear"] = "constant"  # over the stage's steps, down to 0
    clip: Annotated[float, Field(gt=0.0)] | None = 1.0  # largest global gradient norm
    every: Annotated[int, Field(ge=1)] = 1  # the player trains at every n-th step
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None  # ramped: min(ema, (1 + n) / (10 + n)) after n updates
