"""Embedded files: complete, undamaged, licensed, small."""

import hashlib
from pathlib import Path

import pytest

from limbeck import core
from limbeck.domains import image, sequence, threed, video

ASSETS = [Path(str(domain.__file__)).parent / "assets" for domain in (core, image, sequence, threed, video)]
FOLDERS = sorted(path for assets in ASSETS for path in assets.iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_sums_list_every_file_and_agree(folder: Path) -> None:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = {name: want for want, _, name in (line.partition("  ") for line in lines)}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - {"SHA256SUMS"} == set(listed)
    for name, want in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == want, name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_licence_lies_beside_the_data(folder: Path) -> None:
    assert list(folder.glob("LICENSE*"))


def test_all_together_stay_small() -> None:
    assert sum(path.stat().st_size for assets in ASSETS for path in assets.rglob("*") if path.is_file()) < 150 * 2**20
