"""Draws of the rows that one process has of a batch: the same numbers whatever the number of processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shared:
    """The generator of a whole batch of `batch` rows, of which `rows` are this process's."""

    whole: torch.Generator
    batch: int
    rows: slice

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return self.whole.device


@dataclass
class Given:
    """Uniform draws from standard normal noises [B,L] that were made before, one for each call, in order.

    Two samplers with the same noises are paired: a walk on tokens becomes a function of its noise.
    """

    noises: list[Tensor]
    used: int = 0

    @property
    def device(self) -> torch.device:
        """Where the noises lie."""
        return self.noises[0].device

    def take(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """float64 in (0,1) of the shape [B,L], or [B] (of the first column)."""
        if self.used == len(self.noises):
            raise ValueError(f"this walk draws more often than the {len(self.noises)} noises it was given")
        noise, self.used = self.noises[self.used], self.used + 1
        found = noise if len(shape) > 1 else noise[:, 0]
        if found.shape != torch.Size(shape):
            raise ValueError(f"noises of shape {list(noise.shape)} cannot stand for draws of shape {list(shape)}")
        return torch.special.ndtr(found.double())


Generator = torch.Generator | Shared | Given


def normal(like: Tensor, gen: Generator) -> Tensor:
    """Standard normal numbers of the shape [B,*S], dtype and device of `like`."""
    if isinstance(gen, Given):
        raise ValueError("given noises stand for uniform draws; a continuous walk needs a torch.Generator")
    if isinstance(gen, Shared):
        shape = (gen.batch, *like.shape[1:])
        return torch.randn(shape, generator=gen.whole, device=gen.device, dtype=like.dtype)[gen.rows].to(like.device)
    return torch.randn(like.shape, generator=gen, device=gen.device, dtype=like.dtype).to(like.device)


def uniform(shape: torch.Size | tuple[int, ...], gen: Generator) -> Tensor:
    """float64 in [0,1) of the shape [B,*S], on the generator's device."""
    if isinstance(gen, Given):
        return gen.take(shape)
    if isinstance(gen, Shared):
        whole = (gen.batch, *shape[1:])
        return torch.rand(whole, generator=gen.whole, dtype=torch.float64, device=gen.device)[gen.rows]
    return torch.rand(shape, generator=gen, dtype=torch.float64, device=gen.device)
