"""Forward processes x_t = alpha_t x0 + sigma_t eps and the conversions between what networks predict.

Time t lies in [0, 1], 0 is data and 1 is noise, shape [B] or broadcastable to the sample. Schedules are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from limbeck.core.diffusion.config import Edm, ProcessConfig, Vp

KINDS = ("x0", "eps", "v", "score", "flow")
LEAST_ALPHA = 1e-6


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Append ones to t ([B] or [B,L] …) until it broadcasts over the rank of `like` ([B,*S])."""
    return t.reshape(t.shape + (1,) * max(0, like.ndim - t.ndim)) if t.ndim else t


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype among the tensors, never below float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class Process:
    """A Gaussian forward process. A subclass states alpha, sigma, their derivatives and the inverse of sigma/alpha."""

    t_min: float = 1e-3
    t_max: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """Signal level, float64, shape of t."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level, float64, shape of t."""
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt, float64."""
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt, float64."""
        raise NotImplementedError

    def t_of_ratio(self, r: Tensor) -> Tensor:
        """The time at which sigma/alpha equals r, float64."""
        raise NotImplementedError

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), float64, shape of t."""
        return self.alpha(t), self.sigma(t)

    def ratio(self, t: Tensor) -> Tensor:
        """sigma/alpha, float64."""
        alpha, sigma = self.levels(t)
        return sigma / alpha

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) computed in float64, cast to the dtype of `like` (float32 at least), of its rank."""
        dtype, (alpha, sigma) = working_dtype(like), self.levels(t.to(like.device))
        return expand(alpha.to(dtype), like), expand(sigma.to(dtype), like)

    def marginal(self, x0: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t given x0 (cond is for processes that move towards a condition)."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0, sigma

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t [B,*S] of x0 and a standard normal eps."""
        mean, sigma = self.marginal(x0, t)
        return mean + sigma * eps

    def start(self, z: Tensor, t: Tensor) -> Tensor:
        """The network input that stands for pure noise z at time t (z itself where the marginal has unit variance)."""
        return z


@lru_cache(maxsize=64)
def _knots(process: VP, device: torch.device) -> tuple[Tensor, Tensor]:
    """log alpha-bar at t = 0, 1/count, …, 1, and its differences."""
    power = 0.5 if process.kind == "scaled_linear" else 1.0
    beta = torch.linspace(process.beta_start**power, process.beta_end**power, process.count, dtype=torch.float64)
    logs = torch.log1p(-(beta ** (1 / power))).cumsum(0)
    if process.snr_shift != 1 or process.zero_snr:
        bar = logs.exp()
        root = (bar / (process.snr_shift + (1 - process.snr_shift) * bar)).sqrt()
        if process.zero_snr:
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        logs = 2 * root.clamp_min(LEAST_ALPHA).log()
    table = torch.cat([torch.zeros(1, dtype=torch.float64), logs]).to(device)
    return table, table.diff()


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving. Index k stands at t = (k + 1)/count; log alpha-bar is linear between indices.

    `cosine` is alpha = cos(pi t/2) in continuous time; its t_max is .999 because alpha(1) = 0.
    The SNR may be divided by `snr_shift` (as in SD3), and alpha then be rescaled to fall to zero (Lin et al. 2024,
    alg. 1): to 1e-6, as a prediction of eps says nothing of x0 where alpha is 0.
    """

    kind: str = "linear"
    count: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    snr_shift: float = 1.0
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "scaled_linear", "cosine"):
            raise ValueError(f"VP kind is {self.kind!r}; use linear, scaled_linear or cosine")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return 1e-3 if self.kind == "cosine" else 1 / self.count

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return 0.999 if self.kind == "cosine" else 1.0

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _knots(self, device)

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha-bar at t and its change over an index."""
        (table, slopes), u = self._table(t.device), t.double() * self.count
        low = u.long().clamp_(0, self.count - 1)
        slope = slopes[low]
        return torch.addcmul(table[low], u - low, slope), slope

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "cosine":
            angle = t.double() * (math.pi / 2)
            return torch.cos(angle), torch.sin(angle)
        log = self._interpolate(t)[0]
        return torch.exp(0.5 * log), torch.expm1(log).neg().sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        return self.levels(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.levels(t)[1]

    def d_alpha(self, t: Tensor) -> Tensor:
        if self.kind == "cosine":
            return -(math.pi / 2) * self.sigma(t)
        return (0.5 * self.count) * self.alpha(t) * self._interpolate(t)[1]

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def t_of_ratio(self, r: Tensor) -> Tensor:
        if self.kind == "cosine":
            return torch.atan(r.double()) * (2 / math.pi)
        (table, slopes), value = self._table(r.device), -torch.log1p(r.double() ** 2)
        low = (torch.searchsorted(-table, -value) - 1).clamp(0, self.count - 1)
        return (low + (value - table[low]) / slopes[low]) / self.count


@dataclass(frozen=True)
class EDM(Process):
    """Variance exploding, sigma(t) = sigma_max t^rho: the Karras grid (EDM eq. 5) is uniform in t."""

    sigma_max: float = 80.0
    sigma_min: float = 0.002
    rho: float = 7.0

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return float((self.sigma_min / self.sigma_max) ** (1 / self.rho))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t.double() ** self.rho

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * self.rho * t.double() ** (self.rho - 1)

    def t_of_ratio(self, r: Tensor) -> Tensor:
        return (r.double() / self.sigma_max) ** (1 / self.rho)

    def start(self, z: Tensor, t: Tensor) -> Tensor:
        return self.coefficients(t, z)[1] * z


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow with the time shift s of SD3: sigma = s t/(1 + (s - 1) t), alpha = 1 - sigma."""

    shift: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        # (1 - t)/(1 + (s-1) t), not 1 - sigma: no cancellation near t = 1
        t = t.double()
        return 1 - t if self.shift == 1 else (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        t = t.double()
        return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.d_sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.shift / (1 + (self.shift - 1) * t.double()) ** 2

    def t_of_ratio(self, r: Tensor) -> Tensor:
        return 1 / (1 + self.shift / r.double())  # finite at r = 0 and r = inf


def process(config: ProcessConfig) -> Process:
    """Build a process from its torch-free settings."""
    if isinstance(config, Vp):
        return VP(config.schedule, config.count, config.beta_start, config.beta_end)
    if isinstance(config, Edm):
        return EDM(config.sigma_max, config.sigma_min, config.rho)
    return Flow(config.shift)


def build(config: ProcessConfig, build: object) -> Process:
    """Factory of the registry kind `process`."""
    return process(config)


def _x0(value: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, src: str) -> Tensor:
    """x0 from any kind. v = alpha eps - sigma x0 and flow = eps - x0 hold for every (alpha, sigma)."""
    if src == "x0":
        return value
    if src == "eps":
        return (x_t - sigma * value) / alpha
    if src == "score":
        return (x_t + sigma**2 * value) / alpha
    if src == "v":
        return (alpha * x_t - sigma * value) / (alpha**2 + sigma**2)
    return (x_t - sigma * value) / (alpha + sigma)


def _eps(value: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, src: str) -> Tensor:
    """eps from any kind."""
    if src == "eps":
        return value
    if src == "x0":
        return (x_t - alpha * value) / sigma
    if src == "score":
        return -sigma * value
    if src == "v":
        return (sigma * x_t + alpha * value) / (alpha**2 + sigma**2)
    return (x_t + alpha * value) / (alpha + sigma)


def convert(value: Tensor, x_t: Tensor, t: Tensor, process: Process, src: str, dst: str) -> Tensor:
    """Turn a prediction of kind `src` into `dst` (one of KINDS, or "velocity" = dx_t/dt along the path).

    Exact linear algebra on x_t = alpha x0 + sigma eps; computed in the widest dtype given, float32 at least.
    """
    _known(src, KINDS)
    _known(dst, (*KINDS, "velocity"))
    dtype = working_dtype(value, x_t)
    value, x_t = value.to(dtype), x_t.to(dtype)
    if src == dst:
        return value
    alpha, sigma = process.coefficients(t, x_t)
    if dst == "x0":
        return _x0(value, x_t, alpha, sigma, src)
    eps = _eps(value, x_t, alpha, sigma, src)
    if dst == "eps":
        return eps
    if dst == "score":
        return -eps / sigma
    return _mix(_x0(value, x_t, alpha, sigma, src), eps, t, process, dst)


def _mix(x0: Tensor, eps: Tensor, t: Tensor, process: Process, dst: str) -> Tensor:
    """The kinds that combine x0 and eps."""
    if dst == "flow":
        return eps - x0
    if dst == "v":
        alpha, sigma = process.coefficients(t, x0)
        return alpha * eps - sigma * x0
    t = t.to(x0.device)
    d_alpha, d_sigma = expand(process.d_alpha(t), x0), expand(process.d_sigma(t), x0)
    return d_alpha.to(x0.dtype) * x0 + d_sigma.to(x0.dtype) * eps


def _known(kind: str, options: tuple[str, ...]) -> None:
    if kind not in options:
        raise ValueError(f"unknown prediction kind {kind!r}; use one of {', '.join(options)}")
