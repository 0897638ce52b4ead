"""Plugins, installed for real: the two examples, the skeleton of new-plugin, and bad ones that harm nobody else."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

PLUGINS = Path(__file__).parents[2] / "plugins"
TINY = ["--set", "steps=4", "--set", "batch=8", "--set", "sample.every=4", "--set", "log.every=1", "--device", "cpu"]
Verb = Callable[..., subprocess.CompletedProcess[str]]
BUILD = ("build", "*.egg-info", "__pycache__")


def install(target: Path, *sources: Path) -> Path:
    """pip install into a folder of its own (from copies, so that nothing is left beside the sources)."""
    copies = [Path(shutil.copytree(s, target / "src" / s.name, ignore=shutil.ignore_patterns(*BUILD))) for s in sources]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index",
               "--target", str(target / "site"), *map(str, copies)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return target / "site"


def fresh(site: Path, *arguments: object, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """A verb in an interpreter of its own that sees the installed plugins: what is imported is seen."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    code = f"import sys\n{before}\nfrom limbeck.cli import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, env=environment)


@pytest.fixture
def limbeck(python: Any) -> Verb:
    """`limbeck(site, verb, …)`: a verb in a process that sees the installed plugins."""

    def run(site: Path, *arguments: object, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
        code = f"import sys\n{before}\nfrom limbeck.cli import main\nmain(sys.argv[1:])"
        return python.run(["-c", code, *arguments], env={**os.environ, "PYTHONPATH": str(site)}, cwd=cwd)

    return run


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("plugins"), PLUGINS / "limbeck-example", PLUGINS / "limbeck-points")


def test_the_example_is_short() -> None:
    files = [p for p in (PLUGINS / "limbeck-example").rglob("*") if p.suffix in (".py", ".yaml", ".toml")]
    lines = sum(len(p.read_text().splitlines()) for p in files if not {"build"} & set(p.parts))
    assert lines <= 60, lines


def test_both_are_listed_and_nothing_is_imported(site: Path, tmp_path: Path) -> None:
    watch = "import atexit; atexit.register(lambda: print('torch' in sys.modules, 'limbeck_points' in sys.modules))"
    out = good(fresh(site, "plugins", cwd=tmp_path, before=watch))
    for word in ("operator example.soft-sds", "reward example.radius", "recipe example/soft", "recipe points/demo"):
        assert word in out
    for kind in ("data", "teacher", "student", "space", "metric", "exporter", "check"):
        assert f"{kind} points." in out
    assert "problem" not in out and out.splitlines()[-1] == "False False"


def test_the_example_runs(site: Path, tmp_path: Path, limbeck: Verb) -> None:
    out = tmp_path / "runs"
    tiny = ["--set", "eval.0.count=50", "--set", "space.count=20", "--set", "eval.1.count=64", *TINY]
    good(limbeck(site, "run", "example/soft", "--out", out, "--name", "a", *tiny, cwd=tmp_path))
    rows = json.loads((out / "a" / "eval.json").read_text())["rewards"]
    assert [(row["reward"], row["role"]) for row in rows] == [
        ("example.radius", "train"),
        ("example.radius", "held out"),
    ]
    assert rows[0]["mean"] != rows[1]["mean"]


