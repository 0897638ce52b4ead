"""Masked walks that ask the net only about rows whose tokens changed. Legend: B rows, L length."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Features, Output, Prediction, index_cond


class RowCache(Denoiser):
    """A denoiser without a time input, for one trajectory: a row that did not change keeps its last raw output.

    MDLM's cache (Sahoo et al. 2024) asks again about the whole batch as soon as one row changed. The condition of a row
    is taken to stay. Where gradients are on, for soft rows and for features, it only passes on.
    """

    def __init__(self, inner: Denoiser, kept: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(inner.process, inner.kind)
        self.inner, self.kept = inner, kept

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        found: Output = self.inner(x_t, t, cond, features)
        return found

    def wrap(self, raw: Tensor, x_t: Tensor, t: Tensor, features: Features | None = None) -> Prediction:
        return self.inner.wrap(raw, x_t, t, features)

    def pick(self, index: Tensor) -> Denoiser:
        kept = None if self.kept is None else (self.kept[0][index], self.kept[1][index])
        return RowCache(self.inner.pick(index), kept)

    def predict(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Prediction:
        if features or torch.is_grad_enabled() or x_t.is_floating_point():
            return self.inner.predict(x_t, t, cond, features)
        if self.kept is None or self.kept[0].shape != x_t.shape:
            raw = self.inner.predict(x_t, t, cond).raw
        else:
            raw = self._renewed(x_t, t, cond, *self.kept)
        self.kept = (x_t, raw)
        return self.inner.wrap(raw, x_t, t.expand(len(x_t)) if t.ndim == 0 else t)

    def _renewed(self, x_t: Tensor, t: Tensor, cond: Encoded, seen: Tensor, raw: Tensor) -> Tensor:
        """The last raw output with the changed rows asked anew."""
        index = (x_t != seen).any(1).nonzero()[:, 0]
        if not len(index):
            return raw
        here = {key: rows if len(rows) == 1 else index_cond({key: rows}, index)[key] for key, rows in cond.items()}
        fresh = self.inner.predict(x_t[index], t if t.ndim == 0 or len(t) == 1 else t[index], here).raw
        return raw.index_copy(0, index, fresh)
