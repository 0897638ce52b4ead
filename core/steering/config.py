"""What a recipe may say about sampling with rewards (torch-free)."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from limbeck.core.diffusion.config import Walk
from limbeck.core.run.recipe import Sampler

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Config(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Plain(Config):
    """One sample a prompt; rewards look on."""

    walk: Walk = Walk()


class BestOf(Plain):
    """The best of n samples by the trained reward."""

    n: Count = 4


class Importance(BestOf):
    """One of n samples, drawn with chance exp(r/temperature)."""

    temperature: Positive = 1.0


class FeynmanKac(Plain):
    """FK steering: particles are chosen along the way by the reward of what is predicted."""

    particles: Count = 4
    temperature: Positive = 0.1
    potential: Literal["difference", "max", "sum", "immediate"] = "difference"
    scheme: Literal["multinomial", "systematic", "stratified", "residual"] = "systematic"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5  # of the particles, the effective sample size to resample at
    every: Count = 1  # steps between two estimates
    pick: Literal["best", "draw"] = "best"  # of the particles at the end; "draw" follows the tilted law
    draws: Count | None = None  # of token posteriors for an estimate; null: their argmax


class Svdd(Plain):
    """SVDD: of several candidates of each step one is kept."""

    candidates: Count = 4
    temperature: Positive = 0.1
    choice: Literal["sample", "argmax"] = "sample"
    draws: Count | None = None


class Classifier(Plain):
    """Classifier guidance on tokens: the reward's slope at what is predicted, added to the logits."""

    scale: Annotated[float, Field(ge=0)] = 10.0  # 1/T of the tilt that it would draw were the reward linear


class Reno(Config):
    """ReNO: the initial noise of a few-step student is moved along the gradient of the reward."""

    steps: Annotated[int, Field(ge=0)] = 50
    lr: Positive = 5.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    clip: Positive = 0.1
    norm: Annotated[float, Field(ge=0)] = 0.01


class Comparison(Config):
    """Several samplers on the same prompts and first noise; gains are over the first."""

    samplers: Annotated[list[Sampler], Field(min_length=1)]
    count: Annotated[int, Field(ge=2)] = 64  # prompts
    chunk: Count = 16  # prompts at a time
    shown: Count = 16  # prompts on the sheet that sets the samplers side by side
    prompts: Literal["data", "sample"] = "data"  # drawn from the data, or the recipe's own `sample.prompts`
