"""Nets that read sequences. Legend: B sequences, L length, V letters, W width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.domains.sequence.tokens import rows


class Block(nn.Module):
    """A residual dilated convolution of [B,W,L] with its own normalisation over channels."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv1d(width, width, kernel, padding=dilation * (kernel // 2), dilation=dilation)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, h: Tensor) -> Tensor:
        change: Tensor = self.mix(F.gelu(self.conv(F.gelu(self.norm(h)))))
        return h + change


class DilatedCNN(nn.Module):
    """The DNA net of DRAKES (after Stark et al. 2024) without its time input: dilated convolutions over the sequence.

    Any length; the first layer is linear in the rows, so that soft rows are legal input. With `places` the length is
    fixed, and an embedding [W,L] tells places apart, which convolutions alone cannot.
    """

    meta: dict[str, Any]  # what the net was made from, for whoever saves it

    def __init__(self, size: int, width: int, kernel: int, dilations: list[int], places: int = 0) -> None:
        super().__init__()
        self.size = size
        self.places = nn.Parameter(torch.zeros(width, places)) if places else None
        self.embed = nn.Conv1d(size + 1, width, kernel, padding=kernel // 2)
        self.blocks = nn.ModuleList(Block(width, kernel, dilation) for dilation in dilations)
        self.out = nn.Sequential(nn.GroupNorm(1, width), nn.GELU(), nn.Conv1d(width, size, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,L,V] of ids [B,L] or rows [B,L,V+1]."""
        h = self.embed(rows(x, self.size).to(self.embed.weight.dtype).transpose(1, 2))
        h = h if self.places is None else h + self.places
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.out(h).transpose(1, 2)
        return logits


def thinned(h: Tensor, share: float, gen: torch.Generator | None) -> Tensor:
    """Dropout with draws of its own, so that a resumed run repeats them."""
    if gen is None or share == 0:
        return h
    kept = torch.rand(h.shape, generator=gen, device=gen.device).to(h.device) >= share
    return h * kept / (1 - share)


class Oracle(nn.Module):
    """Rows [B,L,V] to one number each: `raw` says it in deviations from the mean of the data that it learned from."""

    space = "onehot"
    centre: Tensor
    scale: Tensor

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor, cond: dict[str, Any]) -> Tensor:
        """[B] of rows [B,L,V]."""
        return self.centre + self.scale * self.raw(x)

    def raw(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        """In deviations from the data's mean, [B]; a generator switches dropout on."""
        raise NotImplementedError


class Pooled(Oracle):
    """Two convolutions, then means and maxima over the sequence."""

    def __init__(self, size: int, width: int, kernel: int, dropout: float) -> None:
        super().__init__(dropout)
        self.first = nn.Conv1d(size, width, kernel, padding=kernel // 2)
        self.second = nn.Conv1d(width, width, 7, padding=3)
        self.head = nn.Sequential(nn.Identity(), nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))

    def raw(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        h = F.max_pool1d(F.gelu(self.first(x.to(self.first.weight.dtype).transpose(1, 2))), 4, ceil_mode=True)
        h = F.gelu(self.second(h))
        out: Tensor = self.head(thinned(torch.cat([h.amax(2), h.mean(2)], 1), self.dropout, gen))
        return out[:, 0].float()


class Attentive(Oracle):
    """Dilated residual convolutions and a learned weighting of places."""

    def __init__(self, size: int, width: int, kernel: int, dropout: float) -> None:
        super().__init__(dropout)
        self.embed = nn.Conv1d(size, width, kernel, padding=kernel // 2)
        self.blocks = nn.ModuleList(Block(width, 5, dilation) for dilation in (1, 2, 4, 8))
        self.gate, self.value = nn.Conv1d(width, 4, 1), nn.Conv1d(width, width, 1)
        self.head = nn.Sequential(nn.Identity(), nn.Linear(4 * width, 1))

    def raw(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        h = self.embed(x.to(self.embed.weight.dtype).transpose(1, 2))
        for block in self.blocks:
            h = block(h)
        shares = torch.softmax(self.gate(h).float(), 2).to(h.dtype)
        pooled = torch.einsum("bgl,bwl->bgw", shares, F.gelu(self.value(h))).flatten(1)
        out: Tensor = self.head(thinned(pooled, self.dropout, gen))
        return out[:, 0].float()


READERS = {"pooled": Pooled, "attentive": Attentive}
