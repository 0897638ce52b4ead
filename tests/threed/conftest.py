"""Shared by the 3D tests."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from limbeck.core.run import job
from limbeck.core.run.recipe import Recipe


@pytest.fixture
def threads() -> Iterator[None]:
    """Two torch threads while a test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random pipeline shaped as Stable Diffusion."""
    import tiny_pictures

    return Path(tiny_pictures.build("sd15", tmp_path_factory.mktemp("pipelines")))


@pytest.fixture
def resumed(tmp_path: Path) -> Callable[[Recipe], tuple[bytes, bytes]]:
    """Two steps, and the last of them again from the checkpoint of the first: both ends as files."""

    def weights(run: Path) -> list[Path]:
        return sorted((run / "checkpoints").rglob("*.safetensors"))

    def both(recipe: Recipe) -> tuple[bytes, bytes]:
        run = tmp_path / "run"
        assert job.run(recipe, run, device="cpu", quiet=True) == 0
        end = weights(run)[-1]
        found = end.read_bytes()
        shutil.rmtree(end.parent)
        assert len(weights(run)) == 1
        assert job.run(recipe, run, device="cpu", resume=True, quiet=True) == 0
        return found, end.read_bytes()

    return both
