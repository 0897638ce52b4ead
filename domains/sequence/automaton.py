"""Which letters a half-written sequence may still take, exactly: an automaton of forbidden words and a walk over it.

Legend: B sequences, L length, V letters, S states, E edges, C counts that have a ceiling, R = C B columns. The walk
runs from both ends (forward-backward in the (min, +) algebra), in numpy: its steps are many and small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.run.errors import BadInput

Ints = NDArray[np.int32]
Word = tuple[frozenset[int], ...]  # the letters, by number, that each place of the word stands for
FAR = 1_000_000  # the price of what is forbidden; three of them still fit
MOST = 4000  # states


class Automaton:
    """Reads a sequence letter by letter and dies of a forbidden word; a state is the set of words half read."""

    def __init__(self, words: Sequence[Word], size: int) -> None:
        self.size, self.next = size, _states(words, size)
        source, letter = np.nonzero(self.next < len(self.next))
        target = self.next[source, letter]
        order = np.argsort(target, kind="stable")
        self.source, self.letter = source[order], letter[order]
        self.entered, self.starts = np.unique(target[order], return_index=True)

    def forward(self, price: Ints) -> Ints:
        """The least price of each state before each letter [L+1,S,R], for prices of letters [L,V,R]."""
        found = np.full((len(price) + 1, len(self.next), price.shape[2]), FAR, np.int32)
        found[0, 0] = 0
        for i, step in enumerate(price[:, self.letter]):
            reached = found[i].take(self.source, 0)
            reached += step
            found[i + 1, self.entered] = np.minimum.reduceat(reached, self.starts, 0)
            np.minimum(found[i + 1], FAR, out=found[i + 1])
        return found

    def backward(self, price: Ints) -> Ints:
        """The least price from each state after each letter to the end [L+1,S+1,R]; the last state is death."""
        count, flat = len(self.next), self.next.ravel()
        found = np.full((len(price) + 1, count + 1, price.shape[2]), FAR, np.int32)
        found[-1, :count] = 0
        for i in range(len(price) - 1, -1, -1):
            ahead = found[i + 1].take(flat, 0).reshape(count, self.size, -1)
            ahead += price[i]
            ahead.min(1, out=found[i, :count])
            np.minimum(found[i], FAR, out=found[i])
        return found

    def through(self, price: Ints) -> Ints:
        """The least price of a whole sequence that has letter v at place i, [L,V,R]."""
        before, after = self.forward(price)[:-1], self.backward(price)[1:]
        found = np.full(price.shape, FAR, np.int32)
        for state, targets in enumerate(self.next):
            np.minimum(found, before[:, state, None] + after[:, targets], out=found)
        return found + price


def _states(words: Sequence[Word], size: int) -> NDArray[np.int64]:
    """Transitions [S,V] of the subset construction, from state 0; S itself is death."""
    number: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    waiting, rows, fresh = [frozenset[tuple[int, int]]()], [], {(w, 0) for w in range(len(words))}
    while waiting:
        state, row = waiting.pop(0), []
        for letter in range(size):
            after = frozenset((w, p + 1) for w, p in state | fresh if letter in words[w][p])
            dead = any(p == len(words[w]) for w, p in after)
            if not dead and after not in number:
                number[after] = len(number)
                waiting.append(after)
            row.append(-1 if dead else number[after])
        rows.append(row)
        if len(number) > MOST:
            raise BadInput("design.avoid has too many words with codes of several letters; give fewer, or shorter ones")
    found = np.array(rows)
    return np.where(found < 0, len(rows), found)


def open_letters(machine: Automaton, admitted: Tensor, counted: Tensor, ceilings: Sequence[int]) -> Tensor:
    """Which letters [B,L,V] some sequence has that lives, takes admitted letters and keeps every count.

    `admitted` [B,L,V] bool (one letter where it is known); `counted` [C,V] of 0 and 1 says what count c sums, at most
    ceilings[c]. Each count alone is exact; that several can be kept at once by the same sequence is assumed.
    """
    batch, length, size = admitted.shape
    barred = (~admitted).permute(1, 2, 0).numpy().astype(np.int32) * FAR
    price = counted.T.numpy().astype(np.int32)[None, :, :, None] + barred[:, :, None, :]
    least = machine.through(price.reshape(length, size, -1)).reshape(length, size, len(ceilings), batch)
    kept = (least <= np.array(ceilings, np.int32)[:, None]).all(2)
    return torch.from_numpy(kept).permute(2, 0, 1)
