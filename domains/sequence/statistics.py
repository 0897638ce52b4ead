"""What sets of sequences have in common: k-mers, identity, novelty, and the nulls that give such numbers a meaning.

Legend: N, M sequences, L length, V letters; ids are tokens [N,L], where V is a mask and counts as no letter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from limbeck.core.diffusion.discrete import categorical
from limbeck.core.run.errors import BadInput
from limbeck.domains.sequence import alike
from limbeck.domains.sequence.text import Alphabet

MOST = 2**24  # different k-mers that are counted


def kmers(ids: Tensor, k: int, size: int) -> Tensor:
    """How often each k-mer occurs in ids [N,L], [V^k] float64; windows with a mask are left out."""
    if size**k > MOST:
        raise BadInput(f"there are {size}^{k} k-mers of {k} letters, too many to count; take a smaller kmer")
    if ids.shape[1] < k:
        raise BadInput(f"sequences of {ids.shape[1]} letters have no k-mer of {k}; take a smaller kmer")
    whole = (ids < size).unfold(1, k, 1).all(2)
    found = alike.words(ids.clamp(max=size - 1), k, size)[whole]
    return torch.bincount(found, minlength=size**k).double()


def kmer_pearson(a: Tensor, b: Tensor, k: int = 6, size: int = 4) -> float:
    """Pearson's r of the k-mer counts of ids a [N,L] and b [M,L] over all V^k k-mers; 0 where one has no spread."""
    return pearson(kmers(a, k, size), kmers(b, k, size))


def pearson(a: Tensor, b: Tensor) -> float:
    """The correlation of a and b [N]; 0 where one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-300))


def identity(ids: Tensor, size: int) -> float:
    """The mean share of equal letters, place by place, over all pairs of different rows of ids [N,L]; 1 for one row.

    It is exact at the cost of one count: rows that share a letter at a place are c (c - 1) pairs.
    """
    n, length = ids.shape
    if n < 2:
        return 1.0
    counts = ones(ids, size).sum(0).double()
    return float((counts * (counts - 1)).sum() / (n * (n - 1) * length))


def diversity(ids: Tensor, size: int) -> float:
    """1 - the mean pairwise identity of ids [N,L]."""
    return 1 - identity(ids, size)


def nearest(ids: Tensor, natural: Tensor, size: int, shifts: int = 1, chunk: int = 8192) -> Tensor:
    """The identity [N] of each row of ids [N,L] to the nearest row of natural [M,L], over shifts of up to `shifts`.

    Letters that a shift leaves without a partner count as different, so that a copy one place further has (L-1)/L.
    """
    if ids.shape[1] != natural.shape[1]:
        raise BadInput(f"natural sequences have {natural.shape[1]} letters and designs {ids.shape[1]}; use one length")
    best, length = torch.zeros(len(ids)), ids.shape[1]
    one = ones(ids, size)
    moved = [shifted(one, step).flatten(1) for step in range(-min(shifts, length - 1), min(shifts, length - 1) + 1)]
    for part in torch.split(natural, chunk):
        other = ones(part, size).flatten(1).T
        for rows in moved:
            best = torch.maximum(best, (rows @ other).amax(1))
    return best / length


def ones(ids: Tensor, size: int) -> Tensor:
    """One-hot rows [N,L,V] float32 of ids of any integer type; zeros for a mask."""
    return (ids[..., None] == torch.arange(size, dtype=ids.dtype, device=ids.device)).float()


def shifted(rows: Tensor, step: int) -> Tensor:
    """rows [N,L,V] moved by some places along the sequence, zeros where nothing is left."""
    length = rows.shape[1]
    return F.pad(rows, (0, 0, max(step, 0), max(-step, 0)))[:, max(-step, 0) : max(-step, 0) + length]


def novelty(ids: Tensor, natural: Tensor, size: int, shifts: int = 1) -> Tensor:
    """1 - the identity to the nearest natural sequence, [N]."""
    return 1 - nearest(ids, natural, size, shifts)


def gc(ids: Tensor, alphabet: Alphabet) -> Tensor:
    """The share of G and C among the letters of each row of ids [N,L], [N]."""
    strong = torch.tensor([alphabet.letters.index(letter) for letter in "CG"], device=ids.device)
    known = (ids < alphabet.size).sum(1).clamp(min=1)
    return torch.isin(ids, strong).sum(1) / known


def shuffled(ids: Tensor, gen: Generator) -> Tensor:
    """Every row of ids [N,L] in a random order of its own: the letters stay, the words go."""
    return ids.gather(1, torch.rand(ids.shape, generator=gen).argsort(1))


def markov(ids: Tensor, count: int, size: int, gen: Generator) -> Tensor:
    """`count` sequences [count,L] of the first-order Markov chain whose steps are those of ids [N,L].

    The first letter has the letters' overall frequency; transitions are counted without pseudocounts.
    """
    steps = kmers(ids, 2, size).view(size, size)
    share = torch.bincount(ids[ids < size], minlength=size).double()
    steps = torch.where(steps.sum(1, keepdim=True) > 0, steps, share)  # after a letter that only ever ends a sequence
    rows = [categorical(share.expand(count, size), gen)]
    for _ in range(ids.shape[1] - 1):
        rows.append(categorical(steps[rows[-1]], gen))
    return torch.stack(rows, 1)
