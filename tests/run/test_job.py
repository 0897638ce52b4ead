"""A recipe carried out in a folder: what lies there, what a failure leaves, what comes back from it."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import tracking

from limbeck.core.run import checkpoint, job, metrics
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, LimbeckError, NonFinite
from limbeck.core.run.metrics import Metrics


def test_the_run_folder_holds_everything(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "r"
    assert job.run(load(), folder, device="cpu") == 0
    names = {path.name for path in folder.iterdir()}
    files = {"recipe.yaml", "environment.json", "metrics.jsonl", "log.txt", "eval.json", "report.html"}
    assert names == files | {"samples", "checkpoints"}
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"step-{i:08d}.png" for i in (0, 10, 20)]
    assert set(json.loads((folder / "eval.json").read_text())) == {"tinyrun.mean"}
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["limbeck"] and environment["versions"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert "main: estimate:" in said and "main 3/20  loss/generator" in said and "ETA" in said and "done:" in said


def test_nan_leaves_the_last_good_checkpoint_and_a_report(load, tmp_path: Path) -> None:
    folder, sets = tmp_path / "r", ["stages.0.losses.0.fault=gradient", "stages.0.losses.0.at=13"]
    with pytest.raises(NonFinite, match=r"step 13: the gradient of last\.bias of critic is NaN"):
        job.run(load(*sets), folder, device="cpu", quiet=True)
    assert checkpoint.latest(folder / "checkpoints").manifest.step == 10
    assert "last.bias of critic" in (folder / "error.txt").read_text()
    assert "last.bias of critic" in (folder / "report.html").read_text()
    assert job.run(load(), folder, device="cpu", resume=True, quiet=True) == 0
    assert not (folder / "error.txt").exists()


def test_open_run_gives_the_averaged_weights(load, tmp_path: Path) -> None:
    job.run(load(), tmp_path / "r", device="cpu", quiet=True)
    tensors = checkpoint.latest(tmp_path / "r" / "checkpoints").tensors
    build = job.open_run(tmp_path / "r", "cpu")
    weight = build.piece("student").first.weight
    assert torch.equal(weight, tensors["player/generator/ema/first.weight"])
    assert not torch.equal(weight, tensors["player/generator/param/first.weight"])
    before = json.loads((tmp_path / "r" / "eval.json").read_text())
    assert job.evaluate(build) == before


def test_a_stage_that_is_ended_early_comes_to_its_best_checkpoint(load, tmp_path: Path, capsys) -> None:
    sets = ["stages.0.losses.0.finish=11", "checkpoint.every=2", "log.every=1", "checkpoint.keep=9"]
    folder, recipe = tmp_path / "r", load(*sets)
    assert job.run(recipe, folder, device="cpu", quiet=False) == 0
    said = capsys.readouterr().out
    saved = [checkpoint.load(folder) for folder in (folder / "checkpoints").iterdir()]
    best = max(saved, key=lambda loaded: loaded.manifest.held_out)
    assert best.manifest.step < 11 and max(loaded.manifest.step for loaded in saved) == 11
    assert f"ended early at step 11; the weights are those of step {best.manifest.step}" in said
    opened = job.open_run(folder)
    weight = opened.piece("student").state_dict()["first.weight"]
    assert torch.equal(weight, best.tensors["player/generator/ema/first.weight"]) and opened.step == best.manifest.step
    before = (folder / "eval.json").read_text()
    assert job.run(recipe, folder, device="cpu", resume=True, quiet=True) == 0
    assert (folder / "eval.json").read_text() == before
    assert checkpoint.latest(folder / "checkpoints").manifest.step == 11


def test_the_best_by_held_out_is_kept(load, tmp_path: Path) -> None:
    job.run(load("checkpoint.every=2", "checkpoint.keep=2", "log.every=2"), tmp_path / "r", device="cpu", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["held_out"])["step"]
    kept = {int(path.name[-8:]) for path in (tmp_path / "r" / "checkpoints").iterdir()}
    assert kept == {18, 20, best}


def test_folders_that_cannot_be_used_are_one_clear_line(load, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "file").write_text("")
    with pytest.raises(BadInput, match="is not empty; choose another --name"):
        job.run(load(), tmp_path / "r", device="cpu")
    with pytest.raises(BadInput, match="cannot write there .*choose another --out"):
        job.run(load(), tmp_path / "r" / "file" / "x", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="recipe.yaml"):
        job.open_run(tmp_path / "empty")


def test_a_disk_that_fills_up_is_one_clear_line(load, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    job.run(load("steps=3"), folder, device="cpu", quiet=True)
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(LimbeckError, match="No space left on device"), Metrics(folder, quiet=True) as metrics:
        with job._explained(load()):
            metrics.row(1, {"loss": 1.0})


def test_pieces_have_their_own_seeds_whatever_the_order(load) -> None:
    before = torch.random.get_rng_state()
    one, two, other = Build(load()), Build(load()), Build(load("seed=1"))
    one.objective("main")
    weight = one.piece("student").first.weight
    assert torch.equal(weight, two.piece("student").first.weight) and one.piece("student") is one.piece("student")
    assert not torch.equal(weight, other.piece("student").first.weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_missing_slots_stages_and_shared_players_are_explained(load) -> None:
    build = Build(load())
    with pytest.raises(BadInput, match="has no teacher; add `teacher:"):
        build.piece("teacher")
    with pytest.raises(BadInput, match=r'no stage "mian" \(did you mean "main"\?\)'):
        build.objective("mian")
    both = load("stages.0.losses=[{kind: tinyrun.pair}, {kind: tinyrun.pair, generator: {lr: 0.5}}]")
    with pytest.raises(BadInput, match='player "generator" different optimisers'):
        Build(both).objective("main")


def test_two_losses_share_the_student(load, tmp_path: Path) -> None:
    both = load("stages.0.losses=[{kind: tinyrun.pair}]", "steps=4")
    twice = Build(both)
    objective = twice.objective("main")
    assert objective.players["generator"] is twice.player("generator", {}, both.stages[0].losses[0].generator)


def test_trackers_that_are_not_installed_name_the_extra(load, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"track: wandb is not installed; run `pip install 'limbeck\[logging\]'`"):
        job.run(load("track=[wandb]"), tmp_path / "r", device="cpu", quiet=True)


def test_a_tracker_that_does_not_start_says_why_in_one_line(load, tmp_path: Path, monkeypatch) -> None:
    class Refused:
        def __init__(self, title: str, name: str, dir: str) -> None:
            assert (title, name, dir) == ("tiny", "r", str(tmp_path / "r"))

        def start(self) -> None:
            raise RuntimeError("no key\nhow to get one")

    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Refused)
    with pytest.raises(BadInput, match=r"^track: wandb does not start \(no key\); mend that or drop it$"):
        job.run(load("track=[wandb]"), tmp_path / "r", device="cpu", quiet=True)


def test_tensorboard_writes_beside_the_numbers(load, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert job.run(load("track=[tensorboard]", "log.every=5"), tmp_path / "r", device="cpu", quiet=True) == 0
    seen = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    found = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in seen.Scalars("loss/generator")]
    assert len(found) > 1 and found == [(row["step"], row["loss/generator"]) for row in rows]


def test_bf16_runs_and_keeps_float32_weights(load, tmp_path: Path) -> None:
    assert job.run(load("precision=bf16", "steps=4"), tmp_path / "r", device="cpu", quiet=True) == 0
    tensors = checkpoint.latest(tmp_path / "r" / "checkpoints").tensors
    assert tensors["player/generator/param/first.weight"].dtype == torch.float32


def test_a_job_that_only_samples(load, tmp_path: Path) -> None:
    assert job.run(load("job=sample", "stages=[]"), tmp_path / "s", device="cpu", quiet=True) == 0
    assert [path.name for path in (tmp_path / "s" / "samples").iterdir()] == ["step-00000000.png"]
