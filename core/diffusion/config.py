"""Torch-free settings of processes and time laws (recipes are checked against these without importing torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from limbeck.core.scheduled import Scheduled

WeightName = Literal["one", "sigma2", "alpha", "snr_trunc", "edm"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Uniform(_Strict):
    """t ~ U(lo, hi); both ends may move with the step (annealing)."""

    kind: Literal["uniform"] = "uniform"
    lo: Scheduled = 0.02
    hi: Scheduled = 0.98


class LogitNormal(_Strict):
    """t = sigmoid(mean + std n), the usual law of flow matching."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)


class Index(_Strict):
    """k ~ randint[lo, hi), t = (k + 1)/count: the law of discrete-index models."""

    kind: Literal["index"] = "index"
    lo: int = Field(20, ge=0)
    hi: int = Field(981, ge=1)
    count: int = Field(1000, ge=1)


class LogUniformSigma(_Strict):
    """sigma/alpha log-uniform in [lo, hi]."""

    kind: Literal["log_uniform_sigma"] = "log_uniform_sigma"
    lo: float = Field(0.05, gt=0)
    hi: float = Field(8.0, gt=0)


class LogNormalSigma(_Strict):
    """log(sigma/alpha) ~ N(mean, std^2): EDM's training law."""

    kind: Literal["log_normal_sigma"] = "log_normal_sigma"
    mean: float = -1.2
    std: float = Field(1.2, gt=0)


class Karras(_Strict):
    """(sigma/alpha)^(1/rho) uniform between its values at lo and hi: index-uniform on the Karras grid."""

    kind: Literal["karras"] = "karras"
    lo: float = Field(0.002, gt=0)
    hi: float = Field(80.0, gt=0)
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
