"""Scheduled scalars: anywhere a recipe takes a number it also takes `[step, value]` pairs."""

import operator
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, Field

Pairs = list[tuple[Annotated[int, Field(ge=0)], float]]


def _ascending(value: float | Pairs) -> float | Pairs:
    if isinstance(value, list):
        steps = [step for step, _ in value]
        if not steps or any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError("a schedule is [step, value] pairs with rising steps, such as [[0, 1.0], [100, 0.1]]")
    return value


Scheduled = Annotated[float | Pairs, AfterValidator(_ascending)]


def within(
    low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None
) -> Callable[[float | Pairs], float | Pairs]:
    """A validator for every value of a schedule: low <= value <= high, above < value < below."""
    tests: list[tuple[str, float | None, Callable[[float, float], bool]]] = [
        ("at least", low, operator.ge), ("at most", high, operator.le),
        ("above", above, operator.gt), ("below", below, operator.lt),
    ]  # fmt: skip
    bounds = [(word, bound, holds) for word, bound, holds in tests if bound is not None]

    def check(value: float | Pairs) -> float | Pairs:
        for v in [v for _, v in value] if isinstance(value, list) else [value]:
            if not all(holds(v, bound) for _, bound, holds in bounds):
                raise ValueError(f"{v:g} must be {' and '.join(f'{word} {bound:g}' for word, bound, _ in bounds)}")
        return value

    return check


def at(value: float | Pairs, step: int) -> float:
    """The value at `step`: linear between the pairs, constant before the first and after the last."""
    if not isinstance(value, list):
        return float(value)
    if step <= value[0][0]:
        return float(value[0][1])
    for (s0, v0), (s1, v1) in zip(value, value[1:], strict=False):
        if step <= s1:
            return v0 + (v1 - v0) * (step - s0) / (s1 - s0)
    return float(value[-1][1])
