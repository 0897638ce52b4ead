"""The table of a design run: rewards and what they gained, k-mers, likelihood, diversity, novelty, and the nulls.

Legend: N sequences, L length. The measures are those of DRAKES (Wang et al. 2024) where it has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Model
from limbeck.core.diffusion.discrete import MaskProcess
from limbeck.core.rewards.metric import gain
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.core.run.table import OWN
from limbeck.core.steering.samplers import in_parts
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence import export, logo, space, statistics, tokens
from limbeck.domains.sequence.proteins import NLL

Row = dict[str, float | str]
Values = dict[str, Tensor]  # by reward, as export.scored has them
FEWEST = 8  # natural sequences that say anything about k-mers


@dataclass(frozen=True)
class Natural:
    """Natural sequences: all that are known, and the high scorers, of which the most are what designs are held to."""

    known: Tensor  # [M,L], for novelty
    reference: Tensor
    other: Tensor  # as many as there are designs, at most half: what natural sequences reach themselves


@dataclass(frozen=True)
class Made:
    """What one generator made, and at what cost."""

    generator: str
    by: str
    ids: Tensor  # [N,L]
    prompts: list[str]
    seconds: float | str = ""
    calls: float | str = ""  # rows of the network a sequence


def build(config: settings.Quality, build: Build) -> Callable[[], list[Row]]:
    """Factory of the metric `sequence.quality`."""
    return lambda: list(rows(config, build))


def rows(config: settings.Quality, build: Build) -> Iterator[Row]:
    """The pretrained model, what the run made, and the nulls; the run's own designs are kept as files."""
    natural, made = naturals(config, build), list(drawn(config, build))
    kept(config, build, made[-1], natural)
    before: Values = {}
    for one in [*made, *(nulls(config, build, natural) if natural else ())]:
        build.note(f"measuring: {one.generator}")
        values = scored(build, one)
        before = before or values  # the pretrained model comes first
        yield row(config, build, one, natural, values) | (gains(before, values) if one.generator == OWN else {})


def prompts(config: settings.Quality, build: Build) -> list[str]:
    """`count` of the recipe's templates over and over; empty ones are passed over where others are given."""
    model: Model = build.piece("teacher")
    given = [prompt for prompt in build.recipe.sample.prompts if prompt] or [model.uncond]
    return [given[i % len(given)] for i in range(config.count)]


def drawn(config: settings.Quality, build: Build) -> Iterator[Made]:
    """The pretrained model's samples, then those of the recipe's sampler or student, timed."""
    model, texts, seed = build.piece("teacher"), prompts(config, build), build.seed
    student: Any = build.piece("student") if build.has("student") else None
    walk = getattr(build.recipe.sampler, "walk", None)
    steps = walk.steps if walk else getattr(student, "steps", config.steps)
    build.note(f"{config.count} sequences of the pretrained model")
    start = time.perf_counter()
    x = space.draw(model, space.teacher_walk(model, steps), texts, seed, build.device)
    yield Made("pretrained", "teacher", x, texts, time.perf_counter() - start, steps)
    if not build.has("sampler") and student is None:
        return
    build.note(f"{config.count} sequences of the run")
    start, calls = time.perf_counter(), steps
    if build.has("sampler"):
        found = in_parts(build.piece("sampler"), texts, seed, space.SAMPLER_CHUNK)
        x, calls = tokens.ids(found.x.cpu(), export.letters(model).size), found.calls
    else:
        x = space.draw(model, student, texts, seed, build.device)
    by = build.recipe.sampler.kind if build.has("sampler") else "student"
    yield Made(OWN, by, x, texts, time.perf_counter() - start, calls)


