"""How well a masked model knows held-out sequences: nats a letter, and the k-mers of what it draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.distillation.denoising import token_errors
from limbeck.core.run.build import Build
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence import space, statistics

Row = dict[str, float | str]


def build(config: settings.Likelihood, build: Build) -> Callable[[], list[Row]]:
    """Factory of the metric `sequence.likelihood`."""
    return lambda: [row(config, build)]


@torch.no_grad()
def row(config: settings.Likelihood, build: Build) -> Row:
    """The bound on held-out sequences beside that of independent letters, and the k-mer correlation of samples."""
    model, data = build.piece("teacher"), build.piece("data")
    denoiser = build.piece("student").denoiser if build.has("student") else model.denoiser
    held = data.natural(config.count, generator(build.seed, "likelihood.held", 0))
    size, prompts = model.codec.alphabet.size, [model.uncond] * config.count
    drawn = space.draw(model, ManyStep(model, denoiser, config.steps, 1.0), prompts, build.seed, build.device)
    share = torch.bincount(held.flatten(), minlength=size).double() / held.numel()
    found = {"nats a letter": bound(denoiser, held.to(build.device), build.seed)}
    found["independent letters"] = float(-(share * share.clamp_min(1e-12).log()).sum())
    k, other = config.kmer, data.natural(2 * config.count, generator(build.seed, "likelihood.other", 0))
    one, two = other[: len(other) // 2], other[len(other) // 2 :]
    found["k-mer correlation"] = statistics.kmer_pearson(drawn, two, k, size)
    found["natural against natural"] = statistics.kmer_pearson(one, two, k, size)
    return {"sequences": len(held), **found}


def bound(denoiser: Denoiser, x: Tensor, seed: int, levels: int = 32, chunk: int = 64) -> float:
    """MDLM's bound on the negative log-likelihood a letter of ids x [N,L], over `levels` even times, in nats.

    The times are those of a lattice, shifted for each sequence; masks are drawn anew for each.
    """
    gen, total = generator(seed, "likelihood.masks", 0), 0.0
    shift = torch.rand(len(x), generator=gen) / levels
    for level in range(levels):
        for start in range(0, len(x), chunk):
            part = x[start : start + chunk]
            t = (shift[start : start + chunk] + level / levels).clamp_min(1e-3).to(x.device)
            eps = torch.rand(part.shape, generator=gen, dtype=torch.float64).to(x.device)
            pred: Any = denoiser.predict(denoiser.process.add_noise(part, eps, t), t, {})
            total += float(token_errors(pred, part).double().sum())
    return total / levels / len(x)
