"""Optimising the initial noise of a differentiable generator (ReNO). Legend: B samples, d numbers in a noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ascent:
    """ReNO's settings (Eyring et al. 2024): Nesterov ascent of reward minus `norm` times the regulariser."""

    steps: int = 50
    lr: float = 5.0
    momentum: float = 0.9
    clip: float = 0.1  # largest gradient norm of one noise
    norm: float = 0.01


@dataclass
class Found:
    """The best noise of each sample [B,*S] with its reward [B], and the rewards of all steps [steps+1,B]."""

    noise: Tensor
    reward: Tensor
    history: Tensor


def off_shell(z: Tensor) -> Tensor:
    """|z|^2/2 - (d - 1) log|z| [B], the negative log density of the norm of d normal numbers; least at sqrt(d - 1)."""
    flat = z.flatten(1).float() if z.dtype != torch.float64 else z.flatten(1)
    norm = flat.norm(dim=1)
    return norm.square() / 2 - (flat.shape[1] - 1) * norm.log()


def optimise(reward_of: Callable[[Tensor], Tensor], noise: Tensor, settings: Ascent = Ascent()) -> Found:
    """Climb reward_of(z) [B] from noise [B,*S]; what counts as best is the reward alone, not the regulariser."""
    z, speed = noise.detach().clone(), torch.zeros_like(noise)
    best, top, history = z.clone(), None, []
    for step in range(settings.steps + 1):
        z.requires_grad_(True)
        reward = reward_of(z)
        loss = settings.norm * off_shell(z) - reward
        with torch.no_grad():
            better = torch.ones_like(reward, dtype=torch.bool) if top is None else reward > top
            top = reward.detach().clone() if top is None else torch.where(better, reward, top)
            best = torch.where(better.view(-1, *[1] * (z.ndim - 1)), z, best)
            history.append(reward.detach())
        if step == settings.steps:
            break
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        with torch.no_grad():
            z, speed = _nesterov(z, speed, clipped(gradient, settings.clip), settings)
    assert top is not None
    return Found(best.detach(), top, torch.stack(history))


def clipped(gradient: Tensor, limit: float) -> Tensor:
    """Each sample's gradient [B,*S] scaled down to the largest norm."""
    norm = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
    return gradient * (limit / norm).clamp(max=1.0).view(-1, *[1] * (gradient.ndim - 1))


def _nesterov(z: Tensor, speed: Tensor, gradient: Tensor, settings: Ascent) -> tuple[Tensor, Tensor]:
    speed = settings.momentum * speed + gradient
    return (z - settings.lr * (gradient + settings.momentum * speed)).detach(), speed
