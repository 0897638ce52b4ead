"""`job: table`: rows at one budget, references once, resumable, interruptible."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from limbeck.core.run import checkpoint, job, table
from limbeck.core.run import recipe as recipes
from limbeck.core.run.errors import BadInput
from limbeck.core.run.trainer import Stopped, Trainer

TEXT = """
about: two methods on the toy
job: table
rows:
  - {recipe: toy/ring4, label: dmd2}
  - {recipe: toy/ring4, label: sds, set: [stages.0.losses.0.kind=score, stages.0.losses.0.operator=sds]}
set: [sample.every=100]
steps: 4
batch: 8
"""


@pytest.fixture
def two(tmp_path: Path) -> recipes.Recipe:
    path = tmp_path / "two.yaml"
    path.write_text(TEXT)
    return recipes.load(str(path))


def test_a_row_takes_the_budget_of_the_table(two: recipes.Recipe) -> None:
    row = table.recipe_of(two, two.rows[1])
    assert (row.steps, row.batch, row.seed, row.sample.every) == (4, 8, 0, 100)
    assert row.stages[0].losses[0].kind == "score"


def test_both_rows_are_in_one_table_with_their_sheets(two: recipes.Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert job.run(two, folder, device="cpu", quiet=True) == 0
    rows = json.loads((folder / "eval.json").read_text())["toy.energy_distance"]
    assert {row["recipe"] for row in rows} == {"dmd2", "sds"}
    assert {path.name for path in (folder / "samples").iterdir()} == {"dmd2.png", "sds.png"}
    assert "dmd2" in (folder / "report.html").read_text()


def test_a_dry_run_estimates_every_row(two: recipes.Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run(two, tmp_path / "run", device="cpu", dry_run=True) == 0
    said = capsys.readouterr().out
    assert "dmd2 (toy/ring4):" in said and "sds (toy/ring4):" in said and said.count("estimate:") == 2
    assert not (tmp_path / "run").exists()


def test_resume_does_only_what_is_missing(two: recipes.Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert job.run(two, folder, device="cpu", quiet=True) == 0
    first = (folder / "rows/dmd2/eval.json").stat().st_mtime_ns
    (folder / "rows/sds/eval.json").unlink()
    assert job.run(two, folder, device="cpu", resume=True, quiet=True) == 0
    assert (folder / "rows/dmd2/eval.json").stat().st_mtime_ns == first
    assert (folder / "rows/sds/eval.json").exists()


def test_a_stopped_row_stops_the_table_with_its_status(two: recipes.Recipe, tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stopped:
        table.carry_out(two, tmp_path, lambda *args, **kwargs: 143, print)
    assert stopped.value.code == 143


def test_a_stopped_table_is_not_a_failed_one(
    two: recipes.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = tmp_path / "run", Trainer.one_step

    def one_step(self: Trainer) -> None:
        plain(self)
        if self.step == 2 and (folder / "rows/sds").exists():  # the estimate before it steps from 2 to 4
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "one_step", one_step)
    assert job.run(two, folder, device="cpu", quiet=True) == 143
    assert f"limbeck resume {folder}`" in (folder / "log.txt").read_text() and not (folder / "error.txt").exists()
    monkeypatch.setattr(Trainer, "one_step", plain)
    assert job.run(two, folder, device="cpu", resume=True, quiet=True) == 0
    whole = tmp_path / "whole"
    assert job.run(two, whole, device="cpu", quiet=True) == 0
    assert (folder / "eval.json").read_text() == (whole / "eval.json").read_text()
    one, two_ = (checkpoint.latest(f / "rows/sds/checkpoints").tensors for f in (folder, whole))
    assert all(torch.equal(one[key], two_[key]) for key in one)


def test_references_are_shown_once() -> None:
    def part(value: float) -> table.Tables:
        return {"m": [{"generator": "teacher", "v": 0.0}, {"generator": "student", "v": value}]}

    merged = table.merged({"a": part(1.0), "b": part(2.0)})["m"]
    assert [(row["recipe"], row["generator"], row["v"]) for row in merged] == [
        ("", "teacher", 0.0), ("a", "student", 1.0), ("b", "student", 2.0)]  # fmt: skip


def test_a_table_needs_rows(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    path.write_text("about: nothing\njob: table\nsteps: 1\nbatch: 1\n")
    with pytest.raises(BadInput, match="rows"):
        recipes.load(str(path))
