"""Shared by all tests: processes that start quickly, and a cache of their own."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).with_name("tools")))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LIMBECK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`python.run(["-m", "limbeck", …])`: see tests/tools/forked.py."""
    from forked import Python

    return Python(tmp_path_factory.mktemp("python"))