def test_a_whole_domain_works(site: Path, tmp_path: Path, limbeck: Verb) -> None:
    """A third of the demo, then every verb of a run, in one process."""
    folder = tmp_path / "runs" / "a"
    on = ["--device", "cpu"]
    verbs = [
        ["run", "points/demo", "--shape", "cross", "--out", folder.parent, "--name", "a", *on, "--set", "steps=300"],
        ["sample", folder, "--prompt", "spiral", *on],
        ["export", folder, "--format", "points.csv", *on],
        ["verify", "points", "--json"],
        ["sample", folder, "--prompt", "sircle", *on],
    ]
    each = "from limbeck import cli\nfor line in sys.argv[1:-1]:\n"
    each += "  try: cli.main(line.split('|'))\n  except SystemExit as end: print('\\x1e', end.code, '\\x1f')\n"
    done = limbeck(site, *["|".join(map(str, verb)) for verb in verbs], "--version", cwd=tmp_path, before=each)
    ran, picture, table, checks, wrong, _ = (part.strip() for part in done.stdout.split("\x1f"))
    assert [part.split("\x1e")[-1].strip() for part in (ran, picture, table, checks, wrong)] == [
        "0",
        "0",
        "0",
        "0",
        "2",
    ]
    assert (folder / "report.html").exists() and list((folder / "samples").glob("*.png"))
    student = json.loads((folder / "eval.json").read_text())["points.quality"][1]
    assert student["right shape"] >= 0.95 and student["distance"] < 0.15, student
    assert Path(picture.split("\x1e")[0].strip()).is_file()
    assert Path(table.split("\x1e")[0].strip()).read_text().startswith("sample,prompt,x,y\n0,ring,")
    rows = [json.loads(line) for line in checks.split("\x1e")[0].strip().splitlines()]
    assert len(rows) == 2 and all(row["passed"] for row in rows)
    assert "the prompts are ring, cross, spiral" in done.stderr


@pytest.mark.parametrize("recipe", ["example/soft", "points/demo"])
def test_a_plugins_recipe_resumes_bit_for_bit(recipe: str, site: Path, tmp_path: Path, limbeck: Verb) -> None:
    from limbeck.core.run import checkpoint

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    keys = ["steps=20", "batch=8", "checkpoint.every=10", "checkpoint.keep=5", "eval=[]", "log.every=4"]
    sets = [part for key in keys for part in ("--set", key)]
    good(limbeck(site, "run", recipe, "--out", tmp_path, "--name", "whole", *sets, "--device", "cpu", cwd=tmp_path))
    shutil.copytree(whole, halves)
    shutil.rmtree(next((halves / "checkpoints").glob("*-00000020")))
    good(limbeck(site, "resume", halves, "--device", "cpu", cwd=tmp_path))
    one, two = (checkpoint.latest(folder / "checkpoints") for folder in (whole, halves))
    assert one.manifest.step == two.manifest.step == 20 and one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in one.tensors)


def bad(folder: Path, name: str, entry: str, pieces: str, code: str) -> None:
    """A package as pip would have installed it."""
    package, info = folder / name, folder / f"{name}-1.0.dist-info"
    (package / "recipes").mkdir(parents=True)
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[limbeck.plugins]\n{entry} = {name}\n")
    (package / "__init__.py").write_text(code)
    (package / "pieces.yaml").write_text(pieces)
    (package / "recipes" / "r.yaml").write_text(f"extends: toy/ring4\nabout: x\nspace: {{kind: {entry}.space}}\n")


def piece(package: str, kind: str, name: str) -> str:
    return f'{kind}:\n  {name}: {{target: "{package}:build", config: "{package}:Config"}}\n'


