"""Builds the second art style (domains/image/assets/noto): Noto pictures of the very captions of assets/fluent.

Maintainers run it; users never do, since its output is committed: one lossless RGBA sheet and LICENSES.md.
"""

import tarfile
import tempfile
from pathlib import Path

from limbeck.core.emoji import key
from limbeck.core.run.errors import LimbeckError
from limbeck.core.run.packages import MIT, Package, checked, npm, write_sums
from limbeck.domains.image.build_fluent import sheet, shrink
from limbeck.domains.image.data import captions_file

ASSETS = Path(__file__).parent / "assets" / "noto"
SIZE = 32
ART = Package(
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "Copyright (c) 2013 Cal Henderson",
    "@",
)
NOTICE = f"""# Licences of the second art style

## Pictures: Noto Emoji v2.048

Noto Emoji, by Google and its contributors. Licensed under the Apache License, Version 2.0 (the LICENSE file of
limbeck). The package that they were taken from says in its README, section on image sources: "Android/Google/Noto
images, are available under the Apache License 2.0". The package holds no notice file of the pictures themselves.

Changes: pictures made smaller ({SIZE} pixels a side, from 64), on one sheet, without flags, skin-tone variants and all
else that assets/fluent/captions.json does not name, in its order.

## Package: {ART.spec} (npm)

The MIT License. {ART.copyright}

Tarball SHA-256: `{ART.sha256}`

{MIT}
"""


def pictures(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Join key -> PNG bytes of the wanted pictures: exactly these code points, so no skin-tone variants."""
    found: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for entry in tar.getmembers():
            name = Path(entry.name)
            file = tar.extractfile(entry) if name.parts[-3:-1] == ("google", "64") else None
            if file is not None and key(name.stem) in wanted:
                found[key(name.stem)] = file.read()
    missing = sorted(wanted - found.keys())
    if missing:
        raise LimbeckError(f"{path.name} lacks {len(missing)} of the captions' pictures, first {missing[0]}")
    return found


def build(tarball: Path | None, out: Path) -> None:
    """Makes the file set from the pinned package, fetched by `npm pack` where no tarball is given."""
    codes = [row["codepoints"] for row in captions_file()["pictures"]]
    with tempfile.TemporaryDirectory() as folder:
        art = pictures(checked(ART, tarball or npm(ART, Path(folder))), set(codes))
    out.mkdir(parents=True, exist_ok=True)
    small = [shrink(art[code], SIZE) for code in codes]
    sheet(small, SIZE).save(out / f"pictures-{SIZE}.webp", lossless=True, quality=100, method=6, exact=False)
    (out / "LICENSES.md").write_text(NOTICE, encoding="utf-8")
    write_sums(out)


def noto() -> None:
    """`limbeck assets build noto`: the committed set."""
    build(None, ASSETS)
