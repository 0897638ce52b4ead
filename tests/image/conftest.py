"""Shared by the image tests: tiny pipelines, built once a session."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The module tiny_pictures."""
    import tiny_pictures

    return tiny_pictures


@pytest.fixture(scope="session")
def pipeline_folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> folder of its tiny pipeline."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("pipelines")
    return lambda family: tiny.build(family, root)
