"""Sequences to learn from: windows of the embedded fly regions, and the user's own FASTA file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from limbeck.core.run.build import Batch, Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import alike, fly, tokens
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence.text import ALPHABETS


@dataclass
class Pool:
    """Sequences [N,L] to train on and held-out ones [M,L], as ids; every prompt is the template (empty: none)."""

    train: Tensor
    held: Tensor
    template: str = ""
    best: Tensor | None = None  # the high scorers of train, where only they are learned from

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """x [b,L]: rows of a batch of n."""
        source = self.train if self.best is None else self.best
        chosen = torch.randint(len(source), (n,), generator=gen)[rows]
        return Batch(source[chosen].long(), [""] * len(chosen))

    def prompts(self, n: int, gen: Generator, rows: slice = slice(None)) -> list[str]:
        """Templates."""
        return [self.template] * len(range(n)[rows])

    def natural(self, n: int, gen: Generator) -> Tensor:
        """n held-out sequences [n,L] (all of them, if there are fewer), ids, in a random order."""
        return self.held[torch.randperm(len(self.held), generator=gen)[:n]].long()


@dataclass
class Labelled:
    """Sequences with a number each: ids [N,L] with values [N] to learn from, and others to be tested on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def count(self) -> int:
        """How many there are to learn from."""
        return len(self.x)


def own(config: settings.Fasta, build: Build) -> Pool:
    """The slot `data`: windows of the user's FASTA file; those that are alike are held out together or not at all."""
    from limbeck.domains.sequence import fasta  # Biopython comes with the extra `sequence`

    alphabet = ALPHABETS[config.alphabet]
    texts = [record.text for record in fasta.read(config.path, alphabet)]
    cut = [part for text in texts for part in cuts(text, config.length)]
    if not cut:
        longest = max(len(text) for text in texts)
        raise BadInput(f"data.length: no sequence of {config.path} has {config.length} letters (longest: {longest})")
    found = torch.unique(tokens.encode(cut, alphabet).to(torch.uint8), dim=0)
    found = found[(found < alphabet.size).all(1)]  # windows with a code of several letters teach nothing certain
    word = 4 if alphabet.size > 4 else 8
    held = split(alike.groups(found, word, alphabet.size), config.held_out)
    if not bool(held.any()) or bool(held.all()):
        raise BadInput(f"{config.path}: {len(found)} windows cannot be split without near-duplicates on both sides")
    build.note(f"{len(texts)} sequences, {len(found)} distinct windows, {int(held.sum())} held out")
    return Pool(found[~held], found[held])


def cuts(text: str, length: int) -> list[str]:
    """Windows of one length that cover a sequence (the last one ends where it ends); none of a shorter one."""
    if len(text) < length:
        return []
    starts = [*range(0, len(text) - length, length), len(text) - length]
    return [text[start : start + length] for start in starts]


def split(group: Tensor, share: float) -> Tensor:
    """Which rows are held out [N] bool: whole groups, drawn by a fixed seed until the share is reached."""
    sizes = torch.bincount(group)
    order = torch.randperm(len(sizes), generator=generator(0, "sequence.split", 0))
    before = sizes[order].cumsum(0) - sizes[order]
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[order[before < share * len(group)]] = True
    return chosen[group]


def starts(config: settings.Starts, build: Build) -> Labelled:
    """The slot `data`: windows next to a transcription start (1) and far from one (0); chromosome X is the test."""
    return Labelled(*fly.labelled(config.role), *fly.labelled("test"))


def table(config: settings.Table, build: Build) -> Labelled:
    """The slot `data`: the user's table of sequences and values; near-duplicates are on one side of the split."""
    from limbeck.domains.sequence import fasta

    alphabet = ALPHABETS[config.alphabet]
    texts, values = fasta.read_table(config.path, alphabet)
    longest = max(len(text) for text in texts)
    if any(len(text) != longest for text in texts):
        raise BadInput(f"{config.path}: sequences of several lengths (longest: {longest}); pad or cut them to one")
    x, y = tokens.encode(texts, alphabet).to(torch.uint8), torch.tensor(values, dtype=torch.float32)
    word = 4 if alphabet.size > 4 else 8
    held = split(alike.groups(x, min(word, longest), alphabet.size), config.held_out)
    if len(texts) < 20 or int(held.sum()) < 4 or bool(held.all()):
        raise BadInput(
            f"{config.path}: {len(texts)} sequences are too few, or too alike, to learn from and be tested on"
        )
    build.note(f"{len(texts)} sequences, {int(held.sum())} held out")
    return Labelled(x[~held], y[~held], x[held], y[held])
