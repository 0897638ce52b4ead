"""What an installation rests on: packages, data files, links, locked versions, the commands of the Makefile."""

import fnmatch
import os
import re
import runpy
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
INNER = ("core", "domains", "recipes")


def lock() -> dict[str, str]:
    """Canonical name -> version of the lock file."""
    lines = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def shipped() -> list[Path]:
    """Every file below the importable folders, caches left out."""
    folders = [ROOT / name for name in INNER]
    files = [Path(top, name) for folder in folders for top, _, names in os.walk(folder) for name in names]
    return [file for file in files if "__pycache__" not in file.parts and not file.name.endswith((".tmp", ".lock"))]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What setup.py lists."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return set(found["packages"])


def test_extras_are_those_that_the_manual_names() -> None:
    names = "image ocr video threed sequence gsplat viewer usd gpu embedded logging dev all"
    assert set(EXTRAS) == set(names.split())


def test_setup_lists_every_package(packages: set[str]) -> None:
    folders = [file.parent.relative_to(ROOT) for file in shipped() if file.name == "__init__.py"]
    assert len(folders) > 5
    missing = {".".join(("limbeck", *folder.parts)) for folder in folders} - packages
    assert not missing and "limbeck" in packages


def test_folders_with_modules_have_an_init() -> None:
    bare = {file.parent for file in shipped() if file.suffix == ".py"} - {
        file.parent for file in shipped() if file.name == "__init__.py"
    }
    assert not bare


def test_data_files_are_shipped(packages: set[str]) -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    assert {"py.typed", "*.yaml", "*.safetensors", "*.json", "*.webp", "*.md"} <= set(patterns)
    for file in shipped():
        if file.suffix == ".py" or file.name.startswith("."):
            continue
        assert any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns), f"{file} is not package data"
        assert ".".join(("limbeck", *file.parent.relative_to(ROOT).parts)) in packages, f"{file} is in no package"


def test_pieces_lie_beside_their_packages() -> None:
    assert (ROOT / "core" / "pieces.yaml").is_file()
    assert any((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("name", INNER)
def test_links_lead_to_the_real_folders(name: str) -> None:
    link = ROOT / "src" / "limbeck" / name
    assert link.is_symlink() and link.resolve() == ROOT / name
    assert not Path(os.readlink(link)).is_absolute()


def test_the_console_script_loads() -> None:
    (script,) = (point for point in entry_points(group="console_scripts") if point.name == "limbeck")
    assert callable(script.load())


def test_the_lock_holds_plain_pins() -> None:
    lines = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    assert "limbeck" not in lock() and lock()["torch"] == "2.13.0"


def test_the_lock_satisfies_what_setup_installs() -> None:
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(text for name in ("embedded", "image", "sequence", "threed", "dev") for text in EXTRAS[name]),
    ]
    for text in wanted:
        requirement = Requirement(text)
        version = lock().get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked"
        assert requirement.specifier.contains(version), f"{text} against {version}"


def test_nerfstudio_has_its_own_file_and_leaves_torch_alone() -> None:
    text = (ROOT / "requirements" / "nerfstudio.txt").read_text(encoding="utf-8")
    names = [line for line in text.splitlines() if not line.startswith("#")]
    assert any(name.startswith("nerfstudio==") for name in names)
    assert not any(name.startswith("torch") for name in names)
    assert not any("nerfstudio" in text for extra in EXTRAS.values() for text in extra)


def dry(target: str) -> str:
    """The commands that a target would run."""
    command = ["make", "-n", target]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout


def test_make_runs_what_it_says() -> None:
    assert "limbeck run image/demo" in dry("demo")
    test = dry("test")
    assert test.index("ruff check") < test.index("mypy") < test.index("pytest")


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make --no-print-directory test" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["Makefile", "pyproject.toml", "requirements/lock.txt", "requirements/nerfstudio.txt"])
def test_no_address_is_written_down(name: str) -> None:
    assert "://" not in (ROOT / name).read_text(encoding="utf-8")
