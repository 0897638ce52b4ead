"""How well a masked model knows held-out sequences: nats a letter, and the k-mers of what it draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Model
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.distillation.denoising import token_errors
from limbeck.core.run.build import Build
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import alike
from limbeck.domains.sequence import config as settings

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
    size, drawn = model.codec.alphabet.size, samples(model, denoiser, config, build)
    share = torch.bincount(held.flatten(), minlength=size).double() / held.numel()
    found = {"nats a letter": bound(denoiser, held.to(build.device), build.seed)}
    found["independent letters"] = float(-(share * share.clamp_min(1e-12).log()).sum())
    k, other = config.kmer, data.natural(2 * config.count, generator(build.seed, "likelihood.other", 0))
    one, two = other[: len(other) // 2], other[len(other) // 2 :]
    found["k-mer correlation"] = correlation(drawn, two, k, size)
    found["natural against natural"] = correlation(one, two, k, size)
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


def samples(model: Model, denoiser: Denoiser, config: settings.Likelihood, build: Build) -> Tensor:
    """Free samples [count,L] of a denoiser under the model's walk, on the CPU."""
    student, gen = ManyStep(model, denoiser, config.steps, 1.0), generator(build.seed, "likelihood.samples", 0)
    parts = []
    for start in range(0, config.count, 64):
        n = min(64, config.count - start)
        noise = torch.randn(student.draws, n, *model.shape, generator=gen).to(build.device)
        parts.append(student.sample(noise[0], model.encode([model.uncond] * n), list(noise[1:])).x.cpu())
    return torch.cat(parts)


def correlation(a: Tensor, b: Tensor, k: int, size: int) -> float:
    """Pearson's r of the k-mer counts of ids [N,L] and [M,L]."""
    counts = [torch.bincount(alike.words(x, k, size).flatten(), minlength=size**k).double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(counts))[0, 1])
