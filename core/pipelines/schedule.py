"""A diffusers scheduler's config as our process and time grid: where family timesteps become t in [0,1]."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.diffusion.process import VP, Flow, Process
from limbeck.core.run.errors import BadInput

FLOW = "FlowMatchEulerDiscreteScheduler"
BETAS = ("linear", "scaled_linear")
KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
COGVIDEO = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # an SNR that is shifted and falls to zero
# What changes the family's law or its steps in a way that our process and kernels do not follow.
ZERO_SNR = "rescale_betas_zero_snr"
UNSUPPORTED = (ZERO_SNR, "trained_betas", "thresholding", "invert_sigmas", "stochastic_sampling")


def refuse(name: str, config: dict[str, Any]) -> None:
    """One clear line for scheduler options that would silently change the samples."""
    asked = [key for key in UNSUPPORTED if config.get(key) and not (name in COGVIDEO and key == ZERO_SNR)]
    if name == "DDIMScheduler" and config.get("clip_sample"):
        asked.append("clip_sample")
    if asked:
        raise BadInput(
            f"scheduler/scheduler_config.json sets {', '.join(asked)}, which limbeck does not support: remove it"
        )


def is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__ == FLOW or bool(scheduler.config.get("use_flow_sigmas"))


def whole_times(scheduler: Any) -> bool:
    """Whether the pipeline's net is asked at whole timesteps: solvers made for indices, where they follow a flow."""
    return type(scheduler).__name__ != FLOW


def flow_shift(config: dict[str, Any], tokens: int) -> float:
    """The shift s of sigma = s u / (1 + (s-1) u); dynamic: exp(mu), mu linear in the number of image tokens."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    mu = dynamic_mu(config, tokens)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def dynamic_mu(config: dict[str, Any], tokens: int) -> float:
    """mu on the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - base) / (high - low)
    return float(tokens * slope + base - slope * low)


def process_of(scheduler: Any, tokens: int) -> Process:
    """Our process for a scheduler: VP with its betas, or rectified flow with its shift (tokens: image tokens)."""
    config = dict(scheduler.config)
    refuse(type(scheduler).__name__, config)
    if is_flow(scheduler):
        return Flow(shift=flow_shift(config, tokens))
    schedule = config.get("beta_schedule", "linear")
    if schedule not in BETAS:
        raise BadInput(
            f"beta_schedule {schedule!r} in scheduler_config.json is not supported; limbeck knows {', '.join(BETAS)}"
        )
    return VP(
        kind=schedule, count=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 0.0001), beta_end=config.get("beta_end", 0.02),
        snr_shift=config.get("snr_shift_scale", 1.0), zero_snr=config.get(ZERO_SNR, False))  # fmt: skip


def kind_of(scheduler: Any) -> str:
    """What the net predicts, by the scheduler's prediction_type."""
    if is_flow(scheduler):
        return "flow"
    return KINDS[scheduler.config.get("prediction_type", "epsilon")]


def grid(scheduler: Any, steps: int, tokens: int, linear: bool = False) -> Tensor:
    """The family's own grid t_0 > ... > t_steps in float64 (linear: start from sigmas 1 ... 1/steps, as Flux does)."""
    if is_flow(scheduler):
        return flow_grid(scheduler, steps, tokens, linear)
    return index_grid(scheduler, steps)


def flow_grid(scheduler: Any, steps: int, tokens: int, linear: bool) -> Tensor:
    """sigmas of the scheduler -> t of Flow(shift): u = sigma / (s - (s-1) sigma)."""
    config = dict(scheduler.config)
    own = type(scheduler).from_config(scheduler.config)
    mu = dynamic_mu(config, tokens) if config.get("use_dynamic_shifting") else None
    own.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps) if linear else None, mu=mu)
    sigma: Tensor = own.sigmas.double()
    shift = flow_shift(config, tokens)
    return sigma / (shift - (shift - 1) * sigma)


def index_grid(scheduler: Any, steps: int) -> Tensor:
    """Index k of T is t = (k+1)/T. Schedulers that repeat or add timesteps (PNDM, Heun) give way to DDIM's grid.

    A step ends where the next begins. Diffusers' DDIM always steps by T // steps, which is the same but for timesteps
    that are spaced otherwise ("linspace", or "trailing" where steps do not divide T).
    """
    from diffusers import DDIMScheduler

    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(steps)
    if len(own.timesteps) != steps or bool((own.timesteps.diff() >= 0).any()):
        own = DDIMScheduler.from_config(scheduler.config)  # type: ignore[no-untyped-call]
        own.set_timesteps(steps)
    count = own.config["num_train_timesteps"]
    times = (own.timesteps.double() + 1) / count
    end = 0.0 if ends_at_data(own) else 1 / count
    return torch.cat([times, times.new_tensor([end])])


def ends_at_data(scheduler: Any) -> bool:
    """Whether the last step lands on exact data, or (DDIM's set_alpha_to_one: false) on index 0."""
    if type(scheduler).__name__ in ("DDIMScheduler", *COGVIDEO):
        return bool(scheduler.config["set_alpha_to_one"])
    return bool(scheduler.config.get("final_sigmas_type", "zero") == "zero")
