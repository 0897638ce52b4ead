"""Classifier-free guidance and Perp-Neg as combinations of predictions; the guided model is itself a denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import (
    Denoiser,
    Encoded,
    Features,
    Output,
    Prediction,
    cat_cond,
    index_cond,
)
from limbeck.core.diffusion.process import expand, working_dtype

Scale = float | Tensor
AGAINST = "against"  # key of what a condition is not to be


def _mix(cond: Tensor, uncond: Tensor, scale: Scale) -> Tensor:
    """u + g (c - u) (Ho and Salimans in the convention of diffusers), written so that g = 1 is c bit for bit."""
    dtype = working_dtype(cond, uncond)
    cond, uncond = cond.to(dtype), uncond.to(dtype)
    if isinstance(scale, Tensor):
        scale = expand(scale.to(device=cond.device, dtype=dtype), cond)
    return cond + (scale - 1) * (cond - uncond)


def combine(cond: Prediction, uncond: Prediction, scale: Scale) -> Prediction:
    """Guide one prediction by another at the same (x_t, t); g = 1 is cond alone, g = 0 uncond alone."""
    kind = cond.kind if cond.kind == uncond.kind else "x0"
    raw = _mix(cond.as_kind(kind), uncond.as_kind(kind), scale)
    return Prediction(raw, cond.x_t, cond.t, cond.process, kind, cond.features)


def perpendicular(a: Tensor, b: Tensor) -> Tensor:
    """The part of a at right angles to b, per sample [B,*S]."""
    share = (a * b).flatten(1).sum(1) / b.square().flatten(1).sum(1).clamp_min(torch.finfo(b.dtype).tiny)
    return a - expand(share, a) * b


def perp_neg(
    cond: Prediction, uncond: Prediction, others: Sequence[Prediction], weights: Tensor, scale: Scale
) -> Prediction:
    """Perp-Neg (Armandpour et al. 2023, arXiv 2304.04968): guidance away from K other conditions.

    u + g (e + sum_k w_k perp(e_k, e)) with e = c - u and e_k = c_k - u at the same (x_t, t), weights w [B,K] being
    negative: what another condition has in common with the wanted one is never taken away. It is `combine` with
    c + sum_k w_k perp(e_k, e) for c. All nets are compared in one space; which one makes no difference.
    """
    kind = cond.kind
    dtype = working_dtype(cond.raw, uncond.raw)
    c, u = cond.raw.to(dtype), uncond.as_kind(kind).to(dtype)
    away = torch.zeros_like(c)
    for k, other in enumerate(others):
        share = expand(weights[:, k].to(device=c.device, dtype=dtype), c)
        away = away + share * perpendicular(other.as_kind(kind).to(dtype) - u, c - u)
    leant = Prediction(c + away, cond.x_t, cond.t, cond.process, kind, cond.features)
    return combine(leant, uncond, scale)


def blended(prompts: Encoded, asked: Encoded) -> Encoded:
    """The condition of B rows from encoded prompts and the other rows asked of a sample.

    Usually there is a prompt a row. With `shares` [B,P] among the rows there are P prompts, of which each row is a mix;
    `others` [B,K] are the prompts that it is not to be and `against` [B,K] their weights in `perp_neg`.
    """
    if "shares" not in asked:
        return prompts | asked
    rest = {key: value for key, value in asked.items() if key not in ("shares", "others")}
    for k, index in enumerate(asked["others"].unbind(1)):
        rest |= {f"{AGAINST}.{k}.{key}": value[index.to(value.device)] for key, value in prompts.items()}
    return {key: _mixed(value, asked["shares"]) for key, value in prompts.items()} | rest


def _mixed(value: Tensor, shares: Tensor) -> Tensor:
    """Embeddings [P,...] are interpolated; masks and labels are those of the largest share."""
    if not value.is_floating_point():
        return value[shares.argmax(1).to(value.device)]
    return (shares.to(value) @ value.flatten(1)).view(-1, *value.shape[1:])


def unpacked(cond: Encoded) -> tuple[Encoded, list[Encoded], Tensor | None]:
    """A condition without what `blended` packed into it, what it is not to be (K of them), and the weights [B,K]."""
    plain = {key: value for key, value in cond.items() if key.split(".")[0] != AGAINST}
    weights = cond.get(AGAINST)
    count = 0 if weights is None else weights.shape[1]
    heads = [f"{AGAINST}.{k}." for k in range(count)]
    own = [{key.removeprefix(head): v for key, v in cond.items() if key.startswith(head)} for head in heads]
    return plain, [{**plain, **one} for one in own], weights


class Guided(Denoiser):
    """The denoiser that `guide` returns. Both branches go through one batched forward of the inner denoiser."""

    def __init__(self, inner: Denoiser, null: Encoded, scale: Scale, interval: tuple[float, float]) -> None:
        super().__init__(inner.process, inner.kind)
        self.inner, self.null, self.scale, self.interval = inner, null, scale, interval

    def begin(self, times: Tensor) -> Denoiser:
        return Guided(self.inner.begin(times), self.null, self.scale, self.interval)

    def pick(self, index: Tensor) -> Denoiser:
        """Scales and null conditions per sample follow their rows."""
        scale = self.scale
        if isinstance(scale, Tensor) and scale.numel() > 1:
            scale = scale[index.to(scale.device)]
        null = {k: v[index.to(v.device)] if len(v) > 1 else v for k, v in self.null.items()}
        return Guided(self.inner.pick(index), null, scale, self.interval)

    def wrap(self, raw: Tensor, x_t: Tensor, t: Tensor, features: Features | None = None) -> Prediction:
        return self.inner.wrap(raw, x_t, t, features)

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        active = self._active(t, len(x_t))
        if active is not None and len(active) == 0:
            return self.inner(x_t, t, cond, features)
        index = slice(None) if active is None else active
        joined = self._joined(x_t, t, cond, index)
        out = self.inner(*joined, features)
        raw, taps = out if isinstance(out, tuple) else (out, None)
        guided = self._guided(raw, len(x_t), index)
        return guided if taps is None else (guided, [tap[: len(x_t)] for tap in taps])

    def _joined(self, x_t: Tensor, t: Tensor, cond: Encoded, index: Tensor | slice) -> tuple[Tensor, Tensor, Encoded]:
        """The conditional batch followed by the null rows; keys absent from `null` (a camera) are kept."""
        null = {**cond, **self._null_rows(x_t)}
        rows = torch.cat([x_t, x_t[index]]), torch.cat([t, t[index]])
        return *rows, cat_cond([cond, index_cond(null, index)])

    def _null_rows(self, x_t: Tensor) -> Encoded:
        """One row serves all; rows per sample are repeated over the queries of a batch."""
        n = len(x_t)
        for key, value in self.null.items():
            if n % len(value):
                raise ValueError(f"null condition {key!r} has {len(value)} rows for a batch of {n}; give one row")
        return {k: v.to(x_t.device).repeat(n // len(v), *[1] * (v.ndim - 1)) for k, v in self.null.items()}

    def _guided(self, raw: Tensor, n: int, index: Tensor | slice) -> Tensor:
        cond, uncond = raw[:n], raw[n:]
        scale = self._row_scale(n, raw.device)
        if isinstance(index, slice):
            return _mix(cond, uncond, scale)
        part = scale[index] if isinstance(scale, Tensor) else scale
        mixed = _mix(cond[index], uncond, part)
        return cond.to(mixed.dtype).index_copy(0, index, mixed)

    def _row_scale(self, n: int, device: torch.device) -> Scale:
        """A per-sample scale [B]; a batch of several queries of B rows repeats it."""
        if not isinstance(self.scale, Tensor) or self.scale.ndim == 0:
            return self.scale
        if n % len(self.scale):
            raise ValueError(f"guidance scale has {len(self.scale)} rows for a batch of {n}")
        return self.scale.to(device).repeat(n // len(self.scale))

    def _active(self, t: Tensor, n: int) -> Tensor | None:
        """Indices of the rows that need the null branch; None means all, without looking at the numbers."""
        whole = self.interval[0] <= 0 and self.interval[1] >= 1
        if not isinstance(self.scale, Tensor):
            if self.scale == 1:
                return torch.empty(0, dtype=torch.long)
            if whole:
                return None
        first = t.reshape(n, -1)[:, 0]
        needed = (first >= self.interval[0]) & (first <= self.interval[1])
        scale = torch.as_tensor(self._row_scale(n, t.device), device=t.device)
        index = (needed & (scale != 1)).nonzero()[:, 0]
        return None if len(index) == n else index


def guide(denoiser: Denoiser, null: Encoded, scale: Scale, interval: tuple[float, float] = (0.0, 1.0)) -> Denoiser:
    """Classifier-free guidance with scale g (a number or one per sample) inside an interval of t.

    `null` is the null condition or an encoded negative prompt: one row, or one per sample. Rows outside the interval
    (Kynkäänniemi et al.) or with g = 1 are the conditional prediction bit for bit, and cost one row, not two.
    """
    return Guided(denoiser, null, scale, interval)


def with_scale(cond: Encoded, scale: float) -> Encoded:
    """The condition at a guidance scale, for nets that take the scale as an input (key "guidance"); else as it is."""
    return {**cond, "guidance": torch.full_like(cond["guidance"], scale)} if "guidance" in cond else cond


def guided_by(denoiser: Denoiser, null: Encoded, scale: float) -> Denoiser:
    """Classifier-free guidance as pipelines understand a scale: at most 1 is the conditional prediction alone.

    Nets that take the scale as an input (their null condition has the key "guidance") are left as they are.
    """
    return denoiser if scale <= 1 or not null or "guidance" in null else guide(denoiser, null, scale)
