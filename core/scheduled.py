"""Scheduled scalars: anywhere a recipe takes a number it also takes `[step, value]` pairs.

A step is counted from the beginning of a stage, or said as a share of its length ("50%"): then the schedule stretches
with the stage. `in_steps` turns shares into steps before anything is built.
"""

import operator
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field


class Share(str):
    """A place in a stage by the stage's length, such as "50%"."""

    def step(self, steps: int) -> int:
        """The nearest step of a stage of so many."""
        return round(float(self[:-1]) / 100 * steps)


Pairs = list[tuple[Annotated[int, Field(ge=0)] | str, float]]
SHARE = re.compile(r"[0-9]{1,3}(\.[0-9]{1,9})?%")


def _placed(step: int | str) -> int | Share:
    if isinstance(step, int):
        return step
    if not SHARE.fullmatch(step) or float(step[:-1]) > 100:
        raise ValueError("a step is a whole number, or a share of the stage from 0% to 100%")
    return Share(step)


def _ascending(value: float | Pairs) -> float | Pairs:
    if not isinstance(value, list):
        return value
    placed: Pairs = [(_placed(step), number) for step, number in value]
    if len({type(step) for step, _ in placed}) > 1:
        raise ValueError("a schedule has steps or shares of the stage, not both: [[0%, 1.0], [50%, 0.1]]")
    steps = [float(step[:-1]) if isinstance(step, str) else step for step, _ in placed]
    if not steps or any(b < a for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError("a schedule is [step, value] pairs with rising steps, such as [[0, 1.0], [100, 0.1]]")
    return placed


Step = Annotated[Annotated[int, Field(ge=0)] | str, AfterValidator(_placed)]
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


def in_steps(settings: Any, steps: int) -> Any:
    """The same settings, whatever they are made of, with shares as steps of a stage of `steps`."""
    if isinstance(settings, Share):
        return settings.step(steps)
    if isinstance(settings, BaseModel):
        return settings.model_copy(update={name: in_steps(value, steps) for name, value in settings})
    if isinstance(settings, dict):
        return {name: in_steps(value, steps) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return type(settings)(in_steps(value, steps) for value in settings)
    return settings


def at(value: float | Pairs, step: int) -> float:
    """The value at `step`: linear between the pairs, constant before the first and after the last.

    Of two pairs at one step the second holds from that step on: a jump.
    """
    if not isinstance(value, list):
        return float(value)
    pairs = [(int(place), float(number)) for place, number in value]
    before, after = [pair for pair in pairs if pair[0] <= step], [pair for pair in pairs if pair[0] > step]
    if not before or not after:
        return before[-1][1] if before else after[0][1]
    (s0, v0), (s1, v1) = before[-1], after[0]
    return v0 + (v1 - v0) * (step - s0) / (s1 - s0)
