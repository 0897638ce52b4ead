"""The tiny provider: registered in this process, and installable (by PYTHONPATH alone) for subprocesses."""

import os
import sys
from pathlib import Path

import pytest

from limbeck.core.run import recipe as recipes
from limbeck.core.run.registry import registry

HERE = Path(__file__).parent
RECIPE = """
name: tiny
student: {kind: tinyrun.net}
data: {kind: tinyrun.points}
space: {kind: tinyrun.space}
stages:
  - {name: main, losses: [{kind: tinyrun.pair}]}
eval: [{kind: tinyrun.mean}]
steps: 20
batch: 8
checkpoint: {every: 10, keep: 3}
log: {every: 3}
sample: {every: 10, prompts: [a point]}
"""


@pytest.fixture(scope="session", autouse=True)
def tiny() -> None:
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    registry().add("tinyrun", "tinyrun", HERE / "tinyrun")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def load(recipe_file: Path):
    """`load("steps=10", …)` gives the tiny recipe with these settings."""
    return lambda *sets: recipes.load(str(recipe_file), sets)


@pytest.fixture(scope="session")
def child_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `limbeck` finds the tiny provider as an installed plugin."""
    site = tmp_path_factory.mktemp("site")
    info = site / "tinyrun-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tinyrun\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[limbeck.plugins]\ntinyrun = tinyrun\n")
    path = os.pathsep.join([str(site), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
