"""Tuning with rewards on two processes is tuning on one: walks draw for the whole batch."""

from pathlib import Path

import pytest
import torch

from limbeck.core.diffusion.draws import Shared, normal, uniform
from limbeck.core.run import checkpoint


def test_the_rows_of_two_processes_are_those_of_one() -> None:
    def gen() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    like, half = torch.empty(4, 2), torch.empty(2, 2)
    rows = [slice(0, 2), slice(2, 4)]
    assert torch.equal(torch.cat([normal(half, Shared(gen(), 4, r)) for r in rows]), normal(like, gen()))
    assert torch.equal(torch.cat([uniform((2, 3), Shared(gen(), 4, r)) for r in rows]), uniform((4, 3), gen()))
    assert not torch.equal(normal(half, gen()), normal(like, gen())[2:])  # what a rank's own generator would give


@pytest.mark.slow
def test_words_tuned_by_two_processes_end_as_by_one(tmp_path: Path, python) -> None:
    ends = []
    for name, processes in (("one", 1), ("two", 2)):
        flags = ["steps=2", "batch=8", "checkpoint.every=2", "eval=[]", "stages.0.losses.0.walk.steps=4"]
        sets = [part for flag in flags for part in ("--set", flag)]
        order = ["-m", "limbeck", "run", "toy/words", "--device", "cpu", "--out", tmp_path, "--name", name, *sets]
        python.team(order, processes)
        ends.append(checkpoint.latest(tmp_path / name / "checkpoints").tensors)
    gaps = [float((ends[0][k] - ends[1][k]).abs().max()) for k in ends[0] if "/param/" in k]
    assert max(gaps) < 1e-6
