"""A run whose reward server goes away in the middle ends as one that never lost it, bit for bit."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.run import checkpoint

pytestmark = pytest.mark.slow  # seven processes, one after the other
AWAY = 3.0  # seconds; with 20 the test passes as well
STEPS, LOST = 60, 10
RECIPE = """
extends: toy/words
name: served
rewards:
  train: [{{kind: remote, port: {port}, patience: {patience}}}]
  held_out: [{{kind: toy.letters}}]
stages:
  - name: tune
    losses: [{{kind: ddpo, per_prompt: 4, inner: 2, walk: {{steps: 8, guidance: 1.0}}, optim: {{lr: 1e-2}}}}]
eval: []
steps: {steps}
batch: 16
checkpoint: {{every: 5}}
log: {{every: 1}}
"""
LIMBECK = ["-m", "limbeck"]


@contextmanager
def serving(port: int, python: Any) -> Iterator[Any]:
    """A reward server in a process of its own, once it listens."""
    server = python.start([*LIMBECK, "reward-server", "toy.letters", "--port", port, "--device", "cpu"])
    try:
        assert f":{port}" in server.line()
        yield server
    finally:
        server.kill()
        server.wait()


def started(verb: list[str], python: Any) -> Any:
    return python.start([*LIMBECK, *verb, "--device", "cpu"])


def rows(folder: Path) -> list[dict[str, float]]:
    """The logged numbers without the clock; half a line is none yet."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def wait_for(folder: Path, step: int, run: Any) -> None:
    end = time.monotonic() + 120
    while len(rows(folder)) < step:
        assert run.poll() is None and time.monotonic() < end, run.err.read_text()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def order(place: Path, port: int, name: str, patience: float = 120.0) -> list[str]:
    path = place / f"{name}.yaml"
    path.write_text(RECIPE.format(port=port, patience=patience, steps=STEPS))
    return ["run", str(path), "--out", str(place), "--name", name]


@pytest.fixture(scope="module")
def whole(port: int, python: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never lost its server."""
    place = tmp_path_factory.mktemp("served")
    with serving(port, python):
        run = started(order(place, port, "whole"), python)
        assert run.wait() == 0, run.err.read_text()
    return place / "whole"


def assert_same(whole: Path, other: Path) -> None:
    one, two = (checkpoint.latest(folder / "checkpoints") for folder in (whole, other))
    assert one and two and one.manifest.step == two.manifest.step == STEPS
    assert one.tensors.keys() == two.tensors.keys()
    assert [key for key in one.tensors if not torch.equal(one.tensors[key], two.tensors[key])] == []
    assert rows(whole) == rows(other) and len(rows(whole)) == STEPS


def test_a_run_waits_for_a_server_that_comes_back(whole: Path, port: int, python: Any, tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    with serving(port, python) as server:
        run = started(order(tmp_path, port, "lost"), python)
        wait_for(folder, LOST, run)
        server.send_signal(signal.SIGKILL)
        server.wait()
    time.sleep(0.5)
    before = len(rows(folder))
    assert LOST <= before < STEPS, "the server was stopped too late to be missed"
    time.sleep(AWAY - 0.5)
    assert run.poll() is None and len(rows(folder)) == before
    with serving(port, python):
        assert run.wait() == 0, run.err.read_text()
    assert_same(whole, folder)


def test_a_run_that_lost_patience_says_so_and_its_resume_ends_the_same(
    whole: Path, port: int, python: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "impatient"
    with serving(port, python) as server:
        run = started(order(tmp_path, port, "impatient", patience=0.3), python)
        wait_for(folder, LOST, run)
        server.send_signal(signal.SIGKILL)
        server.wait()
    done = run.ended(timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "does not answer" in done.stderr and "then `limbeck resume` the run" in done.stderr
    assert len(rows(folder)) < STEPS
    with serving(port, python):
        run = started(["resume", str(folder)], python)
        assert run.wait() == 0, run.err.read_text()
    assert_same(whole, folder)
