"""A run whose reward server goes away in the middle ends as one that never lost it, bit for bit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
LIMBECK = [sys.executable, "-m", "limbeck"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(port: int) -> Iterator[subprocess.Popen[str]]:
    """A reward server in a process of its own, once it listens."""
    order = [*LIMBECK, "reward-server", "toy.letters", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(order, stdout=subprocess.PIPE, text=True, env=ENV)
    try:
        assert server.stdout and f":{port}" in server.stdout.readline()
        yield server
    finally:
        server.kill()
        server.wait()


def started(verb: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([*LIMBECK, *verb, "--device", "cpu"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                            text=True, env=ENV)  # fmt: skip


def rows(folder: Path) -> list[dict[str, float]]:
    """The logged numbers without the clock; half a line is none yet."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def wait_for(folder: Path, step: int, run: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while len(rows(folder)) < step:
        assert run.poll() is None and time.monotonic() < end, run.stderr and run.stderr.read()
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
def whole(port: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never lost its server."""
    place = tmp_path_factory.mktemp("served")
    with serving(port):
        run = started(order(place, port, "whole"))
        assert run.wait(timeout=120) == 0, run.stderr and run.stderr.read()
    return place / "whole"


def assert_same(whole: Path, other: Path) -> None:
    one, two = (checkpoint.latest(folder / "checkpoints") for folder in (whole, other))
    assert one and two and one.manifest.step == two.manifest.step == STEPS
    assert one.tensors.keys() == two.tensors.keys()
    assert [key for key in one.tensors if not torch.equal(one.tensors[key], two.tensors[key])] == []
    assert rows(whole) == rows(other) and len(rows(whole)) == STEPS


def test_a_run_waits_for_a_server_that_comes_back(whole: Path, port: int, tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    with serving(port) as server:
        run = started(order(tmp_path, port, "lost"))
        wait_for(folder, LOST, run)
        server.send_signal(signal.SIGKILL)
        server.wait()
    time.sleep(0.5)
    before = len(rows(folder))
    assert LOST <= before < STEPS, "the server was stopped too late to be missed"
    time.sleep(AWAY - 0.5)
    assert run.poll() is None and len(rows(folder)) == before
    with serving(port):
        assert run.wait(timeout=120) == 0, run.stderr and run.stderr.read()
    assert_same(whole, folder)


def test_a_run_that_lost_patience_says_so_and_its_resume_ends_the_same(whole: Path, port: int, tmp_path: Path) -> None:
    folder = tmp_path / "impatient"
    with serving(port) as server:
        run = started(order(tmp_path, port, "impatient", patience=0.3))
        wait_for(folder, LOST, run)
        server.send_signal(signal.SIGKILL)
        server.wait()
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1 and said.count("\n") == 1
    assert "does not answer" in said and "then `limbeck resume` the run" in said
    assert len(rows(folder)) < STEPS
    with serving(port):
        run = started(["resume", str(folder)])
        assert run.wait(timeout=120) == 0, run.stderr and run.stderr.read()
    assert_same(whole, folder)
