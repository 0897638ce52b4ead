"""Factories of the embedded image pieces: data, and a fresh network to train as a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Model
from limbeck.core.run.build import Batch, Build
from limbeck.domains.image import config as settings
from limbeck.domains.image import models
from limbeck.domains.image.data import FluentData
from limbeck.domains.image.teacher import embedded_model, folder_of


class FluentPieces:
    """The slot `data`: draws for the global batch, hands out this process's rows."""

    def __init__(self, config: settings.Fluent) -> None:
        self.captions, self.vary = config.captions, config.vary
        self.set = FluentData(config.size)
        chosen = self.set.eval_names[: config.names] if config.names else self.set.names
        self.among = torch.tensor([self.set.index[name] for name in chosen])

    def drawn(self, n: int, gen: torch.Generator) -> Tensor:
        """Numbers [n] of uniformly drawn pictures."""
        return self.among[torch.randint(len(self.among), (n,), generator=gen)]

    def batch(self, n: int, gen: torch.Generator, rows: slice) -> Batch:
        """x [b,3,H,W] in [-1,1] and captions: rows of a batch of n (all are drawn: placing a picture costs .1 ms)."""
        x, texts, _ = self.set.batch(self.drawn(n, gen), gen, self.captions, self.vary)
        return Batch(x[rows], texts[rows])

    def prompts(self, n: int, gen: torch.Generator, rows: slice = slice(None)) -> list[str]:
        """Captions without pictures."""
        return self.set.caption(self.drawn(n, gen), gen, self.captions)[rows]


def data(config: settings.Fluent, build: Build) -> FluentPieces:
    """The slot `data` with the embedded pictures."""
    return FluentPieces(config)


def fresh_teacher(config: settings.FreshUNet, build: Build) -> Model:
    """The slot `teacher` of `image/teacher`: a net to train, rectified flow in pixels, MiniLM token states."""
    if config.start is None:
        net, size = models.build_unet(config.size, tuple(config.channels), config.layers), config.size
    else:
        net, meta = models.load_teacher(folder_of(config.start))
        size = meta["size"]
    return embedded_model(net.to(build.device), (3, size, size), "flow", build.device, "fresh")
