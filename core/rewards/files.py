"""Samples as files: what a space adds so that other programs can read its samples, and preferences can name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean


class Files(Protocol):
    """Two methods of a space whose samples have a file form (pictures, clips, FASTA)."""

    def write(self, x: Tensor, folder: Path) -> None:
        """Samples x [B,*S] in the folder, which exists; sorted by name, the files are in the order of the rows."""

    def read(self, name: str, folder: Path) -> Tensor:
        """The sample [*S] that a preference calls `name`: a file in the folder, or the sample itself as text."""


class Numbers:
    """Samples of a space without files: rows of `samples.csv`; a preference spells them as a JSON list."""

    def write(self, x: Tensor, folder: Path) -> None:
        """One row a sample, its numbers [*S] flattened, each with the digits that bring it back exactly."""
        rows = [",".join(map(repr, row)) for row in x.detach().cpu().flatten(1).tolist()]
        (folder / "samples.csv").write_text("\n".join(rows) + "\n")

    def read(self, name: str, folder: Path) -> Tensor:
        """`[0.5, -1.0]`, nested for more dimensions; BadInput for anything else."""
        try:
            found = torch.tensor(json.loads(name), dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError, RecursionError):
            found = torch.empty(())
        if not found.ndim or not bool(found.isfinite().all()):
            raise BadInput(f"{clean(name, 60)} is no list of numbers; give the recipe a space whose samples are files")
        return found


def files(build: Build) -> Files:
    """The file form of the recipe's space; numbers where it has none."""
    space: Any = build.piece("space") if build.has("space") else None
    return cast(Files, space) if hasattr(space, "write") and hasattr(space, "read") else Numbers()
