"""Muon: momentum made orthogonal for matrices, AdamW for all else, under one learning rate."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz step: steep at 0, so that small singular values rise fast
ROUNDS = 3
SMALLEST = 32  # a matrix with a shorter side (an output layer) is left to AdamW


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with the scale of Liu et al. 2025 (arXiv 2502.16982, eq. 4): 0.2 sqrt(max(m, n)).

    Weights of two and more axes are matrices [out, rest]. The momentum is Nesterov's with betas[0]; what is left to
    AdamW uses both betas. Deviation: three Newton-Schulz rounds instead of five, in bfloat16 as in the paper's code.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if trained:
                torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            for p in trained:
                (self._matrix if is_matrix(p) else self._adam)(p, self.state[p], group)

    def _matrix(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta = group["betas"][0]
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        assert p.grad is not None
        momentum.lerp_(p.grad, 1 - beta)
        update = orthogonal(p.grad.lerp(momentum, beta).flatten(1))
        p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)

    def _adam(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        if not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        assert p.grad is not None
        state["step"] += 1
        n = float(state["step"])
        mean, square = state["mean"].lerp_(p.grad, 1 - first), state["square"].lerp_(p.grad.square(), 1 - second)
        scale = (square / (1 - second**n)).sqrt_().add_(group["eps"])
        p.addcdiv_(mean, scale, value=-group["lr"] / (1 - first**n))


def is_matrix(p: Tensor) -> bool:
    """Whether Muon trains it: both sides of [out, rest] are at least SMALLEST."""
    return p.ndim >= 2 and min(len(p), p.numel() // len(p)) >= SMALLEST


def orthogonal(g: Tensor) -> Tensor:
    """Newton-Schulz: g [m, n] with its singular values moved near one, in g's dtype."""
    a, b, c = QUINTIC
    x = (g / (g.norm() + 1e-7)).bfloat16()
    x = x.T if len(x) > x.shape[1] else x
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.T if len(g) > g.shape[1] else x).to(g.dtype)
