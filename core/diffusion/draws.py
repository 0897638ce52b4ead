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


Generator = torch.Generator | Shared


def normal(like: Tensor, gen: Generator) -> Tensor:
    """Standard normal numbers of the shape [B,*S], dtype and device of `like`."""
    if isinstance(gen, Shared):
        shape = (gen.batch, *like.shape[1:])
        return torch.randn(shape, generator=gen.whole, device=gen.device, dtype=like.dtype)[gen.rows].to(like.device)
    return torch.randn(like.shape, generator=gen, device=gen.device, dtype=like.dtype).to(like.device)


def uniform(shape: torch.Size | tuple[int, ...], gen: Generator) -> Tensor:
    """float64 in [0,1) of the shape [B,*S], on the generator's device."""
    if isinstance(gen, Shared):
        whole = (gen.batch, *shape[1:])
        return torch.rand(whole, generator=gen.whole, dtype=torch.float64, device=gen.device)[gen.rows]
    return torch.rand(shape, generator=gen, dtype=torch.float64, device=gen.device)
