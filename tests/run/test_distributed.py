"""Two processes are one: the same gradient, the same run, for data parallel and sharded parameters."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from limbeck.core.run import checkpoint, distributed
from limbeck.core.run.errors import BadInput


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The recipe and the ends of one process."""
    from conftest import RECIPE
    from tinyrun import together

    folder = tmp_path_factory.mktemp("one")
    (folder / "tiny.yaml").write_text(RECIPE)
    together.main(str(folder / "tiny.yaml"), folder, shard=False)
    return folder / "tiny.yaml", folder


def difference(a: Path, b: Path, part: str = "/") -> float:
    one, two = checkpoint.latest(a).tensors, checkpoint.latest(b).tensors
    keys = [key for key in one if key.startswith("player/") and part in key]
    assert keys and one.keys() == two.keys()
    return max(float((one[key].double() - two[key].double()).abs().max()) for key in keys)


@pytest.mark.parametrize("mode", ["parallel", "shard"])
def test_two_processes_give_one_process_s_gradient_and_run(one, tmp_path: Path, child_env, python, mode: str) -> None:
    recipe, alone = one
    script = Path(__file__).parent / "tinyrun" / "together.py"
    python.team([script, recipe, tmp_path, mode], env=child_env)
    start = checkpoint.load(tmp_path / "step" / "main-00000000").tensors
    assert all(torch.equal(t, start[k]) for k, t in checkpoint.load(alone / "step" / "main-00000000").tensors.items())
    moved = max(
        float((checkpoint.latest(alone / "step").tensors[k] - start[k]).abs().max()) for k in start if "param" in k
    )
    gradient, end = (
        difference(alone / "step", tmp_path / "step", "/param/"),
        difference(alone / "run", tmp_path / "run"),
    )
    print(f"{mode}: gradient {gradient:.1e} (of {moved:.2f}), end of a 30-step run {end:.1e}")
    assert moved > 0.01 and gradient <= 1e-9 and end <= 1e-4


def test_without_averaging_two_processes_would_differ(one, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: one rank's half of the batch alone moves the weights visibly elsewhere."""
    from tinyrun import together

    from limbeck.core.run.distributed import Team

    monkeypatch.setattr(Team, "size", 2)
    for name in ("agree", "mean_numbers"):
        monkeypatch.setattr(Team, name, lambda self, value: value)
    monkeypatch.setattr(Team, "mean_gradients", lambda self, params, loss: loss)
    monkeypatch.setattr(Team, "barrier", lambda self: None)
    together.train(str(one[0]), tmp_path / "step", together.SGD, 1, shard=False)
    assert difference(one[1] / "step", tmp_path / "step", "/param/") > 1e-3


def test_launch_runs_n_processes_and_forwards_a_signal(recipe_file: Path, tmp_path: Path, child_env) -> None:
    slow = ["--set", "stages.0.losses.0.pause=0.02", "--set", "steps=2000", "--device", "cpu", "--processes", "2"]
    arguments = ["run", str(recipe_file), *slow, "--out", str(tmp_path), "--name", "r"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen([sys.executable, "-m", "limbeck", *arguments], env=child_env, **pipes)
    while not (tmp_path / "r" / "metrics.jsonl").exists() and run.poll() is None:
        time.sleep(0.1)
    assert '"processes": 2' in (tmp_path / "r" / "environment.json").read_text()
    os.kill(run.pid, signal.SIGTERM)
    said, _ = run.communicate(timeout=90)
    assert run.returncode == 143, said
    assert checkpoint.latest(tmp_path / "r" / "checkpoints").manifest.step > 0
    assert said.count("a checkpoint is written") == 1 and "Traceback" not in said


def test_launch_gives_the_workers_exit_code(tmp_path: Path, child_env) -> None:
    (tmp_path / "bad.yaml").write_text("steps: 1\nbatch: 3\nnonsense: 1\n")
    code = "import sys; from limbeck.core.run.distributed import launch; sys.exit(launch(sys.argv[1:], 2))"
    bad = [sys.executable, "-c", code, "run", str(tmp_path / "bad.yaml"), "--out", str(tmp_path)]
    done = subprocess.run(bad, env=child_env, capture_output=True, text=True)
    assert done.returncode == 2 and "nonsense" in done.stderr and "Traceback" not in done.stderr


def test_impossible_teams_are_refused() -> None:
    with pytest.raises(BadInput, match="needs several processes"):
        distributed.Team("cpu", shard=True)
    with pytest.raises(BadInput, match="--processes 0"):
        distributed.launch([], 0)


@pytest.mark.slow
def test_a_method_with_a_critic_and_a_head_on_its_features_runs_sharded(tmp_path: Path, python) -> None:
    """The head reads features from inside the critic: its backward must find the whole weights."""
    short = ["steps=8", "checkpoint.every=8", "batch=32", "stages.0.losses.0.critic.warm=1", "log.every=4"]
    for name, processes, shard in (("one", 1, "false"), ("parallel", 2, "false"), ("sharded", 2, "true")):
        flags = [part for item in (*short, f"distributed.shard={shard}") for part in ("--set", item)]
        order = ["-m", "limbeck", "run", "toy/ring4", *flags, "--device", "cpu", "--out", tmp_path, "--name", name]
        python.team(order, processes)
        assert (tmp_path / name / "eval.json").exists()
    for name in ("parallel", "sharded"):
        gap = difference(tmp_path / "one" / "checkpoints", tmp_path / name / "checkpoints", "/param/")
        print(f"{name}: {gap:.1e}")
        assert gap <= 1e-4
