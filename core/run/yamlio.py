"""YAML as plain data: no tags, no duplicate or odd keys; size, depth and aliases bounded; values know their lines."""

import io
import math
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from limbeck.core.run.errors import BadInput, clean

MAX_BYTES, MAX_DEPTH, MAX_ALIASES, MAX_NODES, MAX_DIGITS = 128 * 1024, 24, 50, 10_000, 18
INT = re.compile(r"[-+]?[0-9]+\Z")
FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?\Z")
NOT_FINITE = re.compile(r"[-+]?\.(?:inf|nan)\Z", re.IGNORECASE)
WORDS: dict[str, None | bool] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
Keys = tuple[str | int, ...]


@dataclass
class Document:
    """Plain data, and the line on which each key path begins."""

    data: Any
    where: str
    lines: dict[Keys, int] = field(default_factory=dict)

    def line(self, path: Keys) -> int:
        """The line of `path`, or of its nearest parent that the file holds."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _Stop(Exception):
    def __init__(self, line: int, message: str) -> None:
        self.line, self.message = line, message


class _Loader(yaml.SafeLoader):
    """Composes nodes only; sizes count aliases as if they were written out, so bombs are seen before they grow."""

    def __init__(self, text: str) -> None:
        super().__init__(io.StringIO(text))
        self.depth = self.aliases = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        alias = isinstance(event, yaml.AliasEvent)
        self.aliases += alias
        if not alias and event.tag is not None:
            tag = clean(event.tag.replace("tag:yaml.org,2002:", "!!"), 60)
            raise _Stop(line, f"the tag {tag} is not allowed; write plain values")
        if self.depth >= MAX_DEPTH:
            raise _Stop(line, f"nested deeper than {MAX_DEPTH} levels; flatten it")
        if self.aliases > MAX_ALIASES:
            raise _Stop(line, f"more than {MAX_ALIASES} aliases; write the values out")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        self._measure(node, alias, line)
        return node

    def _measure(self, node: Any, alias: bool, line: int) -> None:
        if alias and id(node) not in self.sizes:
            raise _Stop(line, "an alias refers to itself; write the value out")
        if not alias:
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            flat = [child for item in children for child in (item if isinstance(item, tuple) else (item,))]
            self.sizes[id(node)] = 1 + sum(self.sizes[id(child)] for child in flat)
        if self.sizes[id(node)] > MAX_NODES:
            raise _Stop(line, f"more than {MAX_NODES} values once aliases are written out; make it smaller")

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        return "plain" if kind is yaml.ScalarNode and implicit[0] else "other"


def scalar(text: str) -> Any:
    """A plain YAML scalar: null, true, false, a decimal integer, a finite float (`1e-4` is one), else the text."""
    if text in WORDS:
        return WORDS[text]
    if INT.match(text):
        if len(text.lstrip("+-0")) > MAX_DIGITS:
            raise ValueError(f"the integer {clean(text, 30)} is too large; use at most {MAX_DIGITS} digits")
        return int(text)
    if NOT_FINITE.match(text) or (FLOAT.match(text) and not math.isfinite(float(text))):
        raise ValueError(f"{clean(text, 30)} is not a finite number; write a finite one")
    return float(text) if FLOAT.match(text) else text


def _plain(node: Any, path: Keys, lines: dict[Keys, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.MappingNode):
        return {key: _plain(value, (*path, key), lines) for key, value in _keys(node, path, lines)}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), lines) for i, item in enumerate(node.value)]
    try:
        return scalar(node.value) if node.tag == "plain" else node.value
    except ValueError as error:
        raise _Stop(line, f"{_dotted(path)}: {error}") from None


def _keys(node: Any, path: Keys, lines: dict[Keys, int]) -> list[tuple[str, Any]]:
    pairs: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = clean(key.value, 40) if isinstance(key, yaml.ScalarNode) else "[…]"
        if not isinstance(key, yaml.ScalarNode) or (key.tag == "plain" and not isinstance(_quiet(key.value), str)):
            raise _Stop(line, f"the key {name} under {_dotted(path)} is not text; put it in quotes or rename it")
        if key.tag == "plain" and key.value == "<<":
            raise _Stop(line, "merge keys (<<) are not allowed; write the values out or use extends:")
        if key.value in pairs:
            raise _Stop(line, f'the key "{name}" under {_dotted(path)} appears twice; remove one')
        lines[(*path, key.value)] = line
        pairs[key.value] = value
    return list(pairs.items())


def _quiet(text: str) -> Any:
    try:
        return scalar(text)
    except ValueError:
        return None


def _dotted(path: Keys) -> str:
    return clean(".".join(str(part) for part in path), 120) or "the top"


def parse(text: str, where: str) -> Document:
    """Plain data from YAML text; every fault is a BadInput naming file and line."""
    lines: dict[Keys, int] = {}
    bidi = BIDI.search(text)
    try:
        if bidi:
            raise _Stop(text.count("\n", 0, bidi.start()) + 1, "a text-direction control character; delete it")
        node = _Loader(text).get_single_node()
        data = None if node is None else _plain(node, (), lines)
    except _Stop as stop:
        raise BadInput(f"{clean(where)}:{stop.line}: {stop.message}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadInput(
            f"{clean(where)}:{line}: the character U+{error.character:04X} is not allowed; delete it"
        ) from None
    except yaml.MarkedYAMLError as error:
        ended = "end of stream" in str(error.problem) and error.context_mark
        mark = error.context_mark if ended else error.problem_mark or error.context_mark
        place = f"{clean(where)}:{mark.line + 1 if mark else 1}"
        raise BadInput(f"{place}: not valid YAML: {clean(error.problem or error.context)}; fix this line") from None
    return Document(data, where, lines)


def read(path: Path) -> str:
    """The text of a regular UTF-8 file of bounded size (never blocks on pipes or devices)."""
    where = clean(path)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BadInput(f"{where}: not a regular file; name a YAML file")
            raw = file.read(MAX_BYTES + 1)
    except ValueError:
        raise BadInput(f"{where}: the name holds a NUL character; name a YAML file") from None
    except OSError as error:
        if isinstance(error, IsADirectoryError):
            raise BadInput(f"{where}: is a folder; name a YAML file inside it") from None
        raise BadInput(f"{where}: cannot be read ({clean(error.strerror)}); check the path") from None
    if len(raw) > MAX_BYTES:
        raise BadInput(f"{where}: larger than {MAX_BYTES // 1024} KiB; a recipe is a short file, move data out of it")
    return _decode(raw, where)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{where}:{line}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None


class _Dumper(yaml.SafeDumper):
    """Quotes whatever our reader would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))


def dump(data: Any) -> str:
    """YAML text that `parse` reads back to the same data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text
