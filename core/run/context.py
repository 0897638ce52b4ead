"""What one step gives to every phase: its number, its draws, values computed once, and the log."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import Draws
from limbeck.core.scheduled import Scheduled, at

T = TypeVar("T")


class Context:
    """One step. Losses are means over the `batch` rows of a process; processes average.

    A batch may be taken in parts, one after the other (gradient accumulation): each has draws and values of its own,
    which are at hand in losses alone; `whole` has draws for what is done once a step.
    """

    def __init__(
        self, step: int, stage: str, draws: Draws, world: int, rank: int, device: torch.device, parts: int = 1
    ) -> None:
        self.step, self.stage, self.world, self.rank, self.device = step, stage, world, rank, device
        self.whole, self.parts = draws, draws.split(parts)
        self._memos: list[dict[str, Any]] = [{} for _ in self.parts]
        self.logged: dict[str, Tensor | float] = {}
        self.finish = ""  # a reason to end the stage after this step, best checkpoint kept
        self._part = 0 if parts == 1 else None

    def each(self) -> Iterator[int]:
        """The parts in turn: inside, `draws`, `batch` and `once` are those of the part."""
        outside = self._part
        try:
            for part in range(len(self.parts)):
                self._part = part
                yield part
        finally:
            self._part = outside

    @property
    def part(self) -> int:
        """Which part of the batch is at hand; BadInput where none is."""
        if self._part is None:
            raise BadInput("accumulate: this loss draws before its turn and cannot take a batch in parts; set it to 1")
        return self._part

    @property
    def draws(self) -> Draws:
        """The draws of the part at hand."""
        return self.parts[self.part]

    @property
    def batch(self) -> int:
        """This process's rows at hand."""
        return self.draws.rows.stop - self.draws.rows.start

    @property
    def last(self) -> bool:
        """Whether this is the step's last part."""
        return self.part == len(self.parts) - 1

    @property
    def global_batch(self) -> int:
        """Rows of all processes and parts together."""
        return self.whole.batch

    def once(self, key: str, fn: Callable[[], T]) -> T:
        """`fn()` at the first call of this step (and part), the same object afterwards: all phases see one sample."""
        memo = self._memos[self.part]
        if key not in memo:
            memo[key] = fn()
        value: T = memo[key]
        return value

    def at(self, value: Scheduled) -> float:
        """A scheduled scalar at this step."""
        return at(value, self.step)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes of a detached statistic (every process has equally many rows)."""
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def gathered(self, values: Tensor) -> Tensor:
        """The rows [B] of all processes, from this one's [b]; BadInput where the batch is taken in parts."""
        if len(self.parts) > 1:
            raise BadInput("accumulate: this loss compares the whole batch and cannot take it in parts; set it to 1")
        if self.world == 1:
            return values
        whole = values.new_zeros(self.global_batch)
        whole[self.draws.rows] = values
        return self.mean(whole) * self.world

    def log(self, name: str, value: Tensor | float) -> None:
        """Keep a scalar for the log (its mean over parts); a tensor stays where it is (no waiting for the device)."""
        value = value.detach() if isinstance(value, Tensor) else value
        known = self.logged.get(name) if self._part else None
        self.logged[name] = value if known is None else known + (value - known) / (self.part + 1)
