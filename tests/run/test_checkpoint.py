"""Checkpoints: exact, complete or absent, and every kind of damage is seen."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from limbeck.core.run import checkpoint
from limbeck.core.run.checkpoint import MANIFEST, STATE, Manifest
from limbeck.core.run.errors import BadInput, LimbeckError


def state(fill: float = 1.0) -> dict[str, Tensor]:
    return {
        "a/flag": torch.tensor([True, False, True]),
        "b/half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,  # not contiguous
        "c/weight": torch.full((3, 5), fill),
        "d/double": torch.tensor(1 / 3, dtype=torch.float64),
        "e/empty": torch.zeros(0, 4),
        "f/count": torch.tensor([2**40]),
    }


def save(root: Path, step: int, **fields) -> Path:
    keep = fields.pop("keep", 9)
    return checkpoint.save(root, state(float(step)), Manifest(fields.pop("stage", "main"), step, **fields), keep)


def test_tensors_come_back_bit_for_bit_and_other_programs_read_them(tmp_path: Path) -> None:
    folder = save(tmp_path, 7, pending={"x": 0.1})
    loaded = checkpoint.load(folder)
    assert loaded.manifest.step == 7 and loaded.manifest.pending == {"x": 0.1}
    for name, tensor in state(7.0).items():
        assert torch.equal(loaded.tensors[name], tensor) and loaded.tensors[name].dtype == tensor.dtype, name
    with safe_open(folder / STATE, "pt") as file:
        assert set(file.keys()) == set(state())


def test_the_last_n_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, value in enumerate([0.1, 0.9, 0.3, 0.2, 0.4]):
        save(tmp_path, step, held_out=value, keep=2)
    save(tmp_path, 1, stage="other", stage_index=1, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["main-00000001", "main-00000003", "main-00000004", "other-00000001"]
    assert checkpoint.latest(tmp_path).manifest.stage == "other"
    assert checkpoint.latest(tmp_path, stage="main").manifest.step == 4


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "a flipped byte of a tensor": lambda f: flip(f / STATE, -3),
    "a flipped byte of the header": lambda f: flip(f / STATE, 20),
    "a truncated file": lambda f: os.truncate(f / STATE, (f / STATE).stat().st_size - 1),
    "an empty file": lambda f: os.truncate(f / STATE, 0),
    "a missing file": lambda f: (f / STATE).unlink(),
    "a missing manifest": lambda f: (f / MANIFEST).unlink(),
    "half a manifest": lambda f: os.truncate(f / MANIFEST, 40),
    "a changed step": lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"step": 2', '"step": 3')),
    "not a mapping": lambda f: (f / MANIFEST).write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_line_and_the_older_one_is_used(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    DAMAGE[damage](broken)
    with pytest.raises(BadInput) as error:
        checkpoint.load(broken)
    assert str(broken) in str(error.value) and "\n" not in str(error.value) and "damaged" in str(error.value)
    lines: list[str] = []
    assert checkpoint.latest(tmp_path, lines.append).manifest.step == 1
    assert len(lines) == 1 and str(broken) in lines[0]


def test_every_flipped_byte_of_the_manifest_is_harmless_or_seen(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    good, whole = checkpoint.read_manifest(folder), (folder / MANIFEST).read_bytes()
    for where in range(len(whole)):
        flip(folder / MANIFEST, where)
        try:
            assert checkpoint.read_manifest(folder) == good
        except BadInput:
            pass
        (folder / MANIFEST).write_bytes(whole)


def test_another_format_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    text = json.loads((folder / MANIFEST).read_text())
    text["manifest"]["format"] = 99
    (folder / MANIFEST).write_text(json.dumps(text))
    with pytest.raises(BadInput, match="checkpoint format 99, this limbeck reads 1"):
        checkpoint.load(folder)


def test_saving_again_replaces_and_stale_folders_are_swept(tmp_path: Path) -> None:
    save(tmp_path, 2)
    for name in (".tmp-main-00000003", ".old-main-00000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).write_bytes(b"half")
    assert checkpoint.latest(tmp_path).manifest.step == 2
    checkpoint.save(tmp_path, {"w": torch.zeros(1)}, Manifest("main", 2))
    assert [path.name for path in tmp_path.iterdir()] == ["main-00000002"]
    assert set(checkpoint.latest(tmp_path).tensors) == {"w"}


def test_a_checkpoint_moved_aside_by_a_crash_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 2).rename(tmp_path / ".old-main-00000002")
    checkpoint.sweep(tmp_path)
    assert checkpoint.latest(tmp_path).manifest.step == 2


def as_nobody(tmp_path: Path) -> int:
    """Root may write anywhere; give the right up while saving."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    return user


def test_a_read_only_folder_is_one_clear_line(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for path in (*tmp_path.parents[:2], tmp_path):
        path.chmod(0o555)
    user = as_nobody(tmp_path)
    try:
        with pytest.raises(LimbeckError, match="cannot be saved .Permission denied.; older ones are intact"):
            save(tmp_path, 2)
    finally:
        os.seteuid(user)
        for path in (*tmp_path.parents[:2], tmp_path):
            path.chmod(0o755)
    assert checkpoint.latest(tmp_path).manifest.step == 1


FULL = """
import sys, torch
from pathlib import Path
from limbeck.core.run import checkpoint
from limbeck.core.run.errors import LimbeckError
root = Path(sys.argv[1])
checkpoint.save(root, {"w": torch.zeros(1000)}, checkpoint.Manifest("main", 1))
try:
    checkpoint.save(root, {"w": torch.zeros(10**6)}, checkpoint.Manifest("main", 2))
except LimbeckError as error:
    print(error)
print(checkpoint.latest(root).manifest.step, sorted(path.name for path in root.iterdir()))
"""


def test_a_full_disk_is_one_clear_line(tmp_path: Path, python) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        done = python.run(["-c", FULL, disk / "c"], check=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    error, after = done.stdout.splitlines()
    assert "No space left on device" in error and "older ones are intact" in error
    assert after == "1 ['main-00000001']"


def test_a_file_too_large_is_one_clear_line(tmp_path: Path, python) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))\n" + FULL
    done = python.run(["-c", code, tmp_path / "c"], check=True)
    error, after = done.stdout.splitlines()
    assert "File too large" in error and "older ones are intact" in error and after == "1 ['main-00000001']"


@pytest.mark.parametrize("part", [MANIFEST, STATE])
def test_a_checkpoint_that_the_run_drops_meanwhile_is_no_damage(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on replaces its newest checkpoint while it is opened: the newer one is found, without a word."""
    name = {MANIFEST: "read_manifest", STATE: "_verify"}[part]
    plain, lines = getattr(checkpoint, name), list[str]()
    save(tmp_path, 1, keep=1)

    def late(folder: Path, *rest):
        monkeypatch.setattr(checkpoint, name, plain)
        save(tmp_path, 2, keep=1)
        return plain(folder, *rest)

    monkeypatch.setattr(checkpoint, name, late)
    assert checkpoint.latest(tmp_path, lines.append).manifest.step == 2 and lines == []
