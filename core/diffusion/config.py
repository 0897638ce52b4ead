"""Torch-free settings of processes and time laws (recipes are checked against these without importing torch)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from limbeck.core.scheduled import Scheduled, within

Time = Annotated[Scheduled, AfterValidator(within(0, 1))]
Level = Annotated[Scheduled, AfterValidator(within(above=0))]
WeightName = Literal["one", "sigma2", "alpha", "snr_trunc", "edm"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Range(_Strict):
    """Two ends in order; numbers that move with the step are only checked against their own bounds."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        lo, hi = getattr(self, "lo"), getattr(self, "hi")  # noqa: B009
        if not isinstance(lo, list) and not isinstance(hi, list) and lo > hi:
            raise ValueError(f"lo is {lo:g}, above hi, {hi:g}; exchange them")
        return self


class Uniform(_Range):
    """t ~ U(lo, hi), t from 0 (data) to 1 (noise); both ends may move with the step (annealing)."""

    kind: Literal["uniform"] = "uniform"
    lo: Time = 0.02
    hi: Time = 0.98


class LogitNormal(_Strict):
    """t = sigmoid(mean + std n), the usual law of flow matching."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: Scheduled = 0.0
    std: Level = 1.0


class Index(_Strict):
    """k ~ randint[lo, hi), t = (k + 1)/count: the law of discrete-index models."""

    kind: Literal["index"] = "index"
    lo: int = Field(20, ge=0)
    hi: int = Field(981, ge=1)
    count: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.lo < self.hi <= self.count:
            raise ValueError(f"lo {self.lo} < hi {self.hi} <= count {self.count} must hold; hi itself is never drawn")
        return self


class LogUniformSigma(_Range):
    """sigma/alpha log-uniform in [lo, hi]."""

    kind: Literal["log_uniform_sigma"] = "log_uniform_sigma"
    lo: Level = 0.05
    hi: Level = 8.0


class LogNormalSigma(_Strict):
    """log(sigma/alpha) ~ N(mean, std^2): EDM's training law."""

    kind: Literal["log_normal_sigma"] = "log_normal_sigma"
    mean: Scheduled = -1.2
    std: Level = 1.2


class Karras(_Range):
    """(sigma/alpha)^(1/rho) uniform between its values at lo and hi: index-uniform on the Karras grid."""

    kind: Literal["karras"] = "karras"
    lo: Level = 0.002
    hi: Level = 80.0
    rho: float = Field(7.0, gt=0)


TimeLaw = Annotated[
    Uniform | LogitNormal | Index | LogUniformSigma | LogNormalSigma | Karras, Field(discriminator="kind")
]


class Vp(_Strict):
    """Variance preserving; `linear` and `scaled_linear` by index, `cosine` in continuous time."""

    kind: Literal["vp"] = "vp"
    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    count: int = Field(1000, ge=1)
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)


class Edm(_Strict):
    """Variance exploding, sigma(t) = sigma_max t^rho."""

    kind: Literal["edm"] = "edm"
    sigma_max: float = Field(80.0, gt=0)
    sigma_min: float = Field(0.002, gt=0)
    rho: float = Field(7.0, gt=0)


class FlowConfig(_Strict):
    """Rectified flow with time shift: sigma = s t/(1 + (s - 1) t), alpha = 1 - sigma."""

    kind: Literal["flow"] = "flow"
    shift: float = Field(1.0, gt=0)


ProcessConfig = Annotated[Vp | Edm | FlowConfig, Field(discriminator="kind")]


class Walk(BaseModel):
    """How samples are drawn where rewards act: the model's own grid, DDIM with noise eta, guidance."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    steps: Annotated[int, Field(ge=1)] = 20
    eta: Time = 1.0
    floor: Time = 0.0  # least deviation of a step; 0: the last one has none, so policy methods do not learn from it
    guidance: Annotated[Scheduled, AfterValidator(within(0))] = 3.0
