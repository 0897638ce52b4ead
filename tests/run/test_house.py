"""The house: which way imports run, how long functions are, what is annotated, what is free of torch and pickle."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPED = {".venv", "build", "dist", "runs", "__pycache__", ".git"}
LIBRARY = ("core", "domains", "src/limbeck")
Function = ast.FunctionDef | ast.AsyncFunctionDef
TORCH_FREE = (
    "limbeck", "limbeck.api", "limbeck.cli", "limbeck.doctor", "limbeck.scaffold", "limbeck.verbs", "limbeck.core",
    "limbeck.core.scheduled", "limbeck.core.run", "limbeck.core.run.checks", "limbeck.core.run.config",
    "limbeck.core.run.errors", "limbeck.core.run.outside", "limbeck.core.run.plot", "limbeck.core.run.recipe",
    "limbeck.core.run.registry", "limbeck.core.run.report", "limbeck.core.run.yamlio", "limbeck.core.diffusion.config",
    "limbeck.core.distillation.config", "limbeck.core.rewards.config", "limbeck.domains.image.config",
)  # fmt: skip


def files(*tops: str) -> list[Path]:
    """Python files below these folders; links inside src/limbeck are not followed twice."""
    found = []
    for top in tops:
        for path in sorted((ROOT / top).rglob("*.py")):
            inside = path.relative_to(ROOT)
            linked = any(parent.is_symlink() for parent in path.parents if ROOT in parent.parents)
            if not linked and not SKIPPED & set(inside.parts):
                found.append(path)
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "src" else ("limbeck", *parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(node: ast.Module) -> Iterator[tuple[str, int]]:
    """Every imported module, wherever in the file (inside functions too)."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from ((alias.name, part.lineno) for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, f"relative import at line {part.lineno}; imports are absolute"
            yield part.module or "", part.lineno
            yield from ((f"{part.module}.{alias.name}", part.lineno) for alias in part.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def forbidden(source: str) -> list[str]:
    """The packages that a module may not import: limbeck -> domains -> core; domains apart; run and diffusion apart."""
    face = ["limbeck.cli", "limbeck.verbs", "limbeck.doctor", "limbeck.scaffold", "limbeck.api", "core", "domains"]
    if within(source, "limbeck.core"):
        apart = {"limbeck.core.run": ["limbeck.core.diffusion"], "limbeck.core.diffusion": ["limbeck.core.run"]}
        inner = [bad for package, bads in apart.items() if within(source, package) for bad in bads]
        training = ["limbeck.core.distillation", "limbeck.core.rewards"]
        lower = within(source, "limbeck.core.run") or within(source, "limbeck.core.diffusion")
        return [*face, "limbeck.domains", *inner, *(training if lower else [])]
    if within(source, "limbeck.domains"):
        own = source.split(".")[2] if source.count(".") >= 2 else ""
        others = {"image", "video", "threed", "sequence"} - {own}
        return [*face, *(f"limbeck.domains.{other}" for other in others)]
    return ["core", "domains", "recipes"]


def broken_arrows(source: str, node: ast.Module) -> list[str]:
    bans = forbidden(source)
    return [f"{source}:{line} imports {name}" for name, line in imports(node) for ban in bans if within(name, ban)]


def test_arrows() -> None:
    assert [arrow for path in files(*LIBRARY) for arrow in broken_arrows(module(path), tree(path))] == []


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("limbeck.core.run.x", "from limbeck.core.diffusion.time import law"),
        ("limbeck.core.run.x", "import limbeck.core.diffusion"),
        ("limbeck.core.run.x", "def f():\n    from limbeck.core import diffusion"),
        ("limbeck.core.diffusion.x", "from limbeck.core.run.players import Player"),
        ("limbeck.core.distillation.x", "import limbeck.domains.image.data"),
        ("limbeck.domains.image.x", "from limbeck.domains.video import data"),
        ("limbeck.domains.image.x", "from limbeck import cli"),
        ("limbeck.core.run.x", "import core.run"),
    ],
)
def test_a_broken_arrow_is_seen(source: str, text: str) -> None:
    assert broken_arrows(source, ast.parse(text))


def functions(node: ast.AST) -> Iterator[Function]:
    return (part for part in ast.walk(node) if isinstance(part, Function))


def length(function: Function) -> int:
    """Lines from `def` to the last one, without its docstring and blank lines."""
    first = function.body[0]
    docstring = ast.get_docstring(function, clean=False) is not None
    doc = (first.end_lineno or 0) - first.lineno + 1 if docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - doc


def test_functions_are_short() -> None:
    sizes = [(length(f), f"{module(path)}.{f.name}") for path in files(*LIBRARY) for f in functions(tree(path))]
    counts = [size for size, _ in sizes]
    assert max(sizes)[0] <= 80, max(sizes)
    assert statistics.median(counts) <= 10
    assert statistics.quantiles(counts, n=10)[-1] <= 35


def public(node: ast.Module) -> Iterator[Function]:
    """Public functions of the module and public methods of its public classes."""
    for part in node.body:
        if isinstance(part, Function) and not part.name.startswith("_"):
            yield part
        elif isinstance(part, ast.ClassDef) and not part.name.startswith("_"):
            for inner in part.body:
                if isinstance(inner, Function) and (inner.name == "__init__" or not inner.name.startswith("_")):
                    yield inner


