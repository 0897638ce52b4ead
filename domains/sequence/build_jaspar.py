"""Builds the embedded motifs (domains/sequence/assets/jaspar) from one pinned PyPI wheel.

Maintainers run it; users never do, since its output is committed: one safetensors file, LICENSES.md, SHA256SUMS.
"""

import sqlite3
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from limbeck.core.run.packages import MIT, Package, checked, fetched, write_sums
from limbeck.domains.sequence.motifs import ASSET, FILE

WHEEL = Package("pyjaspar", "4.0.0", "01b393f668c3cb552d3d58262a50005b1410e389e0a6bf5d570e976fbdaf01b3")
MEMBER = "pyjaspar/data/JASPAR2020.sqlite"
NOTICE = f"""# Licence of the embedded motifs

`{FILE}`: the position frequency matrices of JASPAR 2020 CORE (Fornes et al. 2020), all versions, with ids, names and
taxonomic groups.

## {WHEEL.name}=={WHEEL.version} (PyPI)

MIT License. Copyright (c) 2025 Aziz Khan

Wheel SHA-256: `{WHEEL.sha256}`; file `{MEMBER}`.

Changes: other collections and annotations are left out; counts are float32.

## The MIT License

{MIT}
"""
QUERY = """select m.ID, m.BASE_ID || '.' || m.VERSION, m.NAME, group_concat(distinct a.VAL)
from MATRIX m left join MATRIX_ANNOTATION a on a.ID = m.ID and a.TAG = 'tax_group'
where m.COLLECTION = 'CORE' group by m.ID order by m.BASE_ID, m.VERSION"""


def read(database: Path) -> dict[str, Tensor]:
    """counts [sum of widths,4] and widths [M]; lines holds id, name and group of each, with tabs, as UTF-8 bytes."""
    with sqlite3.connect(database) as base:
        rows = base.execute(QUERY).fetchall()
        parts = [matrix(base, number) for number, *_ in rows]
    lines = "\n".join("\t".join((id, name, group or "")) for _, id, name, group in rows)
    widths = torch.tensor([len(part) for part in parts], dtype=torch.int32)
    return {
        "counts": torch.cat(parts),
        "widths": widths,
        "lines": torch.tensor(list(lines.encode()), dtype=torch.uint8),
    }


def matrix(base: sqlite3.Connection, number: int) -> Tensor:
    """One matrix [W,4] in the order ACGT."""
    values = base.execute("select val from MATRIX_DATA where ID = ? order by col, row", (number,)).fetchall()
    return torch.tensor(values, dtype=torch.float32).view(-1, 4)


def write(wheel: Path, folder: Path = ASSET) -> None:
    """Writes the motifs of a wheel with licence and sums."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(checked(WHEEL, wheel)) as archive, tempfile.TemporaryDirectory() as place:
        save_file(read(Path(archive.extract(MEMBER, place))), folder / FILE)
    (folder / "LICENSES.md").write_text(NOTICE, encoding="utf-8")
    write_sums(folder)


def build() -> None:
    """`limbeck assets build jaspar`: the committed set."""
    with tempfile.TemporaryDirectory() as folder:
        write(fetched(WHEEL, Path(folder)))
