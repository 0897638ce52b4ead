"""Kills a run of the tiny pair (a checkpoint at every step) at random moments; each time it must load and go on.

Everything is imported once; each run is a forked child, so thirty of them take seconds.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import tinyrun
from limbeck.core.run import checkpoint, job
from limbeck.core.run import recipe as recipes
from limbeck.core.run.registry import registry


def child(recipe: recipes.Recipe, folder: Path) -> int:
    """Start the run, or go on with it; the process's id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = job.run(recipe, folder, device="cpu", resume=(folder / "recipe.yaml").exists(), quiet=True)
        finally:
            os._exit(code)
    return pid


def main(path: str, out: Path, kills: int) -> None:
    torch.set_num_threads(1)
    if not registry().specs.get(("objective", "tinyrun.pair")):
        registry().add("tinyrun", "tinyrun", Path(tinyrun.__file__).parent)
    job.run(recipes.load(path, ["steps=3"]), out / "warm", device="cpu", quiet=True)  # what torch imports late
    rng, done, saving, number, step = random.Random(0), 0, 0, 0, 0
    while done < kills:
        folder = out / f"run-{number}"
        recipe = recipes.load(path, ["steps=150", "checkpoint.every=1", "sample.every=1000", "student.width=256"])
        pid = child(recipe, folder)
        wait_for_progress(folder, step, pid)
        time.sleep(rng.uniform(0, 0.03))
        if os.waitpid(pid, os.WNOHANG) != (0, 0):  # it was done before we struck
            number, step = number + 1, 0
            continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
        saving += any(p.name.startswith(".") for p in (folder / "checkpoints").iterdir())
        lines: list[str] = []
        loaded = checkpoint.latest(folder / "checkpoints", lines.append)
        assert loaded is not None and loaded.manifest.step >= step and not lines, (step, lines)
        step = loaded.manifest.step
    final = out / f"run-{number}"
    _, status = os.waitpid(child(recipe, final), 0)
    assert os.waitstatus_to_exitcode(status) == 0 and checkpoint.latest(final / "checkpoints").manifest.step == 150
    assert not [p for p in (final / "checkpoints").iterdir() if p.name.startswith(".")]
    print(f"{kills} kills, {saving} of them while saving, {number + 1} runs")


def wait_for_progress(folder: Path, step: int, pid: int) -> None:
    """Until a checkpoint newer than `step` is there, or the run has ended."""
    while not newest(folder) > step:
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
        time.sleep(0.002)


def newest(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return max(int(p.name[-8:]) for p in (folder / "checkpoints").glob("main-*"))
    return 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
