"""What one step gives to every phase: its number, its draws, values computed once, and the log."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.core.run.rng import Draws
from limbeck.core.scheduled import Scheduled, at

T = TypeVar("T")


class Context:
    """One step. `batch` counts this process's rows: losses are means over them; processes average."""

    def __init__(self, step: int, stage: str, draws: Draws, world: int, rank: int, device: torch.device) -> None:
        self.step, self.stage, self.draws = step, stage, draws
        self.world, self.rank, self.device = world, rank, device
        self.batch = draws.rows.stop - draws.rows.start
        self.logged: dict[str, Tensor | float] = {}
        self.finish = ""  # a reason to end the stage after this step, best checkpoint kept
        self._memo: dict[str, Any] = {}

    @property
    def global_batch(self) -> int:
        """Rows of all processes together."""
        return self.draws.batch

    def once(self, key: str, fn: Callable[[], T]) -> T:
        """`fn()` at the first call of this step, the same object afterwards: a sample is drawn once for all phases."""
        if key not in self._memo:
            self._memo[key] = fn()
        value: T = self._memo[key]
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
        """The rows [B] of all processes, from this one's [b]."""
        if self.world == 1:
            return values
        whole = values.new_zeros(self.global_batch)
        whole[self.draws.rows] = values
        return self.mean(whole) * self.world

    def log(self, name: str, value: Tensor | float) -> None:
        """Keep a scalar for the log; a tensor stays where it is (no waiting for the device)."""
        self.logged[name] = value.detach() if isinstance(value, Tensor) else value