BAD: Mapping[str, tuple[str, str, str]] = {
    "bad_raises": ("raises", piece("bad_raises", "space", "raises.space"), "raise RuntimeError('broken on purpose')\n"),
    "bad_exits": ("exits", piece("bad_exits", "space", "exits.space"), "import sys\nsys.exit(7)\n"),
    "bad_hangs": ("hangs", piece("bad_hangs", "space", "hangs.space"), "import time\ntime.sleep(3600)\n"),
    "bad_stubborn": ("stubborn", piece("bad_stubborn", "space", "stubborn.space"),
                     "import time\ntry: time.sleep(3600)\nexcept Exception: time.sleep(3600)\n"),
    "bad_clash": ("clash", piece("bad_clash", "teacher", "toy.ring4"), ""),
    "bad_yaml": ("yaml", "space: [unclosed\n", ""),
    "bad_tag": ("tag", "space: !!python/object/apply:os.system ['touch CANARY']\n", ""),
    "bad_shape": ("shape", "space: 3\n", ""),
    "bad_target": ("target", 'space:\n  target.space: {target: "os:system"}\n', ""),
    "bad_kind": ("kind", piece("bad_kind", "spaces", "kind.space"), ""),
    "bad_loose": ("loose", piece("bad_loose", "space", "loose.space"),
                  "from pydantic import BaseModel\nclass Config(BaseModel): pass\ndef build(c, b): pass\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, (entry, pieces, code) in BAD.items():
        bad(folder, name, entry, pieces, code)
    entries = {
        "ghost": "ghost = no_such_package\npath = os.path\nraises = ghost\n",
        "binary": "a = \0\n",
    }
    for name, text in entries.items():
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[limbeck.plugins]\n{text}")
    return folder


def test_bad_plugins_are_reported(bad_site: Path, tmp_path: Path, limbeck: Verb) -> None:
    out = good(limbeck(bad_site, "plugins", cwd=tmp_path))
    for words in (
        'clash: teacher "toy.ring4" is already provided by limbeck', "yaml: ", "tag: ", "shape: ", "target: ", "kind: ",
        'ghost: the package "no_such_package" cannot be found', 'path: the entry point "os.path"', "a: the entry point",
        "raises: two plugins",
    ):  # fmt: skip
        assert f"problem: {words}" in out, (words, out)
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["list"], ["list", "--pieces"], ["show", "toy/ring4"], ["runs"], ["verify", "diffusion.jumps"],
     ["doctor"], ["run", "toy/ring4", "--dry-run", *TINY]],
    ids=lambda arguments: " ".join(arguments[:2]),
)  # fmt: skip
def test_bad_plugins_harm_no_other_verb(bad_site: Path, tmp_path: Path, limbeck: Verb, arguments: list[str]) -> None:
    done = limbeck(bad_site, *arguments, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    if arguments[0] == "show":
        assert "toy.ring4" in done.stdout


def test_a_package_with_damaged_metadata_is_named(tmp_path: Path) -> None:
    """torch itself cannot be imported beside one, so the verbs that can must say which package it is."""
    info = tmp_path / "damaged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: damaged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[limbeck.plugins]\nno equals sign\n")
    for verb, status in {"--help": 0, "list": 0, "plugins": 0, "doctor": 1}.items():
        done = fresh(tmp_path, verb, cwd=tmp_path)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        assert "problem: damaged: its metadata cannot be read" in done.stdout or verb in ("--help", "list")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("raises", "cannot be imported (RuntimeError: broken on purpose)"),
        ("exits", "cannot be imported (SystemExit: 7)"),
        ("hangs", "took longer than 1 s"),
        ("stubborn", "took longer than 1 s"),
        ("target", 'there is no space "target.space"'),
        ("kind", 'there is no space "kind.space"'),
        ("loose", "extra='forbid'"),
    ],
)
def test_using_a_bad_plugin_is_one_clear_line(
    bad_site: Path, tmp_path: Path, limbeck: Verb, entry: str, words: str
) -> None:
    quick = "import limbeck.core.run.registry as r; r.IMPORT_SECONDS = 1.0"
    done = limbeck(bad_site, "show", f"{entry}/r", cwd=tmp_path, before=quick)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_new_plugin_writes_a_package_whose_test_passes(tmp_path: Path, limbeck: Verb, python: Any) -> None:
    good(limbeck(tmp_path, "new-plugin", "tiny-thing", "--out", tmp_path, cwd=tmp_path))
    root = tmp_path / "limbeck-tiny-thing"
    site = install(tmp_path / "installed", root)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", root]
    done = python.run(words, cwd=root, env={**os.environ, "PYTHONPATH": str(site)})
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
    again = limbeck(site, "new-plugin", "tiny-thing", "--out", tmp_path / "else", cwd=tmp_path)
    assert again.returncode == 2 and "installed already" in again.stderr


@pytest.mark.parametrize("name", ["", "A", "1a", "a_b", "a b", "../x", "a/b", "limbeck-x", "a" * 60, "é", "-a"])
def test_new_plugin_refuses_odd_names(name: str, tmp_path: Path) -> None:
    from limbeck import scaffold
    from limbeck.core.run.errors import BadInput

    with pytest.raises(BadInput, match="use small letters"):
        scaffold.write(name, tmp_path)
    assert not any(tmp_path.iterdir())
