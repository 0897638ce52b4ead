"""What costs much to compute and never changes (states of prompts, latents of one's own clips), kept on disk.

An entry is a safetensors file. Its folder is named by what made it (weights, settings, code), its own name is the hash
of what it was made of and of the surroundings (versions, device, threads). So a run computes each once, a later run
reads it, and no bit of a result depends on which of them it was. An entry that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.core.run.errors import clean

PLACE = "LIMBECK_CACHE"  # environment: the folder that holds all entries
MOST = 2**30  # bytes of an entry
FREE = 5 * 2**30  # bytes that stay free on its disk
NEAR = 2**28  # bytes of entries that stay in memory, the last that were asked for
FORMAT = 1
PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
LEFT = ("padding", "truncation")  # of a tokenizer: of its last call
Entry = dict[str, Tensor]


def place() -> Path:
    """The folder of all entries: $LIMBECK_CACHE, or `limbeck` among the user's cached files."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck"
    return Path(os.environ.get(PLACE) or usual).expanduser()


class Stored:
    """The entries of one maker; `maker` tells its fingerprint, once: all besides the key that an entry depends on."""

    def __init__(self, kind: str, maker: Callable[[], str]) -> None:
        self.kind, self.maker = kind, maker
        self.near: OrderedDict[str, Entry] = OrderedDict()
        self.bytes = 0  # of what is near
        self.silent = False  # it was said that nothing can be kept

    @cached_property
    def folder(self) -> Path:
        """Where this maker's entries lie."""
        return place() / f"{self.kind}-{self.maker()[:16]}"

    def of(self, key: str, make: Callable[[], Entry]) -> Entry:
        """Tensors on the CPU: read where this key was met before, by whatever run; otherwise made, and kept."""
        name = fingerprint(key, surroundings())
        if name not in self.near:
            self.near[name] = self._read(name) or self._made(name, make)
            self.bytes += size(self.near[name])
        self.near.move_to_end(name)
        while self.bytes > NEAR and len(self.near) > 1:
            self.bytes -= size(self.near.popitem(last=False)[1])
        return self.near[name]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _made(self, name: str, make: Callable[[], Entry]) -> Entry:
        with torch.no_grad():
            entry = {part: t.cpu().clone(memory_format=torch.contiguous_format) for part, t in make().items()}
        self._write(name, entry)
        return entry

    def _read(self, name: str) -> Entry | None:
        """The whole entry of this name; None where there is none or, with a warning, a damaged one."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            if path.stat().st_size > MOST:
                raise ValueError("larger than what is kept")
            with safe_open(path, "pt") as file:
                found = {part: file.get_tensor(part) for part in file.keys()}  # it is no dict
                whole = (file.metadata() or {}) == about(name, found)
            if not whole:
                raise ValueError("its tensors are not those that were written")
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            print(f"warning: {path} is damaged ({clean(error, 80)}); it is made again", file=sys.stderr)
            return None
        return found

    def _write(self, name: str, entry: Entry) -> None:
        """Whole under its name or not there; where the disk refuses, later runs make the entry themselves."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < FREE + size(entry):
                raise OSError(f"less than {FREE >> 30} GiB would be free")
            with tempfile.TemporaryDirectory(prefix=".", dir=self.folder) as inner:
                save_file(entry, Path(inner) / "entry", about(name, entry))
                os.replace(Path(inner) / "entry", self._path(name))
        except (OSError, SafetensorError) as error:
            if not self.silent:
                why = f"nothing is kept in {self.folder} ({clean(error, 80)})"
                print(f"warning: {why}; make room or set ${PLACE}", file=sys.stderr)
            self.silent = True


