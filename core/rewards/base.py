"""Rewards: samples in, one number (or one per axis) a sample out, always maximised; and rewards made of rewards.

Legend: B samples, *S sample shape, R axes. Nothing here knows what a sample is.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from limbeck.core.run.errors import BadInput, LimbeckError

Condition = dict[str, Any]  # raw inputs, a row a sample: {"prompt": texts, …}, lists or tensors
Rule = Literal["mean", "min", "lower"]


class Score(Protocol):
    """What a reward computes; x [B,*S] is in the reward's space, t [B] is given to noise-aware ones alone."""

    def __call__(self, x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        """[B] or [B,R]."""


@dataclass(frozen=True)
class Reward:
    """A score with what callers must know of it.

    `space` is what x has to be (pixels, latent, frames, views, tokens, onehot; "any" for what does not care);
    `accepts_soft`: rows of a simplex in place of one-hot tokens; `noise_aware`: also judges x_t, given t.
    """

    score: Score
    name: str
    space: str = "any"
    differentiable: bool = False
    accepts_soft: bool = False
    noise_aware: bool = False
    chunk: int | None = None  # samples at a time

    def __call__(
        self, x: Tensor, cond: Condition, *, t: Tensor | None = None, gen: torch.Generator | None = None
    ) -> Tensor:
        """[B] or [B,R] float32; a gradient reaches x where the reward is differentiable."""
        if t is not None and not self.noise_aware:
            raise LimbeckError(f"the reward {self.name} judges clean samples; give it x0, not x_t")
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            size = self.chunk or max(1, len(x))
            cuts = [slice(i, i + size) for i in range(0, len(x), size)]
            parts = [self.score(x[c], pick(cond, c), t=None if t is None else t[c], gen=gen).float() for c in cuts]
            values = torch.cat(parts)
        if values.ndim not in (1, 2) or len(values) != len(x):
            raise LimbeckError(f"the reward {self.name} gave {list(values.shape)} for {len(x)} samples; give one each")
        return values

    def needed_differentiable(self, method: str) -> Reward:
        """Itself, for a method that needs its gradient; BadInput otherwise."""
        if not self.differentiable:
            raise BadInput(
                f"{method} follows the gradient of its reward and {self.name} has none; use ddpo, which needs none"
            )
        return self


def as_reward(made: Any, name: str) -> Reward:
    """What a reward piece's factory returns: a Reward, or a plain function (x, cond, *, t, gen) without gradient."""
    return replace(made, name=name) if isinstance(made, Reward) else Reward(made, name)


def pick(cond: Condition, index: slice | Tensor) -> Condition:
    """Rows of a condition, by a slice or by an index [N]."""
    if isinstance(index, slice):
        return {key: rows[index] for key, rows in cond.items()}
    order = index.tolist()
    return {k: rows[index] if isinstance(rows, Tensor) else [rows[i] for i in order] for k, rows in cond.items()}


def total(parts: Sequence[tuple[Reward, float]], name: str = "sum") -> Reward:
    """The weighted sum of rewards of one number each; the parts' axes must agree."""
    return _joined(name, [part for part, _ in parts], lambda found: sum_of(found, [weight for _, weight in parts]))


def sum_of(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i v_i."""
    out = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        out = out + value * weight
    return out


def ensemble(parts: Sequence[Reward], rule: Rule = "mean", width: float = 1.0) -> Reward:
    """Rewards of one scale as one: their mean, their minimum, or mean - width * standard deviation ("lower").

    The lower confidence bound does not pay for samples on which the members disagree.
    """
    rules: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda v: v.mean(0),
        "min": lambda v: v.amin(0),
        "lower": lambda v: v.mean(0) - width * v.std(0, correction=0),
    }
    return _joined(f"{rule} of {len(parts)}", list(parts), lambda found: rules[rule](torch.stack(list(found))))


def _joined(name: str, parts: list[Reward], rule: Callable[[Sequence[Tensor]], Tensor]) -> Reward:
    spaces = {part.space for part in parts} - {"any"}
    if len(spaces) > 1:
        raise BadInput(f"rewards of different spaces cannot be joined: {', '.join(sorted(spaces))}")

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return rule([part(x, cond, t=t, gen=gen) for part in parts])

    flags = {f: all(getattr(p, f) for p in parts) for f in ("differentiable", "accepts_soft", "noise_aware")}
    return Reward(score, name, spaces.pop() if spaces else "any", **flags)


def changed(reward: Reward, change: Callable[[Tensor], Tensor]) -> Reward:
    """A function of a reward's values, elementwise."""

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return change(reward(x, cond, t=t, gen=gen))

    return replace(reward, score=score, chunk=None)


def hinge(reward: Reward, target: float) -> Reward:
    """-max(0, target - r): a satisfied reward stops pulling (IterComp)."""
    return changed(reward, lambda r: -(target - r).relu())


def clipped(reward: Reward, low: float | None = None, high: float | None = None) -> Reward:
    """r kept inside [low, high]; no gradient outside."""
    return changed(reward, lambda r: r.clamp(low, high))


def axis(reward: Reward, index: int) -> Reward:
    """One axis of a reward of several."""
    return changed(reward, lambda r: r[:, index])


def standardised(reward: Reward, mean: float, std: float) -> Reward:
    """(r - mean)/std with fixed numbers, such as those of the reference model's samples."""
    return changed(reward, lambda r: (r - mean) / std)


def zscored(reward: Reward, eps: float = 1e-6) -> Reward:
    """(r - mean)/(std + eps) over the rows of the same prompt in this call; a prompt's only row, or equal ones, give 0.

    Mean and deviation carry no gradient: with it, the sum over a prompt's rows would be constant. It needs no memory,
    so neither order nor a resume matters; a prompt's rows must be in one call (per_prompt neighbours of a process are).
    """

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        values = reward(x, cond, t=t, gen=gen)
        prompts = cond.get("prompt", [""] * len(x))
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([place[prompt] for prompt in prompts], device=values.device)
        return _centred(values, torch.nn.functional.one_hot(rows, len(place)).to(values), eps)

    return replace(reward, score=score, chunk=None)


def _centred(values: Tensor, group: Tensor, eps: float) -> Tensor:
    """z of values [B] or [B,R] within groups [B,G] of zeros and ones."""
    fixed, share = values.detach(), group / group.sum(0)
    centre = group @ (share.T @ fixed)
    std = (group @ (share.T @ (fixed - centre).square())).sqrt()
    return (values - centre) * torch.where(std > eps, 1 / (std + eps), 0.0)


def cached(reward: Reward, limit: int = 65536) -> Reward:
    """Each (sample, condition) is scored once, by content; for rewards without gradient that cost more than a hash."""
    known: OrderedDict[bytes, Tensor] = OrderedDict()

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        keys = [content(x[i], cond, i, t) for i in range(len(x))]
        new = {key: i for i, key in reversed(list(enumerate(keys))) if key not in known}
        if new:
            rows = torch.tensor(sorted(new.values()))
            where = rows.to(x.device)
            values = reward(x[where], pick(cond, rows), t=None if t is None else t[where], gen=gen).cpu()
            known.update({keys[i]: value for i, value in zip(rows.tolist(), values, strict=True)})
        out = torch.stack([known[key] for key in keys]).to(x.device)
        for key in keys:
            known.move_to_end(key)
        while len(known) > limit:
            known.popitem(last=False)
        return out

    return replace(reward, score=score, differentiable=False, chunk=None)


def content(x: Tensor, cond: Condition, row: int, t: Tensor | None = None) -> bytes:
    """SHA-256 of one sample [*S] with its row of the condition."""
    found = hashlib.sha256(str((x.dtype, tuple(x.shape))).encode())
    found.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for key in sorted(cond):
        value = cond[key][row]
        found.update(key.encode() + b"\0")
        found.update(value.cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    if t is not None:
        found.update(t[row].cpu().numpy().tobytes())
    return found.digest()
