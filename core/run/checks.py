"""Proof on the user's machine: checks against closed-form answers, printed as measured, bound, verdict and time."""

import json as _json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

from limbeck.core.check import Check as Check
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.core.run.registry import Registry, Spec, registry


@dataclass(frozen=True)
class Row:
    """One line of `limbeck verify`."""

    method: str
    name: str
    measured: float
    bound: float
    sense: str
    passed: bool
    seconds: float
    note: str = ""

    def text(self) -> str:
        """The line as printed."""
        verdict = "pass" if self.passed else "FAIL"
        bound = f"{self.sense} {self.bound:.3g}"
        line = (
            f"{self.method + ': ' + self.name:<58} {self.measured:>11.4g} {bound:>12}  {verdict} {self.seconds:>7.2f} s"
        )
        return f"{line}  {self.note}" if self.note else line


def select(names: Sequence[str], found: Registry) -> list[Spec]:
    """The checks of these names, or of every method a name begins (`dmd2` selects `dmd2` and `dmd2.ring4`)."""
    specs = found.all("check")
    chosen: dict[str, Spec] = {}
    for name in names:
        hits = [
            spec for spec in specs if spec.name == name or spec.name.startswith((f"{name}.", f"{name}/", f"{name}-"))
        ]
        if not hits:
            hint = did_you_mean(name, [spec.name for spec in specs])
            raise BadInput(f'there is no check "{clean(name, 60)}"{hint}; `limbeck list --pieces` shows them')
        chosen.update({spec.name: spec for spec in hits})
    return list(chosen.values()) if names else specs


def rows(spec: Spec, found: Registry) -> Iterator[Row]:
    """Run one check function; what it raises is a failed line, so that the other checks still run."""
    start = time.perf_counter()
    try:
        function: Callable[[], list[Check]] = found.load(spec)
        checks = function()
        if not checks:
            raise ValueError("it measured nothing")
    except Exception as error:
        note = f"{type(error).__name__}: {clean(error, 160)}"
        yield Row(spec.name, "did not finish", math.nan, 0.0, "<=", False, time.perf_counter() - start, note)
        return
    each = (time.perf_counter() - start) / len(checks)
    for check in checks:
        measured = float(check.measured)
        yield Row(spec.name, check.name, measured, check.bound, check.sense, check.passed, each, check.note)


def run_checks(names: Sequence[str], json: bool, out: TextIO) -> int:
    """Print a line a check as it ends (or JSON lines); 0 when all pass, 1 otherwise."""
    found, failed, total, start = registry(), 0, 0, time.perf_counter()
    for spec in select(names, found):
        for row in rows(spec, found):
            total, failed = total + 1, failed + (not row.passed)
            record = {key: _finite(value) for key, value in asdict(row).items()}
            print(_json.dumps(record) if json else row.text(), file=out, flush=True)
    if not json:
        verdict = f"{failed} of {total} FAILED" if failed else f"all {total} pass"
        print(f"{verdict} in {time.perf_counter() - start:.1f} s", file=out, flush=True)
    return 1 if failed or not total else 0


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
