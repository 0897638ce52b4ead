"""Shared by the sequence tests."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The module tests/sequence/tiny.py."""
    spec = importlib.util.spec_from_file_location("sequence_tiny", Path(__file__).with_name("tiny.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
