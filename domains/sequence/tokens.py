"""Sequences as tensors. Legend: B sequences, L length, V letters; the mask is token V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.run.errors import BadInput, clean
from limbeck.domains.sequence.fasta import Record
from limbeck.domains.sequence.text import Alphabet

HOLE = "_"  # a mask, where a state is written as text


def encode(texts: Sequence[str], alphabet: Alphabet) -> Tensor:
    """Ids [B,L] of clean texts of one length; codes of several letters become masks."""
    if len({len(text) for text in texts}) > 1:
        raise BadInput("sequences of several lengths cannot be one batch; cut or pad them first")
    number = {letter: alphabet.letters.find(letter) for letter in alphabet.codes}
    rows = [[number[letter] for letter in text] for text in texts]
    ids = torch.tensor(rows, dtype=torch.int64).view(len(texts), -1)
    return torch.where(ids < 0, alphabet.size, ids)


def decode(ids: Tensor, alphabet: Alphabet) -> list[str]:
    """Texts of ids [B,L]."""
    letters = alphabet.letters + HOLE
    return ["".join(letters[i] for i in row) for row in ids.tolist()]


def allowed(template: str, alphabet: Alphabet) -> Tensor:
    """Which letters a template of codes admits at each place, bool [L,V]."""
    rows = [[letter in alphabet.codes[code] for letter in alphabet.letters] for code in template]
    return torch.tensor(rows, dtype=torch.bool)


def onehot(x: Tensor, size: int) -> Tensor:
    """Rows [B,L,V] float of ids [B,L] or of soft rows [B,L,V] or [B,L,V+1] (the mask's column is dropped)."""
    return (
        x[..., :size].float() if x.is_floating_point() else F.one_hot(x.clamp(max=size), size + 1)[..., :size].float()
    )


def rows(x: Tensor, size: int) -> Tensor:
    """Rows [B,L,V+1] float, the mask's column last, of ids [B,L]; rows as they are."""
    return x.float() if x.is_floating_point() else F.one_hot(x, size + 1).float()


def ids(x: Tensor, size: int) -> Tensor:
    """Ids [B,L] of ids or of soft rows (their largest letter)."""
    return x[..., :size].argmax(-1) if x.is_floating_point() else x


def biases(given: Mapping[str, float], alphabet: Alphabet, where: str) -> Tensor:
    """Nats that are added to each letter's logit [V]; BadInput that names `where` for what is no letter."""
    out = torch.zeros(alphabet.size)
    for letter, value in given.items():
        if letter not in alphabet.letters or len(letter) != 1:
            raise BadInput(f"{where}: {clean(letter, 20)} is not one of {alphabet.letters}")
        out[alphabet.letters.index(letter)] = value
    return out


class Letters:
    """The codec of sequence models: rewards see `tokens` (ids [B,L]) or `onehot` (rows [B,L,V] with gradient)."""

    def __init__(self, alphabet: Alphabet) -> None:
        self.alphabet = alphabet

    def records(self, name: str, text: str) -> list[Record]:
        """A sequence in FASTA files."""
        return [Record(name, text)]

    def encode(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z

    def read(self, z: Tensor, space: str) -> Tensor:
        """z is ids or soft rows."""
        if space == "onehot":
            return onehot(z, self.alphabet.size)
        return ids(z, self.alphabet.size) if space in ("tokens", "any") else z
