"""`limbeck verify`: verdicts, statuses and what a check that fails, raises or measures nothing looks like."""

import io
import json
import math
from collections.abc import Callable

import pytest

from limbeck.core.run import checks
from limbeck.core.run.checks import Check, run_checks
from limbeck.core.run.errors import BadInput
from limbeck.core.run.registry import Registry, Spec


def raises() -> list[Check]:
    raise ZeroDivisionError("by\nzero")


FUNCTIONS: dict[str, Callable[[], list[Check]]] = {
    "good": lambda: [Check("a", 1e-9, 1e-6, "<="), Check("b", 0.9, 0.7, ">=")],
    "good.more": lambda: [Check("c", 1.0, 1.0, "<=", "exactly at the bound")],
    "wrong": lambda: [Check("d", 0.2, 0.1, "<=")],
    "nan": lambda: [Check("e", math.nan, 0.1, "<="), Check("f", math.nan, 0.1, ">=")],
    "raises": raises,
    "empty": lambda: [],
}


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry({("check", name): Spec("check", name, f"x:{name}") for name in FUNCTIONS})
    monkeypatch.setattr(registry, "load", lambda spec: FUNCTIONS[spec.name])
    monkeypatch.setattr(checks, "registry", lambda: registry)
    return registry


def verify(*names: str, json: bool = False) -> tuple[int, list[str]]:
    out = io.StringIO()
    return run_checks(names, json, out), out.getvalue().splitlines()


def test_passing_checks_end_in_zero() -> None:
    status, lines = verify("good")
    assert status == 0 and len(lines) == 4
    assert all(" pass " in line for line in lines[:3]) and lines[-1].startswith("all 3 pass")
    assert "good: a" in lines[0] and "1e-09" in lines[0] and "<= 1e-06" in lines[0]


@pytest.mark.parametrize("name", ["wrong", "nan", "raises", "empty"])
def test_a_failure_ends_in_one_and_the_others_still_run(name: str) -> None:
    status, lines = verify(name, "good")
    assert status == 1 and "FAIL" in lines[0] and " pass " in lines[-2] and "FAILED" in lines[-1]


def test_what_a_check_raises_is_named_on_its_line() -> None:
    _, lines = verify("raises")
    assert "did not finish" in lines[0] and "ZeroDivisionError: by\\nzero" in lines[0]


def test_json_lines_are_strict_json() -> None:
    status, lines = verify(json=True)
    rows = [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in lines]
    assert status == 1 and len(rows) == 8
    assert {"method", "name", "measured", "bound", "sense", "passed", "seconds", "note"} == set(rows[0])


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(BadInput, match='did you mean "wrong"'):
        verify("wrnog")
