"""Builds the embedded captioned pictures (domains/image/assets/fluent) from three pinned npm packages.

Maintainers run it; users never do, since its output is committed: one lossless RGBA sheet, captions.json, LICENSES.md.
"""

import hashlib
import io
import json
import math
import re
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from limbeck.core.emoji import KEYWORDS, NAMES, key, named
from limbeck.core.run.errors import BadInput
from limbeck.core.run.packages import MIT, Package, checked, npm

ASSETS = Path(__file__).parent / "assets" / "fluent"
SIZES = (32, 64)
EVAL_COUNT = 256


ART = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "Copyright (c) 2023 LobeHub (pictures: Fluent Emoji, Copyright (c) Microsoft Corporation, MIT)",
    "@",
)
SOURCES = (ART, NAMES, KEYWORDS)


def pictures(path: Path) -> dict[str, bytes]:
    """Join key -> WebP bytes; where two files share a key, the one without the variation selector wins."""
    found: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        entries = sorted((m for m in tar.getmembers() if m.name.endswith(".webp")), key=lambda m: -len(m.name))
        for entry in entries:
            file = tar.extractfile(entry)
            assert file is not None
            found[key(Path(entry.name).stem)] = file.read()
    return found


def entries(tarballs: dict[str, Path], art: dict[str, bytes]) -> list[dict[str, Any]]:
    """One row for each directly named picture that is no flag, in the order of the names' list."""
    rows = named(tarballs[NAMES.name], tarballs[KEYWORDS.name])
    return [row for row in rows if row["group"] != "Flags" and row["codepoints"] in art]


def shrink(data: bytes, size: int) -> Image.Image:
    """RGBA WebP of any shape -> centred size x size RGBA, Lanczos on premultiplied alpha, nothing under alpha 0."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    small = square.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
    return small.convert("RGBA")


def sheet(images: list[Image.Image], size: int) -> Image.Image:
    """Lays the pictures row by row on one near-square sheet."""
    columns = math.ceil(math.sqrt(len(images)))
    canvas = Image.new("RGBA", (columns * size, math.ceil(len(images) / columns) * size))
    for i, image in enumerate(images):
        canvas.paste(image, (i % columns * size, i // columns * size))
    return canvas


def eval_names(rows: list[dict[str, Any]]) -> list[str]:
    """A fixed choice of 256 names by hash order, without those that 32 pixels cannot tell apart.

    Left out: gendered variants, clock faces, and the symbols (coloured squares with small signs).
    """
    variant = re.compile(r"(?i)^(man|woman|men|women|family|couple|kiss|people)\b|o’clock|-thirty|: | facing ")
    names = [r["name"] for r in rows if r["group"] != "Symbols" and not variant.search(r["name"])]
    ranked = sorted(names, key=lambda n: hashlib.sha256(n.encode()).hexdigest())
    return sorted(ranked[:EVAL_COUNT])


def licences() -> str:
    """The notices of the packages, and what exactly was used."""
    parts = ["# Licences of the embedded pictures, names and keywords\n"]
    for s in SOURCES:
        parts.append(f"## {s.spec} (npm)\n\nMIT License. {s.copyright}\n\nTarball SHA-256: `{s.sha256}`\n")
    parts.append("Changes: pictures made smaller, on one sheet; names, groups and keywords joined and filtered.\n")
    return "\n".join([*parts, "## The MIT License\n", MIT, ""])


def write(rows: list[dict[str, Any]], art: dict[str, bytes], out: Path, size: int) -> None:
    """Writes the file set."""
    out.mkdir(parents=True, exist_ok=True)
    small = [shrink(art[row["codepoints"]], size) for row in rows]
    sheet(small, size).save(out / f"pictures-{size}.webp", lossless=True, quality=100, method=6, exact=False)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    chosen = json.dumps(eval_names(rows), ensure_ascii=False)
    (out / "captions.json").write_text(f'{{"eval_names": {chosen},\n"pictures": [\n{lines}\n]}}\n', encoding="utf-8")
    (out / "LICENSES.md").write_text(licences(), encoding="utf-8")


def build(tarballs: dict[str, Path], out: Path, size: int = 32) -> None:
    """Makes the embedded set at `size` pixels from tarballs by package name; missing ones are fetched by `npm pack`."""
    if size not in SIZES:
        raise BadInput(f"size {size} is not known: choose one of {', '.join(map(str, SIZES))}")
    with tempfile.TemporaryDirectory() as folder:
        paths = {s.name: checked(s, tarballs.get(s.name) or npm(s, Path(folder))) for s in SOURCES}
        art = pictures(paths[ART.name])
        write(entries(paths, art), art, out, size)


def fluent() -> None:
    """`limbeck assets build fluent`: the committed set."""
    build({}, ASSETS, 32)


def fluent_64() -> None:
    """`limbeck assets build fluent-64`: the same pictures at 64 pixels (7 MB, not committed)."""
    build({}, ASSETS, 64)
