"""Preferences between two samples: who preferred which, how strongly; read and written as JSON lines or Parquet."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limbeck.core.run.errors import BadInput, clean, did_you_mean

Source = Literal["offline", "online"]
LINE = 2**20  # bytes


@dataclass(frozen=True)
class Preference:
    """One comparison. Samples are files beside the data (pictures, clips) or text (sequences), as the domain says.

    `strength` in (0, 1]: how sure the label is (1: certain); of a tie it is not read. `axis` names what was judged.
    """

    winner: str
    loser: str
    prompt: str = ""
    user: str = ""
    strength: float = 1.0
    tie: bool = False
    axis: str = ""
    source: Source = "offline"

    def swapped(self) -> Preference:
        """The other way round."""
        return dataclasses.replace(self, winner=self.loser, loser=self.winner)


KINDS: dict[str, Any] = {
    field.name: {"float": (int, float), "bool": bool}.get(str(field.type), str)
    for field in dataclasses.fields(Preference)
}


def read(path: Path) -> list[Preference]:
    """All preferences of a .jsonl or .parquet file; BadInput names the line and the remedy."""
    if path.suffix == ".parquet":
        rows: Iterable[tuple[str, Any]] = ((f"{path}: row {i}", row) for i, row in enumerate(_parquet(path)))
    elif path.suffix == ".jsonl":
        rows = _lines(path)
    else:
        raise BadInput(f"{path}: preferences are read from .jsonl or .parquet files")
    return [_preference(where, row) for where, row in rows]


def write(path: Path, pairs: Sequence[Preference]) -> None:
    """Write what `read` reads."""
    rows = [dataclasses.asdict(pair) for pair in pairs]
    if path.suffix == ".parquet":
        arrow, parquet = _pyarrow()
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        raise BadInput(f"{path}: preferences are written to .jsonl or .parquet files")


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE + 1), b""), 1):
                where = f"{path}:{number}"
                if len(line) > LINE:
                    raise BadInput(f"{where}: a line of more than {LINE} bytes is no preference")
                if line.strip():
                    yield where, json.loads(line)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise BadInput(f"{where}: not valid JSON ({clean(error, 80)})") from None


def _preference(where: str, row: Any) -> Preference:
    if not isinstance(row, dict):
        raise BadInput(f"{where}: must be an object with winner and loser")
    for key, value in row.items():
        if key not in KINDS:
            raise BadInput(f"{where}: unknown key {clean(key, 40)}{did_you_mean(str(key), KINDS)}")
        if not isinstance(value, KINDS[key]) or (isinstance(value, bool) and KINDS[key] is not bool):
            raise BadInput(f"{where}: {key} has the wrong type ({clean(value, 40)})")
    missing = [key for key in ("winner", "loser") if not row.get(key)]
    if missing:
        raise BadInput(f"{where}: {missing[0]} is missing")
    strength = float(row.get("strength", 1.0))
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise BadInput(f"{where}: strength must be above 0 and at most 1, not {strength:g}")
    if row.get("source", "offline") not in ("offline", "online"):
        raise BadInput(f"{where}: source must be offline or online")
    return Preference(**{**row, "strength": strength})


def media(pair: Preference, folder: Path) -> tuple[Path, Path]:
    """The files of winner and loser, which must lie in `folder`; BadInput otherwise."""
    return inside(pair.winner, folder), inside(pair.loser, folder)


def inside(name: str, folder: Path) -> Path:
    """The file of this name in `folder` or below; BadInput where there is none, or where it lies elsewhere."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadInput(f"{clean(name, 80)} lies outside {folder}; keep the files of preferences beside them")
    if not path.is_file():
        raise BadInput(f"{folder}: there is no file {clean(name, 80)}")
    return path


def _parquet(path: Path) -> list[dict[str, Any]]:
    _, parquet = _pyarrow()
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises many kinds
        raise BadInput(f"{path}: cannot be read as Parquet ({clean(error, 80)})") from None
    return rows


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise BadInput("Parquet files need pyarrow: pip install pyarrow, or use .jsonl") from None
    return pyarrow, pyarrow.parquet
