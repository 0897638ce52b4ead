"""Named tensors in a folder: safetensors shards, each whole under its name or not there, checked by hash when opened.

A shard's name is the hash of its rows' names. Its tensors are written first and its manifest last, so that what a
crash leaves half done does not count. Several runs, and the processes of one, may add to the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from limbeck.core.run.errors import BadInput, LimbeckError, clean

KEY = "rows"


class Shards:
    """Tensors of one shape by name; new ones are in memory until `flush`. `about` tells people how they were made."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.fresh: dict[str, Tensor] = {}

    @cached_property
    def known(self) -> dict[str, tuple[Path, int]]:
        """Where each stored tensor lies; every shard is read and hashed once. BadInput where one is damaged."""
        found: dict[str, tuple[Path, int]] = {}
        for manifest in sorted(self.folder.glob("*.json")):
            path = manifest.with_suffix(".safetensors")
            found.update({name: (path, i) for i, name in enumerate(checked(manifest, path))})
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.fresh or name in self.known

    def add(self, names: Sequence[str], rows: Tensor) -> None:
        """Keep rows [b, *S] under these names."""
        self.fresh.update(zip(names, rows.cpu(), strict=True))

    def take(self, names: Sequence[str]) -> Tensor:
        """The rows of these names [b, *S], on the CPU."""
        return torch.stack([self.fresh[name] if name in self.fresh else self._stored(name) for name in names])

    def _stored(self, name: str) -> Tensor:
        path, i = self.known[name]
        with safe_open(path, "pt") as file:
            row: Tensor = file.get_slice(KEY)[i]
        return row

    def flush(self) -> None:
        """Write what is new as one shard."""
        if not self.fresh:
            return
        names = list(self.fresh)
        path = self.folder / f"{named(names)}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            save_file({KEY: torch.stack(list(self.fresh.values())).contiguous()}, temporary)
            body = {"about": self.about, "names": names, "sha256": hashed(temporary)}
            _placed(temporary, path)
            temporary.write_text(json.dumps(body, indent=1), encoding="utf-8")
            _placed(temporary, path.with_suffix(".json"))
        except OSError as error:
            raise LimbeckError(f"{path}: cannot be written ({error.strerror or error}); make room there") from None
        self.known.update({name: (path, i) for i, name in enumerate(names)})
        self.fresh.clear()


def named(names: Sequence[str]) -> str:
    """What the shard of these rows is called."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:16]


def hashed(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked(manifest: Path, path: Path) -> list[str]:
    """The names of a shard's rows; BadInput unless names and tensors are those that were written."""
    try:
        body = json.loads(manifest.read_bytes())
        names, whole = list(body["names"]), hashed(path) == body["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"cannot be read: {clean(error, 80)}") from None
    if not whole:
        raise _damaged(path, "wrong SHA-256")
    if named(names) != path.stem:
        raise _damaged(manifest, "its names are not those that were written")
    return names


def _damaged(path: Path, why: str) -> BadInput:
    pair = f"{path.stem}.json and {path.stem}.safetensors"
    return BadInput(f"{path} is damaged ({why}); delete {pair}, and what they held is made again")


def _placed(temporary: Path, path: Path) -> None:
    """Synced to disk and under its own name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)
