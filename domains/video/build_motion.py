"""Builds the embedded captioned clips (domains/video/assets/motion) from three pinned npm packages.

Maintainers run it; users never do, since its output is committed: one lossless sheet of differences between frames,
captions.json, LICENSES.md. Legend: F frames of a clip, S pixels a side.
"""

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from limbeck.core.emoji import KEYWORDS, NAMES, key, named
from limbeck.core.run.errors import LimbeckError
from limbeck.core.run.packages import MIT, Package, checked, npm, write_sums
from limbeck.domains.video.data import CAPTIONS, FOLDER, RATE, SHEET, SIZE

ART = Package(
    "@lobehub/fluent-emoji-anim-1",
    "1.0.0",
    "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    "Copyright (c) 2023 LobeHub (pictures: Fluent Emoji, Copyright (c) Microsoft Corporation, MIT)",
    "@",
)
SOURCES = (ART, NAMES, KEYWORDS)
MOVES = 0.01  # least distance of some frame from the clip's mean frame: mean over premultiplied RGBA in [0,1]
CUT = 1.25  # a step from the last frame to the first above so many times the largest step inside is no loop
KEPT = 2  # a pixel whose channels all change by this or less (of 255) since the frame before keeps its value
STEP = 4  # of the values that are stored; the source is lossy, and differences of noise are what is large
Frames = NDArray[np.uint8]  # [F,S,S,4], premultiplied by alpha


def frames(data: bytes) -> Frames:
    """Every frame of an animated WebP, Lanczos on premultiplied alpha."""
    found = []
    with Image.open(io.BytesIO(data)) as clip:
        for i in range(getattr(clip, "n_frames", 1)):
            clip.seek(i)
            small = clip.convert("RGBA").convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            found.append(np.asarray(small))
    return np.stack(found)


def reach(clip: Frames) -> float:
    """How far some frame lies from the clip's mean frame: the measure of `MOVES`."""
    x = clip.astype(np.float32) / 255
    return float(np.abs(x - x.mean(0)).mean((1, 2, 3)).max())


def closes(clip: Frames) -> bool:
    """Whether it goes on from its last frame to its first without a cut."""
    x = clip.astype(np.float32)
    steps = np.abs(x - np.roll(x, 1, 0)).mean((1, 2, 3))
    return bool(steps[0] <= CUT * steps[1:].max())


def clips(path: Path, wanted: set[str]) -> dict[str, Frames]:
    """Join key -> frames at 12 a second of the wanted clips that move and close; the source has 24 (42 ms a frame)."""
    found: dict[str, Frames] = {}
    with tarfile.open(path) as tar:
        for entry in tar.getmembers():
            code = key(Path(entry.name).stem)
            file = tar.extractfile(entry) if entry.name.endswith(".webp") and code in wanted else None
            clip = frames(file.read())[::2] if file is not None else np.zeros((1, 1, 1, 4), np.uint8)
            if len(clip) > 1 and reach(clip) >= MOVES and closes(clip):
                found[code] = clip
    return found


def steadied(clip: Frames) -> Frames:
    """The clip in values that compress: small changes held back, multiples of STEP; off by KEPT + STEP / 2 at most."""
    held = [clip[0].astype(np.int16)]
    for frame in clip[1:].astype(np.int16):
        still = np.abs(frame - held[-1]).max(-1, keepdims=True) <= KEPT
        held.append(np.where(still, held[-1], frame))
    rounded = np.minimum((np.stack(held) + STEP // 2) // STEP * STEP, 255)
    small: Frames = np.minimum(rounded, rounded[..., 3:]).astype(np.uint8)
    return small


def sheet(found: list[Frames]) -> Image.Image:
    """A row a clip: its first frame, then what each frame adds to the one before, modulo 256."""
    page = np.zeros((len(found), SIZE, max(map(len, found)), SIZE, 4), np.uint8)
    for row, clip in zip(page, found, strict=True):
        difference = np.diff(clip, axis=0, prepend=np.zeros_like(clip[:1]))
        row[:, : len(clip)] = difference.transpose(1, 0, 2, 3)
    return Image.fromarray(page.reshape(len(found) * SIZE, -1, 4))


def licences() -> str:
    """The notices of the packages, and what exactly was used."""
    parts = ["# Licences of the embedded clips, names and keywords\n"]
    for s in SOURCES:
        parts.append(f"## {s.spec} (npm)\n\nMIT License. {s.copyright}\n\nTarball SHA-256: `{s.sha256}`\n")
    parts.append(
        f"Changes: {SIZE} pixels a side, every second frame ({RATE} a second), values rounded to steps of {STEP}, as\n"
        "differences on one sheet. Left out: what has one frame or hardly moves (no frame further than\n"
        f"{MOVES} from the mean frame), loops with a cut (a step from last to first above {CUT} times the largest\n"
        "one inside), and skin-tone variants. Names, groups and keywords joined and filtered.\n"
    )
    return "\n".join([*parts, "## The MIT License\n", MIT, ""])


def write(rows: list[dict[str, Any]], found: dict[str, Frames], out: Path) -> None:
    """Writes the file set."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = [row | {"frames": len(found[row["codepoints"]])} for row in rows if row["codepoints"] in found]
    page = sheet([steadied(found[row["codepoints"]]) for row in chosen])
    page.save(out / SHEET, lossless=True, quality=100, method=6, exact=True)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in chosen)
    (out / CAPTIONS).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (out / "LICENSES.md").write_text(licences(), encoding="utf-8")
    write_sums(out)


def build(tarballs: dict[str, Path], out: Path) -> None:
    """Makes the embedded set from tarballs by package name; missing ones are fetched by `npm pack`."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {s.name: checked(s, tarballs.get(s.name) or npm(s, Path(folder))) for s in SOURCES}
        rows = named(paths[NAMES.name], paths[KEYWORDS.name])
        found = clips(paths[ART.name], {row["codepoints"] for row in rows})
    if not found:
        raise LimbeckError("the packages hold no clip that moves")
    write(rows, found, out)


def motion() -> None:
    """`limbeck assets build fluent-motion`: the committed set."""
    build({}, FOLDER)