def annotated(function: Function) -> bool:
    given = function.args
    named = [a for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]
    return function.returns is not None and all(argument.annotation for argument in named)


def test_public_functions_are_annotated_and_have_no_kwargs_sink() -> None:
    found = [(path, f) for path in files(*LIBRARY) for f in public(tree(path))]
    bare = [f"{module(path)}.{f.name}" for path, f in found if not annotated(f)]
    assert len(bare) <= 0.1 * len(found), bare
    sinks = [f"{module(path)}.{f.name}" for path, f in found if f.args.kwarg]
    assert sinks == []


def test_public_names_have_docstrings() -> None:
    found = [(path, f) for path in files(*LIBRARY) for f in public(tree(path)) if f.name != "__init__"]
    without = [f"{module(path)}.{f.name}" for path, f in found if not ast.get_docstring(f)]
    assert len(without) <= 0.3 * len(found), without
    assert [str(path) for path in files(*LIBRARY) if tree(path).body and not ast.get_docstring(tree(path))] == []


def test_inheritance_is_shallow() -> None:
    """A class of ours has at most one of our classes above it, not counting configs, protocols and errors."""
    bases: dict[str, list[str]] = {}
    for path in files(*LIBRARY):
        for part in ast.walk(tree(path)):
            if isinstance(part, ast.ClassDef) and path.name not in ("config.py", "errors.py"):
                bases[part.name] = [base.id for base in part.bases if isinstance(base, ast.Name)]

    def depth(name: str) -> int:
        return 1 + max((depth(base) for base in bases.get(name, [])), default=0) if name in bases else 0

    assert {name: depth(name) for name in bases if depth(name) > 2} == {}


def unsafe(node: ast.Module) -> list[str]:
    """Uses of pickle, torch.load, eval, exec, compile or an unsafe YAML reader, by the syntax tree."""
    found = []
    for name, line in imports(node):
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"):
            found.append(f"{line}: imports {name}")
    for part in ast.walk(node):
        name = ast.unparse(part.func) if isinstance(part, ast.Call) else ""
        bad = name in ("torch.load", "torch.save", "eval", "exec", "compile", "__import__", "os.system", "os.popen")
        bad |= name.startswith("yaml.") and name.split(".")[1] in ("load", "load_all", "full_load", "unsafe_load")
        bad |= any(k.arg == "allow_pickle" for k in getattr(part, "keywords", []) if isinstance(part, ast.Call))
        bad |= any(
            k.arg in ("trust_remote_code", "shell") and getattr(k.value, "value", None) is True
            for k in getattr(part, "keywords", [])
            if isinstance(part, ast.Call)
        )
        if bad:
            found.append(f"{part.lineno}: {name}")  # type: ignore[attr-defined]
    return found


def test_nothing_unsafe_anywhere_in_the_project() -> None:
    everywhere = files("core", "domains", "src", "recipes", "plugins", "benchmarks", "tests", "docs")
    found = [f"{path.relative_to(ROOT)}:{use}" for path in everywhere for use in unsafe(tree(path))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "def f():\n    import dill", "import torch\ntorch.load('x')",
        "torch.save(x, 'x')", "eval('1')", "exec('1')", "import yaml\nyaml.load('x')", "yaml.full_load('x')",
        "np.load('x', allow_pickle=True)", "f(trust_remote_code=True)", "os.system('x')", "run('x', shell=True)",
    ],
)  # fmt: skip
def test_an_unsafe_use_is_seen(text: str) -> None:
    assert unsafe(ast.parse(text))


def test_torch_free_modules() -> None:
    without_torch(TORCH_FREE)


def without_torch(modules: Iterable[str]) -> None:
    """Import them one after the other in a fresh process."""
    code = "import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "    assert 'torch' not in sys.modules, name"
    subprocess.run([sys.executable, "-c", code, *modules], check=True, timeout=60)


def test_every_config_module_is_torch_free() -> None:
    from limbeck.core.run.registry import registry

    modules = {spec.config.partition(":")[0] for spec in registry().all() if spec.config and spec.source == "limbeck"}
    without_torch(sorted(modules))


def test_the_global_generator_is_not_used() -> None:
    """Draws take a generator: rand, randn, randint, randperm, multinomial, normal_ and so on without one are seen."""
    names = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal"}
    found = []
    for path in files("core", "domains"):
        for part in ast.walk(tree(path)):
            name = ast.unparse(part.func) if isinstance(part, ast.Call) else ""
            if name.startswith("torch.") and name.split(".")[1] in names and isinstance(part, ast.Call):
                if not any(keyword.arg == "generator" for keyword in part.keywords):
                    found.append(f"{path.relative_to(ROOT)}:{part.lineno}: {name}")
            if name in ("torch.randn_like", "torch.rand_like"):
                found.append(f"{path.relative_to(ROOT)}:{part.lineno}: {name}")  # type: ignore[attr-defined]
    assert found == []


def test_every_importable_folder_has_an_init() -> None:
    for top in ("core", "domains"):
        for path in files(top):
            assert (path.parent / "__init__.py").exists(), path


def test_every_public_name_of_the_api_is_there() -> None:
    from limbeck import api

    assert len(set(api.WHERE)) == sum(len(names) for names in api.HOMES.values())
    for name in api.WHERE:
        assert getattr(api, name) is not None
    with pytest.raises(AttributeError):
        api.nothing  # noqa: B018
