"""Shared by the sequence tests."""

from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The module tiny_sequences."""
    import tiny_sequences

    return tiny_sequences
