"""Classifier guidance of discrete models. Legend: B samples, L length, V letters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Prediction
from limbeck.core.diffusion.discrete import DiscretePrediction


class GradientGuided(Denoiser):
    """log p(x0|x_t) + scale * dr/dx at the rows p(x0|x_t), the first-order term of the reward to come (CG of DRAKES).

    `reward` maps rows [B,L,V] to [B] with a gradient. Exact for a reward linear in the letters of an independent law:
    with scale = 1/T the walk draws p e^(r/T). Deviation from DRAKES, which differentiates a classifier of x_t: here the
    slope is taken at the predicted letters, so it costs one reward and no backward pass of the net.
    """

    def __init__(self, inner: Denoiser, reward: Callable[[Tensor], Tensor], scale: float) -> None:
        super().__init__(inner.process, inner.kind)
        self.inner, self.reward, self.scale = inner, reward, scale

    def begin(self, times: Tensor) -> Denoiser:
        return GradientGuided(self.inner.begin(times), self.reward, self.scale)

    def pick(self, index: Tensor) -> Denoiser:
        return GradientGuided(self.inner.pick(index), self.reward, self.scale)

    def predict(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Prediction:
        pred = self.inner.predict(x_t, t, cond, features)
        if not isinstance(pred, DiscretePrediction):
            raise ValueError("gradient guidance of this kind is for tokens; the denoiser is continuous")
        logits = pred.logp_x0 + self.scale * self.slope(pred.logp_x0)
        return DiscretePrediction(logits, pred.x_t, pred.t, pred.process, pred.kind, pred.features)

    def slope(self, logp: Tensor) -> Tensor:
        """dr/dx [B,L,V] at the rows exp(logp)."""
        with torch.enable_grad():
            rows = logp.detach().exp().requires_grad_(True)
            return torch.autograd.grad(self.reward(rows).sum(), rows)[0]
