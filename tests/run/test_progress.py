"""What a long evaluation says: in place on a terminal, a line every ten seconds elsewhere."""

import sys
import time

import pytest

from limbeck.core.run.metrics import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def tell(progress: Progress, clock: list[float], times: tuple[float, ...]) -> None:
    for at in times:
        clock[0] = at
        progress(f"{at:g} of 30")


def test_a_log_gets_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    tell(Progress(), clock, (1, 9, 11, 12, 22))
    tell(Progress(quiet=True), clock, (40,))
    assert capsys.readouterr().out == "11 of 30\n22 of 30\n"


def test_a_terminal_gets_one_line_that_goes_away(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tell(progress, clock, (10, 11))
    progress.clear()
    progress.clear()
    assert capsys.readouterr().out == "\r10 of 30\r11 of 30\r" + " " * 8 + "\r"
