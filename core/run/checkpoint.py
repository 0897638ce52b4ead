"""Checkpoints: safetensors and a JSON manifest with SHA-256, complete under their name or not there at all.

A checkpoint is written into a temporary folder, synced to disk and renamed, so a crash at any moment leaves the older
ones intact; what lies in temporary folders is swept away by the next save. Tensors are written one at a time without a
copy of the whole state (a sharded one is gathered when its turn comes).
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from limbeck.core.run.errors import BadInput, LimbeckError, clean

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.safetensors"
TEMPORARY = (".tmp-", ".old-")
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: `step` finished steps of `stage` (the `stage_index`-th) of this recipe."""

    stage: str
    step: int
    recipe: str = ""
    stage_index: int = 0
    held_out: float | None = None  # the higher the better
    ended: str = ""  # why the stage ended before its last step; then its best checkpoint is its result
    pending: dict[str, float] = field(default_factory=dict)  # logged but not yet written numbers
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


class Loaded(NamedTuple):
    """A verified checkpoint."""

    manifest: Manifest
    tensors: dict[str, Tensor]


def save(root: Path, tensors: Mapping[str, Tensor], manifest: Manifest, keep: int = 3, writes: bool = True) -> Path:
    """Write `root/<stage>-<step>/`, then drop all but the last `keep` and the best; with `writes=False` only gather."""
    target = root / f"{manifest.stage}-{manifest.step:08d}"
    if not writes:
        for _ in map(_whole, tensors.values()):
            pass
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        temporary = root / f"{TEMPORARY[0]}{target.name}"
        temporary.mkdir()
        files = {STATE: _write_state(temporary / STATE, tensors)}
        _write_manifest(temporary / MANIFEST, {**asdict(manifest), "files": files})
        _sync(temporary)
        if target.exists():
            target.rename(root / f"{TEMPORARY[1]}{target.name}")
        temporary.rename(target)
        _sync(root)
        sweep(root)
        prune(root, keep)
    except OSError as error:
        with contextlib.suppress(OSError):
            sweep(root)
        raise LimbeckError(
            f"{target}: the checkpoint cannot be saved ({error.strerror or error}); older ones are intact: "
            "make room or permit writing there, then `limbeck resume` the run"
        ) from None
    return target


def load(folder: Path) -> Loaded:
    """The tensors, once every byte has been checked; BadInput when anything is not as it was written."""
    manifest = read_manifest(folder)
    for name, want in manifest.files.items():
        _verify(folder / name, want)
    try:
        return Loaded(manifest, load_file(folder / STATE))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _damaged(folder, f"{STATE} cannot be read ({clean(error, 80)})") from None


def latest(root: Path, say: Callable[[str], None] = lambda line: None, stage: str | None = None) -> Loaded | None:
    """The newest good checkpoint (of a stage); a broken one is skipped with one clear line."""
    for folder in _newest_first(root, say):
        if stage is None or folder.name.rpartition("-")[0] == stage:
            try:
                return load(folder)
            except BadInput as error:
                if not folder.exists():
                    return latest(root, say, stage)
                say(f"{error}; trying the one before")
    return None


def result(root: Path, say: Callable[[str], None] = lambda line: None, stage: str | None = None) -> Loaded | None:
    """What a run (or a stage) came to: its newest checkpoint, or its best one where it was ended early."""
    found = latest(root, say, stage)
    if found is None or not found.manifest.ended:
        return found
    best: tuple[float, Path] | None = None
    for folder in _newest_first(root, lambda line: None):
        manifest = read_manifest(folder)
        if manifest.stage == found.manifest.stage and manifest.held_out is not None:
            best = max(best or (manifest.held_out, folder), (manifest.held_out, folder), key=lambda pair: pair[0])
    return load(best[1]) if best else found


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, checked against its own hash."""
    try:
        text = json.loads((folder / MANIFEST).read_bytes().decode())
        body, digest = text["manifest"], text["sha256"]
        number = body["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(folder, f"{MANIFEST} is missing or cannot be read") from None
    if number != FORMAT:
        raise BadInput(f"{folder}: checkpoint format {clean(number, 20)}, this limbeck reads {FORMAT}; use its version")
    if digest != _digest(body):
        raise _damaged(folder, f"{MANIFEST} has a wrong SHA-256")
    try:
        return Manifest(**body)
    except TypeError as error:
        raise _damaged(folder, f"{MANIFEST}: {error}") from None


def sweep(root: Path) -> None:
    """Remove what an interrupted save has left; a checkpoint it had moved aside goes back to its place."""
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        place = root / folder.name.removeprefix(TEMPORARY[1])
        if folder.name.startswith(TEMPORARY[1]) and not place.exists():
            folder.rename(place)
        elif folder.name.startswith(TEMPORARY):
            shutil.rmtree(folder)


def prune(root: Path, keep: int) -> None:
    """Remove all but the last `keep` of each stage, each stage's end, and the best by held-out value."""
    groups: dict[str, list[tuple[Path, Manifest]]] = {}
    for folder in _newest_first(root, lambda line: None):
        manifest = read_manifest(folder)
        groups.setdefault(manifest.stage, []).append((folder, manifest))
    for group in groups.values():
        judged = [(m.held_out, -i) for i, (_, m) in enumerate(group) if m.held_out is not None]
        best = -max(judged)[1] if judged else 0
        for i, (folder, _) in enumerate(group):
            if i >= keep and i != best:  # out of sight first: a crash must not leave half a checkpoint behind
                shutil.rmtree(folder.rename(root / f"{TEMPORARY[0]}{folder.name}"))


def _newest_first(root: Path, say: Callable[[str], None]) -> Iterator[Path]:
    found: list[tuple[int, int, Path]] = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_dir() and not folder.name.startswith("."):
            try:
                manifest = read_manifest(folder)
            except BadInput as error:
                if not folder.exists():  # a run that goes on has dropped it: there are newer ones
                    yield from _newest_first(root, say)
                    return
                say(f"{error}; it is skipped")
                continue
            found.append((manifest.stage_index, manifest.step, folder))
    yield from (folder for _, _, folder in sorted(found, reverse=True))


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU, contiguous (a collective call when it is sharded)."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = gather() if gather else tensor
    return whole.detach().cpu().contiguous()


def _write_state(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A safetensors file, tensor by tensor (widest type first, so that all stay aligned); returns its size and hash."""
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # stable: the same order in every process
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        t = tensors[name]
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": TYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        _put(file, digest, len(text).to_bytes(8, "little") + text)
        for name in names:
            _put(file, digest, memoryview(_whole(tensors[name]).reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        _flush(file)
        return {"sha256": digest.hexdigest(), "bytes": file.tell()}


def _put(file: IO[bytes], digest: Any, data: bytes | memoryview) -> None:
    digest.update(data)
    file.write(data)


def _write_manifest(path: Path, body: dict[str, Any]) -> None:
    with path.open("wb") as file:
        file.write(json.dumps({"manifest": body, "sha256": _digest(body)}, indent=1).encode())
        _flush(file)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """A rename is durable once its folder is synced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _verify(path: Path, want: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != want["bytes"]:
            raise _damaged(path.parent, f"{path.name} has {size} bytes instead of {want['bytes']}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(path.parent, f"{path.name} cannot be read ({error.strerror})") from None
    if digest != want["sha256"]:
        raise _damaged(path.parent, f"{path.name} has a wrong SHA-256")


def _damaged(folder: Path, why: str) -> BadInput:
    return BadInput(f"{folder}: the checkpoint is damaged: {why}; delete this folder")
