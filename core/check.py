"""A check's result: what was measured and the bound it must keep (torch-free, known to every part of the core)."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One measured number and the bound that it must keep."""

    name: str
    measured: float
    bound: float
    sense: Literal["<=", ">="]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the bound holds; NaN never passes."""
        if math.isnan(self.measured):
            return False
        return self.measured <= self.bound if self.sense == "<=" else self.measured >= self.bound
