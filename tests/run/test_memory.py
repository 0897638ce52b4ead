"""The estimate before a run against the peak of a run that makes none; --dry-run leaves nothing; out of memory."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.run import job, memory
from limbeck.core.run.errors import LimbeckError

SOLO = Path(__file__).parent / "tinyrun" / "solo.py"
SIZES = {  # the tiny pair trains two such nets; a million weights cost 36 MB with gradients, Adam and EMA
    "0.2 GB": ["student.width=1024", "student.depth=3"],
    "1 GB": ["student.width=2048", "student.depth=6"],
    "activations": ["student.width=128", "student.depth=16", "batch=8192"],
    "2 GB": ["student.width=4096", "student.depth=4"],
}
SHORT = ["steps=2", "checkpoint.every=100", "stages.0.losses.0.generator={ema: 0.9}"]


@pytest.fixture(scope="module")
def baseline(child_env: dict[str, str], python: Any) -> int:
    """The interpreter with everything imported."""
    return peak([SOLO], child_env, python)


def peak(words: list[object], env: dict[str, str], python: Any) -> int:
    """The highest resident set of a process, in bytes, as it read it itself.

    The system's account of a child (ru_maxrss) starts from what its parent had at the fork.
    """
    return int(python.run(words, env=env, check=True).stdout.split()[-1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts")
@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=pytest.mark.slow if size in ("2 GB", "activations") else ()) for size in SIZES]
)
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(
    recipe_file: Path, tmp_path: Path, child_env, baseline: int, python, size: str
) -> None:
    sets = [*SHORT, *SIZES[size]]
    dry = ["-m", "limbeck", "run", recipe_file, "--dry-run", "--device", "cpu"]
    flags = [part for item in sets for part in ("--set", item)]
    said = python.run([*dry, *flags], env=child_env, check=True, cwd=tmp_path)
    estimate = float(re.search(r"estimate: ([\d.]+) GB", said.stdout).group(1))
    measured = (peak([SOLO, recipe_file, tmp_path / "c", *sets], child_env, python) - baseline) / 1e9
    print(f"{size}: estimate {estimate:.2f} GB, measured {measured:.2f} GB above {baseline / 1e9:.2f}")
    assert abs(estimate / measured - 1) <= 0.25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "tiny.yaml"]


def test_a_dry_run_leaves_nothing_and_an_estimate_changes_nothing(load, tmp_path: Path, capsys, monkeypatch) -> None:
    before = torch.random.get_rng_state()
    assert job.run(load(), tmp_path / "dry", device="cpu", dry_run=True) == 0
    assert "0:00 for 20 steps" in capsys.readouterr().out and not (tmp_path / "dry").exists()
    assert torch.equal(before, torch.random.get_rng_state())
    job.run(load(), tmp_path / "a", device="cpu", quiet=True)
    monkeypatch.setattr(job.Job, "estimate", lambda self, stage: None)
    job.run(load(), tmp_path / "b", device="cpu", quiet=True)
    a, b = (job.checkpoint.latest(tmp_path / name / "checkpoints").tensors for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_time_counts_the_cadence_of_the_players() -> None:
    assert memory._mean(full=6.0, light=1.0, period=5) == 2.0
    assert memory._mean(full=2.0, light=2.0, period=1) == 2.0
    assert memory.clock(3725) == "1:02:05" and memory.clock(61.2) == "1:01"


def test_out_of_memory_names_the_keys_to_change(load, tmp_path: Path) -> None:
    sets = ["stages.0.losses.0.fault=memory", "stages.0.losses.0.at=3"]
    with pytest.raises(LimbeckError, match=r"out of memory.*batch=4 \(now 8\).*precision=bf16.*distributed.shard"):
        job.run(load(*sets), tmp_path / "r", device="cpu", quiet=True)
    assert "out of memory" in (tmp_path / "r" / "error.txt").read_text()
    assert (tmp_path / "r" / "report.html").exists()
