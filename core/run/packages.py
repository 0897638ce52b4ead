"""Pinned packages that assets are built from, and the sums beside what is built (maintainers' build steps)."""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from limbeck.core.run.errors import LimbeckError


@dataclass(frozen=True)
class Package:
    """One package, pinned by version and by the SHA-256 of its file; `joint` is what its index writes between."""

    name: str
    version: str
    sha256: str
    copyright: str = ""
    joint: str = "=="  # PyPI's; "@" on npm, "=" for Debian

    @property
    def spec(self) -> str:
        """As the index's own tool writes it."""
        return f"{self.name}{self.joint}{self.version}"


def fetched(package: Package, folder: Path) -> Path:
    """Fetches a wheel with pip, without what it depends on; LimbeckError if it is not the pinned one."""
    return _kept(package, folder, "*.whl", [sys.executable, "-m", "pip", "download", "-q", "--no-deps", package.spec])


def debian(package: Package, folder: Path) -> Path:
    """Fetches a Debian package with apt; LimbeckError if it is not the pinned one."""
    return _kept(package, folder, "*.deb", ["apt-get", "download", "-q", package.spec])


def npm(package: Package, folder: Path) -> Path:
    """Fetches the tarball of an npm package with `npm pack`, unchecked; LimbeckError without npm."""
    tool = shutil.which("npm")
    if tool is None:
        raise LimbeckError("npm is not installed: install Node.js")
    command = [tool, "pack", package.spec, "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise LimbeckError(f"npm pack {package.spec} failed: {done.stderr.strip()[-300:]}")
    return folder / done.stdout.split()[-1]


def _kept(package: Package, folder: Path, pattern: str, command: list[str]) -> Path:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    found = list(folder.glob(pattern))
    if done.returncode or len(found) != 1:
        raise LimbeckError(f"{package.spec} cannot be fetched: {done.stderr.strip()[-300:]}")
    return checked(package, found[0])


def checked(package: Package, path: Path) -> Path:
    """The path of a file that is the pinned one; LimbeckError otherwise."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise LimbeckError(f"{path.name} is not {package.spec}: SHA-256 {found[:12]}…, expected {package.sha256[:12]}…")
    return path


def write_sums(folder: Path) -> None:
    """SHA256SUMS of every other file of a folder and below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    names = [(hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(folder).as_posix()) for path in files]
    (folder / "SHA256SUMS").write_text("".join(f"{found}  {name}\n" for found, name in names), encoding="utf-8")


MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE."""
