"""A run as a local page: what its folder holds, and the read-only server of these files, alone on the loopback."""

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from limbeck.core.run import report
from limbeck.core.run.errors import BadInput, clean

HERE = Path(__file__).parent
OWN = {
    "/": ("view.html", "text/html; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript"),
    "/vendor/model-viewer.min.js": ("vendor/model-viewer.min.js", "text/javascript"),
    "/vendor/gsplat.js": ("vendor/gsplat.js", "text/javascript"),
}
TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", **report.PLAYABLE,
    ".glb": "model/gltf-binary", ".splat": "application/octet-stream", ".ply": "application/octet-stream",
}  # fmt: skip
KINDS = {".glb": "model", ".splat": "splat", ".mp4": "clip", ".webm": "clip", ".gif": "clip"}
SIDE = {"prompt", "title"}  # facts of a clip or picture that stands beside others of its file name: who made it of what
MOST_FILES, MOST_FACTS, MOST_LINKS = 2000, 200, 32  # files of a run, of facts in a folder, connections
MOST_TOLD, TAIL, CHUNK = 2**16, 2**16, 2**20  # bytes of a file of facts, of the log's end, of a file at a time
SELF = "'self'"
PAGE_MAY = (
    f"default-src 'none'; script-src {SELF} 'wasm-unsafe-eval'; worker-src blob:; connect-src {SELF} blob: data:; "
    f"img-src {SELF} blob: data:; media-src {SELF}; style-src {SELF} 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
REPORT_MAY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; sandbox"
FILE_MAY = "default-src 'none'; sandbox"
HEADERS = {
    "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip


# What a folder holds


def inventory(folder: Path) -> dict[str, Any]:
    """What there is to see in a run folder now, a running run's too, as plain data."""
    raw, files = report.recipe_of(folder), list(described(folder))
    last = last_row(folder)
    return {
        "name": str(raw.get("name", folder.name)),
        "about": str(raw.get("about", "")),
        "run": folder.name,
        "error": report.text_of(folder / "error.txt").strip(),
        "numbers": [[key, text] for key, text in report.flat(last) if key not in ("time", "stage")],
        "tables": [_table(name, rows) for name, rows in report.tables(folder).items()],
        "files": files,
        "more": len(files) == MOST_FILES,
    }


def something(found: dict[str, Any]) -> bool:
    """Whether an inventory has more than a run's own papers."""
    return bool(found["numbers"] or found["tables"] or any(file["kind"] != "file" for file in found["files"]))


def described(folder: Path) -> Iterator[dict[str, Any]]:
    """Every file (at most MOST_FILES) with its kind, and the facts that a JSON beside it tells."""
    facts: dict[Path, dict[str, list[list[str]]]] = {}
    for path in walked(folder):
        if path.parent not in facts:
            facts[path.parent] = _facts(path.parent)
        with contextlib.suppress(FileNotFoundError):  # a run that goes on replaces files
            kind, status, told = kind_of(path), path.stat(), facts[path.parent].get(path.name, [])
            step = report.STEP.match(path.name) or report.STEP.match(path.parent.name)
            beside = kind in ("clip", "picture") and SIDE <= {key for key, _ in told}
            yield {
                "path": path.relative_to(folder).as_posix(),
                "kind": "side" if beside else kind,
                "step": int(step[1]) if step else None,
                "bytes": status.st_size,
                "version": str(status.st_mtime_ns),
                "facts": told,
            }


def walked(folder: Path) -> Iterator[Path]:
    """The regular files below a folder in order; links, hidden things and checkpoints are left out."""
    count = 0
    for top, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if _plain(name) and name != "checkpoints")
        for path in sorted((Path(top, name) for name in names if _plain(name)), key=lambda path: (path.stem, path)):
            if count < MOST_FILES and path.is_file() and not path.is_symlink():
                count += 1
                yield path


def _plain(name: str) -> bool:
    return name.isprintable() and not name.startswith(".")


def kind_of(path: Path) -> str:
    """`step` (drawn at a training step), `model`, `splat`, `clip`, `picture`, or `file` for all else."""
    suffix = path.suffix.lower()
    if suffix == ".ply":
        with path.open("rb") as file:
            return "splat" if b"f_dc_0" in file.read(4096) else "file"
    kind = KINDS.get(suffix, "picture" if suffix in TYPES else "file")
    return "step" if kind in ("clip", "picture") and report.STEP.match(path.name) else kind


def _facts(folder: Path) -> dict[str, list[list[str]]]:
    """Facts by the name of the file that they are about: one of the same stem, or one under `files`.

    `files` is a list of names, or has further facts for each name.
    """
    out: dict[str, list[list[str]]] = {}
    files = sorted(folder.iterdir())
    for path in [file for file in files if file.suffix == ".json" and not file.is_symlink()][:MOST_FACTS]:
        data = report.json_of(path) if path.stat().st_size <= MOST_TOLD else None
        if isinstance(data, dict):
            listed, told = data.pop("files", None), _pairs(data)
            beside = [file.name for file in files if file.stem == path.stem and file != path]
            named = (
                listed
                if isinstance(listed, dict)
                else dict.fromkeys(map(str, listed if isinstance(listed, list) else ()))
            )
            out |= dict.fromkeys(beside, told)
            out |= {name: told + _pairs(own if isinstance(own, dict) else {}) for name, own in named.items()}
    return out


def _pairs(data: dict[str, Any]) -> list[list[str]]:
    return [[key, text] for key, text in report.flat(data)]


def last_row(folder: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl, from the file's end alone."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read(TAIL).decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return row
    return {}


def _table(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[report.cell(row.get(column)) for column in columns] for row in rows]
    return {"name": name, "columns": columns, "rows": cells}


# The server


def inside(root: Path, name: str) -> Path | None:
    """The regular file of that name in the (resolved) root, reached through no link and no `..`; None otherwise."""
    try:
        path = (root / name).resolve(strict=True)
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        return path if path == root / name and not hidden and path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def span(asked: str | None, size: int) -> tuple[int, int] | None:
    """First and end byte that `Range: bytes=…` asks for, the whole file without it; None where the file has no such."""
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", asked or "")
    if not found or not any(found.groups()):
        return 0, size
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    return (start, stop) if start < stop else None


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds without a byte

    @property
    def owner(self) -> "Server":
        """The server."""
        return cast(Server, self.server)

    def do_GET(self) -> None:
        """A page, what the run holds, or one of its files."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            path = unquote(self.path.partition("?")[0], errors="strict")
        except ValueError:
            return self._say(400, b"not an address")
        if host not in ("127.0.0.1", "localhost"):  # a page elsewhere whose name was made to lead here
            return self._say(403, b"open this page at 127.0.0.1")
        if path.startswith("/files/"):
            return self._file(inside(self.owner.folder, path.removeprefix("/files/")))
        if path in OWN:
            name, kind = OWN[path]
            return self._say(200, (HERE / name).read_bytes(), kind, PAGE_MAY)
        if path == "/run.json":
            return self._say(200, json.dumps(inventory(self.owner.folder)).encode(), "application/json")
        if path == "/report.html":
            return self._say(200, report.page(self.owner.folder).encode(), "text/html; charset=utf-8", REPORT_MAY)
        self._say(404, b"there is no such page")

    do_HEAD = do_GET

    def _say(self, status: int, body: bytes, kind: str = "text/plain", may: str = FILE_MAY) -> None:
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": may})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**HEADERS, **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def _file(self, path: Path | None) -> None:
        """A file of the run, or the part of it that was asked for; what no viewer shows is only handed out."""
        if path is None:
            return self._say(404, b"the run has no such file")
        kind = TYPES.get(path.suffix.lower())
        headers = {"Content-Type": kind or "application/octet-stream", "Content-Security-Policy": FILE_MAY}
        headers |= {"Accept-Ranges": "bytes"} | ({} if kind else {"Content-Disposition": "attachment"})
        with path.open("rb") as file:
            size, asked = os.fstat(file.fileno()).st_size, self.headers.get("Range")
            part = span(asked, size)
            if part is None:
                return self._head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
            start, stop = part
            if (start, stop) != (0, size):
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self._head(206 if "Content-Range" in headers else 200, {**headers, "Content-Length": str(stop - start)})
            file.seek(start)
            while self.command != "HEAD" and start < stop and (block := file.read(min(CHUNK, stop - start))):
                self.wfile.write(block)
                start += len(block)
            self.close_connection = start < stop  # HEAD, or a file that was cut while it was read

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class Server(ThreadingHTTPServer):
    """Serves one run folder at 127.0.0.1; port 0 takes a free one. BadInput where there is nothing to show."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder, self.places = folder.resolve(), threading.BoundedSemaphore(MOST_LINKS)
        if not something(inventory(self.folder)):
            raise BadInput(f"{clean(folder)} has nothing to show yet; wait for its first numbers or pictures")
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise BadInput(f"cannot listen on port {port} ({error.strerror}); choose another --port, 0: any") from None

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://127.0.0.1:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread a connection, while there are places."""
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The connection, then its place is free again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away, or a file that does, ends its connection without a word."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)
