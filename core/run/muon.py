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
        """One update of every parameter with a gradient; matrices of one shape go together (few kernels on a GPU)."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            matrices: dict[tuple[object, ...], list[Tensor]] = {}
            for p in filter(is_matrix, trained):
                matrices.setdefault((len(p), p.numel(), p.dtype, p.device), []).append(p)
            if trained:
                torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            for alike in matrices.values():
                self._matrices(alike, group)
            if rest := [p for p in trained if not is_matrix(p)]:
                self._adam(rest, group)

    def _matrices(self, alike: list[Tensor], group: dict[str, Any]) -> None:
        beta, grads = group["betas"][0], [_grad(p) for p in alike]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in alike]
        torch._foreach_lerp_(momenta, grads, 1 - beta)
        update = orthogonal(torch.stack([g.flatten(1) for g in torch._foreach_lerp(grads, momenta, beta)]))
        moves = [one.view_as(p) for one, p in zip(update, alike, strict=True)]
        torch._foreach_add_(alike, moves, alpha=-group["lr"] * 0.2 * max(update.shape[1:]) ** 0.5)

    def _adam(self, rest: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        grads, states = [_grad(p) for p in rest], [self.state[p] for p in rest]
        for p, state in zip(rest, states, strict=True):
            if not state:
                state |= {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            state["step"] += 1
        counts = [float(state["step"]) for state in states]
        means, squares = [state["mean"] for state in states], [state["square"] for state in states]
        torch._foreach_lerp_(means, grads, 1 - first)
        torch._foreach_lerp_(squares, torch._foreach_mul(grads, grads), 1 - second)
        scales = torch._foreach_div(squares, [1 - second**n for n in counts])
        torch._foreach_sqrt_(scales)
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_addcdiv_(rest, means, scales, [-group["lr"] / (1 - first**n) for n in counts])


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def is_matrix(p: Tensor) -> bool:
    """Whether Muon trains it: both sides of [out, rest] are at least SMALLEST."""
    return p.ndim >= 2 and min(len(p), p.numel() // len(p)) >= SMALLEST


def orthogonal(g: Tensor) -> Tensor:
    """Newton-Schulz: matrices g [n, rows, columns] with their singular values moved near one, in g's dtype."""
    a, b, c = QUINTIC
    tall = g.shape[1] > g.shape[2]
    x = (g / (g.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).bfloat16()
    x = x.mT if tall else x
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    out: Tensor = (x.mT if tall else x).to(g.dtype)
    return out
