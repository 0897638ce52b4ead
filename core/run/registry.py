"""Which pieces exist: torch-free specs read as data from `pieces.yaml` files; code is imported when a piece is used."""

import functools
import importlib
import importlib.util
import signal
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from limbeck.core.run import yamlio
from limbeck.core.run.errors import BadInput, LimbeckError, clean, did_you_mean

KINDS = (
    "asset", "check", "codec", "critic", "data", "exporter", "metric", "objective", "operator", "process", "reward",
    "sampler", "space", "student", "teacher",
)  # fmt: skip
FIELDS = ("target", "config", "about", "paper")
GROUP = "limbeck.plugins"
IMPORT_SECONDS = 20.0


@dataclass(frozen=True)
class Spec:
    """One piece: where its factory and its config class are, as text."""

    kind: str
    name: str
    target: str
    config: str = ""
    about: str = ""
    paper: str = ""
    source: str = "limbeck"


@dataclass(frozen=True)
class Problem:
    """Why (part of) a plugin is not in use; shown by `limbeck plugins`."""

    source: str
    message: str


@dataclass(frozen=True)
class Provider:
    """A package with a pieces.yaml and a recipes folder (either may be absent)."""

    name: str
    package: str
    version: str
    folder: Path


@dataclass
class Registry:
    """The pieces and recipes of limbeck and of every plugin that could be read."""

    specs: dict[tuple[str, str], Spec] = field(default_factory=dict)
    recipes: dict[str, Path] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    plugins: list[Provider] = field(default_factory=list)

    def get(self, kind: str, name: str) -> Spec:
        """The spec, or a BadInput that names the nearest one."""
        if (kind, name) not in self.specs:
            others = [other for other, known in sorted(self.specs) if known == name]
            hint = did_you_mean(name, [spec.name for spec in self.all(kind)])
            hint += f" (it is of kind {others[0]})" if others else ""
            raise BadInput(f'there is no {kind} "{clean(name, 60)}"{hint}; `limbeck list --pieces` shows them')
        return self.specs[kind, name]

    def all(self, kind: str | None = None) -> list[Spec]:
        """Every spec (of one kind), sorted by kind and name."""
        return [self.specs[key] for key in sorted(self.specs) if kind in (None, key[0])]

    def load(self, spec: Spec) -> Any:
        """Import and return the target (a factory `target(config, build)`, or what its kind asks for)."""
        return resolve(spec.target, spec.source)

    def config(self, spec: Spec) -> Any:
        """Import and return the pydantic class of the piece's settings; None when it has none."""
        if not spec.config:
            return None
        found = resolve(spec.config, spec.source)
        if getattr(found, "model_config", {}).get("extra") != "forbid":
            raise BadInput(f"{spec.config}: a config must be a pydantic model with extra='forbid'; fix {spec.source}")
        return found

    def recipe(self, name: str) -> Path:
        """The file of a recipe, or a BadInput that names the nearest one."""
        if name not in self.recipes:
            hint = did_you_mean(name, self.recipes)
            raise BadInput(f'there is no recipe "{clean(name, 60)}"{hint}; `limbeck list` shows them')
        return self.recipes[name]

    def add(self, source: str, package: str, folder: Path, prefix: str = "") -> None:
        """Read one provider's pieces.yaml and recipes; what is wrong becomes a problem and the rest goes on."""
        for spec in self._pieces(source, package, folder / "pieces.yaml"):
            held = self.specs.setdefault((spec.kind, spec.name), spec)
            if held is not spec:
                self._problem(source, f'{spec.kind} "{spec.name}" is already provided by {held.source}; rename it')
        for name, path in _recipes(folder / "recipes", prefix):
            if self.recipes.setdefault(name, path) != path:
                self._problem(source, f'recipe "{name}" is already provided by another package; rename it')

    def _pieces(self, source: str, package: str, path: Path) -> Iterator[Spec]:
        try:
            data = yamlio.parse(yamlio.read(path), str(path)).data if path.exists() else {}
            entries = [(kind, name, entry) for kind in data or {} for name, entry in (data[kind] or {}).items()]
        except (BadInput, AttributeError, TypeError, OSError) as error:
            text = str(error) if isinstance(error, BadInput) else f"{path}: must be `kind: {{name: {{target: …}}}}`"
            return self._problem(source, text)
        for kind, name, entry in entries:
            fault = _fault(kind, entry, package)
            if fault:
                self._problem(source, f"{clean(kind)}.{clean(name)}: {fault}")
            else:
                yield Spec(kind=kind, name=name, source=source, **entry)

    def _problem(self, source: str, message: str) -> None:
        self.problems.append(Problem(source, clean(message, 300)))