def naturals(config: settings.Quality, build: Build) -> Natural | None:
    """Natural sequences of the model's length, the best of them by the trained rewards; None where there are none."""
    if config.natural is None and not build.has("data"):
        return None
    data: Any = build.part("data", config.natural) if config.natural is not None else build.piece("data")
    if not hasattr(data, "natural"):
        if config.natural is None:
            return None
        raise BadInput(f"natural: {config.natural.kind} has no natural sequences; take sequence.fasta")
    pool, length = data.natural(config.pool, generator(build.seed, "quality.natural", 0)), model_length(build)
    if pool.shape[1] != length:
        raise BadInput(f"natural sequences have {pool.shape[1]} letters and the model {length}; set data.length")
    if len(pool) < FEWEST:
        return None
    both = [part for part in (getattr(data, name, None) for name in ("train", "held")) if part is not None]
    known = torch.cat(both) if both else pool
    best, gen = high(config, build, pool), generator(build.seed, "quality.halves", 0)
    best = best[torch.randperm(len(best), generator=gen)]
    cut = min(config.count, len(best) // 2)
    return Natural(known, best[cut:], best[:cut])


def model_length(build: Build) -> int:
    """L of the recipe's model."""
    model: Model = build.piece("teacher")
    return model.shape[0]


def high(config: settings.Quality, build: Build, pool: Tensor) -> Tensor:
    """The share `top` of natural sequences [N,L] with the highest trained reward; all of them without rewards."""
    if build.recipe.rewards is None:
        return pool
    build.note(f"the trained rewards of {len(pool)} natural sequences")
    uncond = build.piece("teacher").uncond
    value = export.scored(build, pool, [uncond] * len(pool), splits=("train",))["reward"]
    return pool[value.argsort(descending=True)[: max(FEWEST, round(config.top * len(pool)))]]


def nulls(config: settings.Quality, build: Build, natural: Natural) -> Iterator[Made]:
    """What k-mer correlations, rewards and likelihoods mean: other high scorers, their chain, their letters alone."""
    other, size = natural.other, export.letters(build.piece("teacher")).size
    texts = [build.piece("teacher").uncond] * config.count
    gen = generator(build.seed, "quality.nulls", 0)
    chain = statistics.markov(torch.cat([natural.reference, other]), config.count, size, gen)
    yield Made("natural", "other high scorers", other, texts[: len(other)])
    yield Made("Markov", "first-order chain", chain, texts)
    yield Made("shuffled", "natural letters", statistics.shuffled(other, gen), texts[: len(other)])


def row(config: settings.Quality, build: Build, made: Made, natural: Natural | None, values: Values) -> Row:
    """One generator: medians of rewards, the held-out reward's 95th percentile, and what its letters are like.

    A k-mer correlation grows with the number of sequences: the nulls beside it have as many as the designs, where
    there are enough natural high scorers (the column `sequences` says).
    """
    model: Model = build.piece("teacher")
    alphabet = export.letters(model)
    out: Row = {"generator": made.generator, "by": made.by, "sequences": len(made.ids)}
    out |= rewards(values)
    if natural:
        k = kmer(config, alphabet.name)
        out[f"{k}-mer Pearson"] = statistics.kmer_pearson(made.ids, natural.reference, k, alphabet.size)
    if isinstance(model.denoiser.process, MaskProcess):
        value = log_likelihood(model, made.ids, made.prompts, build.seed, config.levels)
        out["log-likelihood a letter"] = float(value.median()) / made.ids.shape[1]
    out |= recovery(model, made)
    out["diversity"] = statistics.diversity(made.ids, alphabet.size)
    if natural:
        new = made.generator != "natural"
        out["novelty"] = float(statistics.novelty(made.ids, natural.known, alphabet.size).median()) if new else ""
    if alphabet.name != "protein":
        out["GC"] = float(statistics.gc(made.ids, alphabet).mean())
    return out | {"calls": made.calls, "seconds": made.seconds}


def kmer(config: settings.Quality, alphabet: str) -> int:
    """Letters of a k-mer."""
    return config.kmer or (3 if alphabet == "protein" else 6)


def scored(build: Build, made: Made) -> Values:
    """Every reward's values [N]; none where the recipe has no rewards."""
    return export.scored(build, made.ids, made.prompts) if build.recipe.rewards is not None else {}


def rewards(values: Values) -> Row:
    """Medians of every reward, trained and held out, and how high the best twentieth of the held-out sum begins."""
    if not values:
        return {}
    out: Row = {name: float(value.median()) for name, value in values.items() if ": " in name}
    return out | {"held_out: 95th percentile": float(values["held_out"].double().quantile(0.95))}


def gains(before: Values, after: Values) -> Row:
    """The mean gain of every reward over the pretrained model's samples, row by row, with its 95% interval.

    A student's rows come from the same noise as the pretrained model's; those of samplers share the prompt alone, which
    makes the interval wider and no less right. "in sd" counts the deviations of the pretrained model's samples; of a
    protein's negative log-likelihood the relative change of the mean is said besides.
    """
    out: Row = {}
    for name in (name for name in before if ": " in name):
        out |= {f"{name}: {key}": value for key, value in gain(before[name], after[name]).items()}
        split, _, reward = name.partition(": ")
        if reward.startswith(NLL):
            change = float(after[name].double().mean() / before[name].double().mean()) - 1
            out[f"{split}: {reward.removeprefix('-')}: relative change"] = change
    return out


def recovery(model: Model, made: Made) -> Row:
    """The share of residues that are the native ones, where the model knows those; what is fixed is left out."""
    native: str | None = getattr(model.codec, "native", None)
    if native is None:
        return {}
    alphabet = export.letters(model)
    known = tokens.encode([native], alphabet)
    free = (model.encode(made.prompts)["fixed"].cpu() == alphabet.size) & (known < alphabet.size)
    return {"native recovery": float((free & (made.ids == known)).sum() / free.sum())} if bool(free.any()) else {}


@torch.no_grad()
def log_likelihood(
    model: Model, ids: Tensor, prompts: list[str], seed: int, levels: int = 32, chunk: int = 64
) -> Tensor:
    """DRAKES' App-Log-Lik of ids [N,L] in nats a sequence, [N] float64, under the model's own denoiser.

    sum over t of (m_t - m_s)/m_t sum_i log p(x0_i | x_t), for even times, one draw of the masks at each; the authors
    take 128 times.
    """
    out, process = torch.zeros(len(ids), dtype=torch.float64), model.denoiser.process
    masked = process.sigma(torch.arange(levels + 1) / levels)
    for level in range(1, levels + 1):
        t, share = torch.tensor(level / levels), float(1 - masked[level - 1] / masked[level])
        eps = torch.rand(ids.shape, generator=generator(seed, "quality.masks", level), dtype=torch.float64)
        for start in range(0, len(ids), chunk):
            part = slice(start, start + chunk)
            cond = model.encode(prompts[part])
            device = next(iter(cond.values())).device if cond else ids.device
            x, noise = ids[part].to(device), eps[part].to(device)
            pred: Any = model.denoiser.predict(process.add_noise(x, noise, t.expand(len(x)).to(device)), t, cond)
            found = pred.logp_x0.gather(-1, x[..., None])[..., 0].double().sum(1)
            out[part] += found.cpu() * share
    return out


def kept(config: settings.Quality, build: Build, made: Made, natural: Natural | None) -> None:
    """Files beside the run's pictures: the designs, their logo, and their k-mers against natural ones."""
    folder, alphabet = build.folder / "samples", export.letters(build.piece("teacher"))
    if not build.has("space"):
        return
    build.piece("space").keep(build, made.ids, made.prompts, build.seed, folder)
    if natural:
        picture = logo.kmer_scatter(made.ids, natural.reference, kmer(config, alphabet.name), alphabet.size)
        picture.save(folder / "kmers.png")
