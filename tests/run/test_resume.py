"""Ten steps, a resume and ten more are twenty steps bit for bit; stages start where they say."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from limbeck.core.run import checkpoint, job
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator

TWO_STAGES = [
    "stages.0.steps=8",
    "stages.1.name=second",
    "stages.1.steps=8",
    "stages.1.init_from=main",
    "stages.1.losses=[{kind: tinyrun.pair}]",
]


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def ending(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.latest(folder / "checkpoints").tensors


def assert_same(a: Path, b: Path) -> None:
    one, two = ending(a), ending(b)
    assert one.keys() == two.keys() and {key.split("/")[-2] for key in one} >= {"param", "ema", "objective"}
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert rows(a) == rows(b)


@pytest.mark.parametrize("stop", [5, 10])
def test_ten_and_ten_are_twenty(load, tmp_path: Path, stop: int) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert job.run(load("checkpoint.every=5"), whole, device="cpu", quiet=True) == 0
    interrupt(load("checkpoint.every=5"), halves, stop)
    assert checkpoint.latest(halves / "checkpoints").manifest.step == stop
    assert job.run(load("checkpoint.every=5"), halves, device="cpu", resume=True, quiet=True) == 0
    assert_same(whole, halves)


def interrupt(recipe, folder: Path, step: int) -> None:
    """A real signal once the checkpoint of this step is there (asked for in the step before)."""
    from limbeck.core.run.trainer import Trainer

    plain = Trainer.one_step

    def one_step(self: Trainer) -> None:
        plain(self)
        if self.step == step and (folder / "metrics.jsonl").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.one_step = one_step
    try:
        assert job.run(recipe, folder, device="cpu", quiet=True) == 143
    finally:
        Trainer.one_step = plain


def test_the_fault_is_seen_when_the_optimiser_is_not_restored(load, tmp_path: Path, monkeypatch) -> None:
    from limbeck.core.run.players import Player

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    job.run(load(), whole, device="cpu", quiet=True)
    interrupt(load(), halves, 10)
    plain = Player.load
    forgetful = lambda self, state: plain(self, {k: v for k, v in state.items() if "optim" not in k})  # noqa: E731
    monkeypatch.setattr(Player, "load", forgetful)
    job.run(load(), halves, device="cpu", resume=True, quiet=True)
    with pytest.raises(AssertionError):
        assert_same(whole, halves)


def test_a_finished_run_resumes_to_itself_and_a_longer_one_goes_on(load, tmp_path: Path) -> None:
    long, grown = tmp_path / "long", tmp_path / "grown"
    job.run(load("steps=20"), long, device="cpu", quiet=True)
    job.run(load("steps=10"), grown, device="cpu", quiet=True)
    assert job.run(load("steps=10"), grown, device="cpu", resume=True, quiet=True) == 0
    assert job.run(load("steps=20"), grown, device="cpu", resume=True, quiet=True) == 0
    one, two = ending(long), ending(grown)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_half_a_line_of_metrics_and_later_rows_are_dropped(load, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    job.run(load(), whole, device="cpu", quiet=True)
    interrupt(load(), halves, 10)
    with (halves / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "main", "step": 12, "loss": 1}\n{"stage": "ma')
    job.run(load(), halves, device="cpu", resume=True, quiet=True)
    assert_same(whole, halves)


def test_stages_start_from_the_stage_they_name_and_resume_in_the_right_one(load, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    recipe = load(*TWO_STAGES, "checkpoint.every=4", "log.every=1")
    job.run(recipe, whole, device="cpu", quiet=True)
    first = checkpoint.latest(whole / "checkpoints", stage="main").tensors
    second = checkpoint.load(whole / "checkpoints" / "second-00000004").tensors
    moved = (second["player/critic/param/first.weight"] - first["player/critic/param/first.weight"]).abs().max()
    assert 0 < moved < 0.1  # four steps away from the end of the first stage; a fresh net is further
    assert [row["stage"] for row in rows(whole)] == ["main"] * 8 + ["second"] * 8
    interrupt(recipe, halves, 6)
    assert checkpoint.latest(halves / "checkpoints").manifest.stage == "main"
    job.run(recipe, halves, device="cpu", resume=True, quiet=True)
    assert_same(whole, halves)


def test_a_stage_may_have_data_of_its_own(load, tmp_path: Path) -> None:
    recipe = load(*TWO_STAGES, "stages.1.data={kind: tinyrun.points, radius: 3.0}")
    build = Build(recipe)
    seen = []
    for stage in (None, "main", "second", "main"):
        if stage:
            build.objective(stage)
        seen.append(float(build.piece("data").batch(4, generator(0, "x", 0), slice(None)).x.norm(dim=1).mean()))
    assert seen == pytest.approx([1.0, 1.0, 3.0, 1.0])
    build.forget()
    assert build.piece("data") is build.piece("data")
    with pytest.raises(BadInput, match=r"stages\.1\.data.*radious"):
        load(*TWO_STAGES, "stages.1.data={kind: tinyrun.points, radious: 3.0}")


def test_init_from_another_run_or_from_nowhere(load, tmp_path: Path) -> None:
    job.run(load("steps=4"), tmp_path / "a", device="cpu", quiet=True)
    assert (
        job.run(load("steps=4", f"stages.0.init_from={tmp_path / 'a'}"), tmp_path / "b", device="cpu", quiet=True) == 0
    )
    with pytest.raises(BadInput, match="neither an earlier stage nor a run folder"):
        job.run(load("steps=4", "stages.0.init_from=nowhere"), tmp_path / "c", device="cpu", quiet=True)
    assert "neither an earlier stage" in (tmp_path / "c" / "error.txt").read_text()


def test_a_damaged_newest_checkpoint_falls_back_with_one_line(load, tmp_path: Path, capsys) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    job.run(load("checkpoint.every=5"), whole, device="cpu", quiet=True)
    job.run(load("checkpoint.every=5"), halves, device="cpu", quiet=True)
    newest = halves / "checkpoints" / "main-00000020" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    job.run(load("checkpoint.every=5"), halves, device="cpu", resume=True)
    said = capsys.readouterr().out
    assert said.count("is damaged:") == 1 and "going on after step 15" in said
    assert_same(whole, halves)


@pytest.mark.parametrize("kind", ["dmd2", "swiftbrush", "sim", "f-distill", "score"])
def test_ten_and_ten_are_twenty_for_every_method_of_the_toy(tmp_path: Path, kind: str) -> None:
    sets = [f"stages.0.losses.0.kind={kind}", "steps=20", "batch=16", "checkpoint.every=5", "log.every=4", "eval=[]"]
    recipe = recipes.load("toy/ring4", sets)
    for stage in recipe.stages:
        for loss in stage.losses:
            if getattr(loss, "critic", None) is not None:
                loss.critic.warm = 3
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert job.run(recipe, whole, device="cpu", quiet=True) == 0
    interrupt(recipe, halves, 10)
    assert job.run(recipe, halves, device="cpu", resume=True, quiet=True) == 0
    one, two = ending(whole), ending(halves)
    assert one.keys() == two.keys() and [key for key in one if not torch.equal(one[key], two[key])] == []
    assert rows(whole) == rows(halves)


def test_sigterm_to_a_process_gives_143_and_resume_ends_the_run(
    recipe_file: Path, tmp_path: Path, child_env, python
) -> None:
    slow = ["--set", "stages.0.losses.0.pause=0.05", "--set", "steps=60", "--device", "cpu"]
    run = python.start(["-m", "limbeck", "run", recipe_file, *slow, "--out", tmp_path, "--name", "r"], env=child_env)
    while not (tmp_path / "r" / "metrics.jsonl").exists() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    done = run.ended(timeout=60)
    assert done.returncode == 143 and "limbeck resume" in done.stdout
    step = checkpoint.latest(tmp_path / "r" / "checkpoints").manifest.step
    assert 0 < step < 60
    python.run(["-m", "limbeck", "resume", tmp_path / "r", "--device", "cpu"], env=child_env, check=True)
    assert checkpoint.latest(tmp_path / "r" / "checkpoints").manifest.step == 60
    assert [row["step"] for row in rows(tmp_path / "r")] == list(range(3, 61, 3))
