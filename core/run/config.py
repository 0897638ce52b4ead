"""Torch-free settings of the runner's own parts."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from limbeck.core.scheduled import Scheduled, within

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
OptimKind = Literal["adam", "adamw", "muon", "sgd"]
Betas = tuple[Beta, Beta]
Decay = Annotated[Scheduled, AfterValidator(within(0))]
Norm = Annotated[Scheduled, AfterValidator(within(above=0))]
Average = Annotated[Scheduled, AfterValidator(within(0, below=1))]


class OptimConfig(BaseModel):
    """How one player is trained: optimiser, learning rate over the stage, clipping, cadence and EMA."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    kind: OptimKind = "adamw"  # muon: its matrices; adamw trains the rest
    lr: Scheduled = 1e-4
    rates: dict[str, Annotated[float, Field(gt=0.0)]] = {}  # factors of lr for parameters with this in their name
    betas: Betas = (0.9, 0.999)  # for sgd and muon the first one is the momentum
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Decay = 0.0
    warmup: Annotated[int, Field(ge=0)] = 0  # steps of linear rise
    decay: Literal["constant", "cosine", "linear"] = "constant"  # over the stage's steps, down to 0
    clip: Norm | None = 1.0  # largest global gradient norm
    every: Annotated[int, Field(ge=1)] = 1  # the player trains at every n-th step
    ema: Average | None = None  # ramped: min(ema, (1 + n) / (10 + n)) after n updates


class StudentOf(BaseModel):
    """The student of another run."""

    model_config = ConfigDict(extra="forbid", strict=True)

    of: Annotated[str, Field(min_length=1)]  # its folder
