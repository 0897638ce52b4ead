"""Names, groups and keywords of emoji by their code points, from two pinned npm packages (maintainers' build steps)."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

from limbeck.core.run.packages import Package

NAMES = Package(
    "unicode-emoji-json",
    "0.9.0",
    "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    "Copyright (c) 2019 Mu-An Chiou",
    "@",
)
KEYWORDS = Package(
    "emojilib",
    "4.0.3",
    "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
    "Copyright (c) 2014 Mu-An Chiou",
    "@",
)


def member(path: Path, name: str) -> Any:
    """Reads one JSON file out of a tarball."""
    with tarfile.open(path) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return json.loads(file.read())


def key(codepoints: str) -> str:
    """The join key of pictures and names: code points without the variation selector."""
    return codepoints.replace("-fe0f", "")


def clean_keywords(name: str, words: list[str]) -> list[str]:
    """Plain lower-case words only (no emoticons, no slug of the name itself), in the given order, each once."""
    plain = [w.replace("_", " ").strip().lower() for w in words]
    kept = [w for w in plain if re.fullmatch(r"[a-z][a-z' -]+", w) and w != name.lower()]
    return list(dict.fromkeys(kept))


def named(names: Path, keywords: Path) -> list[dict[str, Any]]:
    """A row for each directly named emoji (skin-tone variants are not), from the two tarballs, in the names' order."""
    words = member(keywords, "package/dist/emoji-en-US.json")
    rows = []
    for char, row in member(names, "package/data-by-emoji.json").items():
        code = key("-".join(f"{ord(c):04x}" for c in char))
        found = clean_keywords(row["name"], words.get(char, []))
        rows.append({"codepoints": code, "name": row["name"], "group": row["group"], "keywords": found})
    return rows
