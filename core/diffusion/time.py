"""Laws that draw the time t, weights w(t), grids of times.

Draws use the generator given, in float64, and return float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.diffusion.config import (
    Index,
    Karras,
    LogitNormal,
    LogNormalSigma,
    LogUniformSigma,
    TimeLaw,
    Uniform,
)
from limbeck.core.diffusion.process import VP, Flow, Process, working_dtype
from limbeck.core.scheduled import at

Draw = Callable[[int, torch.Generator, Process, int], Tensor]


@dataclass(frozen=True)
class Law:
    """A law of t. `group` neighbours share one t (the views of a scene, the frames of a clip)."""

    draw: Draw
    group: int = 1

    def sample(self, n: int, gen: torch.Generator, process: Process, step: int = 0) -> Tensor:
        """n times t, float32 [n] on the generator's device, inside the process's [t_min, t_max]."""
        if n % self.group:
            raise ValueError(f"{n} samples do not divide into groups of {self.group}; change the batch")
        t = self.draw(n // self.group, gen, process, step).clamp(process.t_min, process.t_max)
        return t.float().repeat_interleave(self.group)


def _unit(n: int, gen: torch.Generator) -> Tensor:
    return torch.rand(n, generator=gen, dtype=torch.float64, device=gen.device)


def _normal(n: int, gen: torch.Generator) -> Tensor:
    return torch.randn(n, generator=gen, dtype=torch.float64, device=gen.device)


def law(config: TimeLaw, group: int = 1) -> Law:
    """The law that a torch-free `TimeLaw` describes."""
    return Law(_draw(config), group)


def _draw(config: TimeLaw) -> Draw:
    if isinstance(config, Uniform):
        return lambda n, gen, process, step: _between(at(config.lo, step), at(config.hi, step), _unit(n, gen))
    if isinstance(config, LogitNormal):
        return lambda n, gen, process, step: torch.sigmoid(
            at(config.mean, step) + at(config.std, step) * _normal(n, gen)
        )
    if isinstance(config, Index):
        return lambda n, gen, process, step: _index(config, n, gen)
    return lambda n, gen, process, step: process.t_of_ratio(_ratio(config, n, gen, step))


def _between(lo: float, hi: float, u: Tensor) -> Tensor:
    return lo + (hi - lo) * u


def _index(config: Index, n: int, gen: torch.Generator) -> Tensor:
    k = torch.randint(config.lo, config.hi, (n,), generator=gen, device=gen.device)
    return (k.double() + 1) / config.count


def _ratio(config: LogUniformSigma | LogNormalSigma | Karras, n: int, gen: torch.Generator, step: int) -> Tensor:
    """sigma/alpha of the three laws that are stated in noise level."""
    if isinstance(config, LogNormalSigma):
        return torch.exp(at(config.mean, step) + at(config.std, step) * _normal(n, gen))
    lo, hi = at(config.lo, step), at(config.hi, step)
    if isinstance(config, LogUniformSigma):
        return torch.exp(_between(math.log(lo), math.log(hi), _unit(n, gen)))
    power = 1 / config.rho
    return torch.as_tensor(_between(lo**power, hi**power, _unit(n, gen)) ** config.rho)


def weight(name: str, process: Process, t: Tensor, sigma_data: float = 0.5, cap: float = 1e4) -> Tensor:
    """w(t), shape of t: "one", "sigma2", "alpha", "snr_trunc" = max(1, SNR) up to `cap`, "edm" (EDM table 1).

    EDM's weight is (r^2 + d^2)/(r d)^2 with r = sigma/alpha and d the data's standard deviation.
    """
    if name not in WEIGHTS:
        raise ValueError(f"unknown weight {name!r}; use one of {', '.join(WEIGHTS)}")
    return WEIGHTS[name](process, t, sigma_data, cap).to(working_dtype(t))


WEIGHTS: dict[str, Callable[[Process, Tensor, float, float], Tensor]] = {
    "one": lambda process, t, sigma_data, cap: torch.ones_like(t, dtype=torch.float64),
    "sigma2": lambda process, t, sigma_data, cap: process.sigma(t) ** 2,
    "alpha": lambda process, t, sigma_data, cap: process.alpha(t),
    "snr_trunc": lambda process, t, sigma_data, cap: (process.ratio(t) ** -2).clamp(1.0, cap),
    "edm": lambda process, t, sigma_data, cap: sigma_data**-2 + process.ratio(t) ** -2,
}


def times(n: int, process: Process, kind: str = "uniform") -> Tensor:
    """n steps as n + 1 falling times, float32, from t_max to 0.

    "uniform" in t; "karras": EDM's grid of sigma/alpha between its values at t_max and t_min, then 0 (rho 7);
    "trailing": t = 1 - i/n rounded to an index for VP (the spacing of few-step models).
    """
    if kind == "karras":
        return _karras(n, process).float()
    if kind not in ("uniform", "trailing"):
        raise ValueError(f"unknown time grid {kind!r}; use uniform, karras or trailing")
    fractions = 1 - torch.arange(n + 1, dtype=torch.float64) / n
    if kind == "uniform":
        return (fractions * process.t_max).float()
    count = process.count if isinstance(process, VP) else None
    grid = fractions if count is None else (fractions * count).round() / count
    return grid.clamp(max=process.t_max).float()


def shifted(n: int, process: Process, shift: float) -> Tensor:
    """n + 1 falling times, float32: s u/(1 + (s - 1) u) of uniform u, times t_max; video models sample with s = 7."""
    fractions = 1 - torch.arange(n + 1, dtype=torch.float64) / n
    return (Flow(shift).sigma(fractions) * process.t_max).float()


def _karras(n: int, process: Process, rho: float = 7.0) -> Tensor:
    """The grid of EDM eq. 5; where alpha(t_max) = 0 the first time is t_max itself and sigma/alpha starts at 80."""
    ends = process.ratio(torch.tensor([process.t_max, process.t_min], dtype=torch.float64)).clamp(max=80.0)
    high, low = (ends ** (1 / rho)).tolist()
    r = (high + torch.arange(n, dtype=torch.float64) / max(n - 1, 1) * (low - high)) ** rho
    grid = torch.cat([process.t_of_ratio(r), torch.zeros(1, dtype=torch.float64)])
    grid[0] = process.t_max
    return grid
