"""Stored trajectories, and how likely they are under any denoiser. Legend: B rows, *S sample shape, K steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Prediction, index_cond, repeat_cond
from limbeck.core.diffusion.draws import Generator
from limbeck.core.diffusion.sampling import Kernel, rematerialised, trajectory


@dataclass(frozen=True)
class Rollout:
    """What a sampler did: states [K+1,B,*S] (detached: a gradient through a stored state cancels the score function's).

    `usable` lists the steps that have a density; a deterministic one (the last, usually) has none.
    """

    states: Tensor
    times: Tensor  # [K+1]
    cond: Encoded
    kernel: Kernel
    usable: tuple[int, ...]
    together: int = 1  # steps in one forward: 1 for large nets, many for small ones

    @property
    def x(self) -> Tensor:
        """The samples [B,*S]."""
        return self.states[-1]

    def last(self, count: int) -> Rollout:
        """With the last `count` usable steps alone."""
        return replace(self, usable=self.usable[-count:])

    def rows(self, index: Tensor) -> Rollout:
        """Rows of the batch, by index."""
        return replace(self, states=self.states[:, index], cond=index_cond(self.cond, index))

    def log_prob(self, denoiser: Denoiser, reduce: str = "sum") -> Tensor:
        """log p(x_s | x_t) of the usable steps under a denoiser [K',B]."""

        def each(pred: Prediction, x: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return self.kernel.log_prob(pred, x, x_s, t, s, reduce)

        return self._each(denoiser, each)

    def kl(self, denoiser: Denoiser, reference: Denoiser, reduce: str = "sum") -> Tensor:
        """KL(denoiser || reference) of the usable steps at the stored states [K',B], with gradient in the first."""

        def each(pred: Prediction, x: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
            with torch.no_grad():
                fixed = reference.predict(x, t, repeat_rows(self.cond, len(x) // self.states.shape[1]))
            return self.kernel.kl(pred, fixed, x, t, s, reduce)

        return self._each(denoiser, each)

    def _each(self, denoiser: Denoiser, value: Callable[..., Tensor]) -> Tensor:
        """`value` of every usable step: `together` of them in one forward.

        One at a time, activations are recomputed in the backward pass: memory for one step, whatever K.
        """
        walker = rematerialised(denoiser) if self.together == 1 else denoiser
        rows, out = self.states.shape[1], []
        for part in torch.split(torch.tensor(self.usable), self.together):
            x, x_s = self.states[part].flatten(0, 1), self.states[part + 1].flatten(0, 1)
            t, s = (self.times[i].repeat_interleave(rows) for i in (part, part + 1))
            pred = walker.predict(x, t, repeat_rows(self.cond, len(part)))
            out.append(value(pred, x, x_s, t, s).view(len(part), rows))
        return torch.cat(out)


def repeat_rows(cond: Encoded, times: int) -> Encoded:
    """A condition of B rows as times * B rows."""
    return {key: rows.repeat(times, *[1] * (rows.ndim - 1)) for key, rows in cond.items()}


@torch.no_grad()
def roll(
    denoiser: Denoiser,
    kernel: Kernel,
    x: Tensor,
    times: Tensor,
    cond: Encoded | None,
    gen: Generator,
    together: int = 1,
) -> tuple[Rollout, Tensor]:
    """Walk from x [B,*S] and keep every state -> (rollout, log p of its usable steps [K',B] under this denoiser)."""
    cond = repeat_cond(cond or {}, len(x))
    states, logp, usable = [x], [], []
    for step in trajectory(denoiser, kernel, x, times, cond, gen):
        states.append(step.x_next)
        found = step.logp
        if found is not None:
            usable.append(step.i)
            logp.append(found)
    if not usable:
        raise ValueError("this sampler is deterministic, so its steps have no density; use eta > 0")
    return Rollout(torch.stack(states), times.to(x.device), cond, kernel, tuple(usable), together), torch.stack(logp)