class StoredText:
    """A frozen text encoder by which each prompt is read once, and alone: a row's bits depend on no other prompt."""

    def __init__(
        self, encode: Callable[[list[str]], Entry], maker: Callable[[], str], device: torch.device | str
    ) -> None:
        """`encode` gives tensors with a row a prompt, of one shape for all prompts."""
        self.encode, self.device, self.stored = encode, device, Stored("text", maker)

    def __call__(self, prompts: list[str]) -> Entry:
        """The encoder's tensors with a row for each prompt."""
        rows = [self.stored.of(prompt, partial(self.encode, [prompt])) for prompt in prompts]
        return {key: torch.cat([row[key] for row in rows]).to(self.device) for key in rows[0]}


def about(name: str, entry: Entry) -> dict[str, str]:
    """What an entry's file says of itself."""
    return {"format": str(FORMAT), "name": name, "sha256": fingerprint(entry)}


def size(entry: Entry) -> int:
    """Bytes of the tensors."""
    return sum(tensor.nbytes for tensor in entry.values())


def surroundings() -> list[str]:
    """What reaches the last bits of a result besides its maker: versions, device, threads, precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return [*machine(), torch.get_float32_matmul_precision(), str(torch.get_num_threads()), str(cast)]


@cache
def machine() -> tuple[str, ...]:
    """The part of it that stays as it is."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return device, *(version(name) for name in ("torch", "diffusers", "transformers"))


def fingerprint(*things: object) -> str:
    """A hash of content: tensors, modules with their settings, tokenizers, functions' code, and plain data of these."""
    total = hashlib.sha256()
    for piece in pieces(things):
        total.update(piece)
    return total.hexdigest()


def pieces(thing: Any) -> Iterator[bytes | memoryview]:
    """The bytes that tell one thing from all others; TypeError for callables that are neither functions nor modules."""
    yield f"{type(thing).__module__}.{type(thing).__qualname__}\0".encode()
    if isinstance(thing, Tensor):
        yield f"{thing.device.type} {thing.dtype} {tuple(thing.shape)}\0".encode()
        yield thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif isinstance(thing, nn.Module):
        yield from pieces([(name, settings(module)) for name, module in thing.named_modules()])
        yield from pieces(dict([*thing.named_parameters(), *thing.named_buffers()]))
    elif isinstance(thing, Mapping):
        yield from pieces([(key, thing[key]) for key in sorted(thing)])
    elif isinstance(thing, list | tuple):
        yield f"{len(thing)}\0".encode()
        for one in thing:
            yield from pieces(one)
    elif isinstance(thing, PLAIN):
        yield f"{thing!r}\0".encode()
    elif isinstance(thing, FunctionType | type):
        yield f"{thing.__qualname__}\0{code(thing.__module__)}\0".encode()
        yield from pieces([cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()])
    elif type(thing).__module__.startswith("transformers."):
        yield from saved(thing)
    elif callable(thing):
        raise TypeError(f"nothing tells {type(thing).__name__} from others of its kind; give a plain function")
    else:
        yield from pieces([type(thing), vars(thing)])


def settings(module: nn.Module) -> dict[str, Any]:
    """A module's class, its plain attributes (strides, flags such as that of tiling) and its config."""
    own = {key: value for key, value in vars(module).items() if not key.startswith("_") and isinstance(value, PLAIN)}
    config = getattr(module, "config", {})
    told = config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, Mapping) else {}
    return own | {"class": type(module), "config": {key: f"{told[key]}" for key in told if "path" not in key}}


def saved(thing: Any) -> Iterator[bytes]:
    """The files as which a tokenizer or a processor is saved, without what its last call left there."""
    with tempfile.TemporaryDirectory() as folder:
        thing.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            text = path.read_bytes()
            if path.name == "tokenizer.json":
                text = json.dumps({k: v for k, v in json.loads(text).items() if k not in LEFT}).encode()
            yield path.name.encode() + b"\0" + text


@cache
def code(module: str) -> str:
    """The hash of a module's source."""
    return hashlib.sha256(Path(str(sys.modules[module].__file__)).read_bytes()).hexdigest()
