"""Masked walks that ask the net only about rows whose tokens changed. Legend: B rows, L length."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Features, Output, Prediction, index_cond

Kept = tuple[Tensor, Tensor, Encoded]  # tokens [B,L], raw output and condition of the last rows


class RowCache(Denoiser):
    """A denoiser without a time input, for one trajectory: a row that did not change keeps its last raw output.

    MDLM's cache (Sahoo et al. 2024) asks again about the whole batch as soon as one row changed. Here a row is its
    tokens and its condition, both compared: guidance goes around this, and no row is answered from another's.
    Where gradients are on, for soft rows and for features it only passes on.
    """

    def __init__(self, inner: Denoiser, kept: Kept | None = None) -> None:
        super().__init__(inner.process, inner.kind)
        self.inner, self.kept = inner, kept

    def begin(self, times: Tensor) -> Denoiser:
        """One that keeps nothing yet."""
        return type(self)(self.inner)

    def pick(self, index: Tensor) -> Denoiser:
        """What is kept of the rows `index`; a batch of several blocks (guidance's null rows) is picked block by block.

        Which rows these are need not be certain: all are compared when they are asked about.
        """
        if self.kept is None or len(index) == 0:
            return type(self)(self.inner.pick(index))
        x, raw, cond = self.kept
        blocks = torch.arange(max(1, len(x) // len(index)), device=index.device)[:, None] * len(index)
        rows = (index + blocks).flatten().clamp(max=len(x) - 1)
        return type(self)(self.inner.pick(index), (x[rows], raw[rows], index_cond(cond, rows)))

    def wrap(self, raw: Tensor, x_t: Tensor, t: Tensor, features: Features | None = None) -> Prediction:
        return self.inner.wrap(raw, x_t, t, features)

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        """The raw output [B,L,V]; t and cond have a row each."""
        if features or torch.is_grad_enabled() or x_t.is_floating_point():
            found: Output = self.inner(x_t, t, cond, features)
            return found
        raw = self._answer(x_t, t, cond)
        self.kept = (x_t.clone(), raw, cond)  # whoever asks may write into its state
        return raw

    def _answer(self, x_t: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        """The last raw output with the changed rows asked anew."""
        if self.kept is None or not _alike(self.kept, x_t, cond):
            whole: Tensor = self.inner(x_t, t, cond)
            return whole
        seen, raw, before = self.kept
        index = (_differs(x_t, seen) | _other(cond, before, x_t)).nonzero()[:, 0]
        if len(index) == 0:
            return raw
        return raw.index_copy(0, index, self.inner(x_t[index], t[index], index_cond(cond, index)))


def _alike(kept: Kept, x_t: Tensor, cond: Encoded) -> bool:
    """Whether the kept rows can be compared with these at all."""
    shapes = {key: value.shape for key, value in cond.items()}
    return kept[0].shape == x_t.shape and {key: value.shape for key, value in kept[2].items()} == shapes


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Which rows are not the same, bool [B]."""
    return (a != b).flatten(1).any(1) if a.ndim > 1 else a != b


def _other(cond: Encoded, before: Encoded, x_t: Tensor) -> Tensor:
    """Which rows have another condition, bool [B]."""
    changed = torch.zeros(len(x_t), dtype=torch.bool, device=x_t.device)
    for key, value in cond.items():
        if value is not before[key]:
            changed = changed | _differs(value, before[key])
    return changed