def _fault(kind: str, entry: Any, package: str) -> str:
    """What is wrong with one entry of a pieces.yaml, or an empty string."""
    if kind not in KINDS:
        return f"unknown kind{did_you_mean(kind, KINDS)}; the kinds are {', '.join(KINDS)}"
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        return "must be a mapping of texts with a target"
    wrong = [key for key in entry if key not in FIELDS]
    if wrong or "target" not in entry:
        return f"keys must be target (always), {', '.join(FIELDS[1:])}" + (f"; not {clean(wrong[0])}" if wrong else "")
    for value in (entry["target"], entry.get("config", "")):
        module, _, attribute = value.partition(":")
        if value and (not attribute or not (module == package or module.startswith(package + "."))):
            return f'"{clean(value)}" must be "module:attribute" with a module inside {package}'
    return ""


def _recipes(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    if folder.is_dir():
        for path in sorted(folder.rglob("*.yaml")):
            yield prefix + path.relative_to(folder).with_suffix("").as_posix(), path


def _package_folder(name: str) -> Path | None:
    """The folder of a package, found without importing it."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


@functools.cache
def registry() -> Registry:
    """Everything that is installed: core, the domains, the recipes, then the plugins (built-ins win clashes)."""
    found = Registry()
    face = _package_folder("limbeck")
    core, domains, recipes = (_package_folder(f"limbeck.{part}") for part in ("core", "domains", "recipes"))
    if face is None or core is None:
        raise LimbeckError("limbeck is not installed completely; run `pip install -e .` in its checkout")
    found.add("limbeck", "limbeck", core)
    for path in sorted(domains.glob("*/pieces.yaml")) if domains else []:
        found.add("limbeck", "limbeck", path.parent)
    found.recipes.update(_recipes(recipes, "") if recipes else ())
    for provider in _providers(found):
        found.plugins.append(provider)
        found.add(provider.name, provider.package, provider.folder, prefix=f"{provider.name}/")
    return found


def _entries(found: Registry) -> Iterator[tuple[EntryPoint, str]]:
    """Entry points of our group with their package's version; a package with damaged metadata is a problem."""
    names: set[str] = set()
    for distribution in metadata.distributions():
        name = "?"
        try:
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
            name = distribution.metadata["Name"] or "?"
            if name in names:  # the first on the path counts, as for imports
                continue
            names.add(name)
            yield from ((entry, distribution.version) for entry in distribution.entry_points.select(group=GROUP))
        except Exception as error:
            found._problem(name, f"its metadata cannot be read ({type(error).__name__}: {error}); reinstall it")


def _providers(found: Registry) -> Iterator[Provider]:
    seen: dict[str, str] = {}
    for entry, version in sorted(_entries(found), key=lambda pair: (pair[0].name, pair[0].value)):
        if entry.name in seen:
            if seen[entry.name] != entry.value:
                found._problem(entry.name, f"two plugins have this name (also {seen[entry.name]}); remove one")
            continue
        seen[entry.name] = entry.value
        if not entry.value.isidentifier() or entry.value == "limbeck":
            found._problem(entry.name, f'the entry point "{entry.value}" must be the name of a top-level package')
            continue
        folder = _quiet_folder(entry.value)
        if folder is None:
            found._problem(entry.name, f'the package "{entry.value}" cannot be found; reinstall or remove the plugin')
        else:
            yield Provider(entry.name, entry.value, version, folder)


def _quiet_folder(package: str) -> Path | None:
    try:
        return _package_folder(package)
    except (ImportError, ValueError, AttributeError):
        return None


class _TooSlow(BaseException):
    """Raised by the alarm; no `except Exception` of foreign code can swallow it."""


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: types.FrameType | None) -> None:
        raise _TooSlow

    before: Any = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def resolve(target: str, source: str = "limbeck") -> Any:
    """Import "module:attribute"; a plugin that raises, exits or hangs becomes one clear BadInput."""
    if source == "limbeck":
        return _attribute(target)
    try:
        with _alarm(IMPORT_SECONDS):
            return _attribute(target)
    except KeyboardInterrupt:
        raise
    except _TooSlow:
        why = f"took longer than {IMPORT_SECONDS:g} s to import"
    except BaseException as error:
        why = f"cannot be imported ({type(error).__name__}: {clean(error, 120)})"
    raise BadInput(f'the plugin "{source}" {why}: {target}; repair or uninstall it')


def _attribute(target: str) -> Any:
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
