"""`limbeck new-plugin NAME`: a working package with an operator, a check, a recipe and a test, to change from there."""

import importlib.util
import re
from pathlib import Path
from string import Template

from limbeck.core.run.errors import BadInput, clean

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\Z")

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "limbeck-$name"
version = "0.1.0"
description = "A plugin of limbeck"
requires-python = ">=3.11"
dependencies = ["limbeck"]

[project.entry-points."limbeck.plugins"]
$name = "$module"

[tool.setuptools]
packages = ["$module"]

[tool.setuptools.package-data]
$module = ["pieces.yaml", "recipes/*.yaml"]
"""

PIECES_YAML = """\
# What this plugin brings, as data: `<kind>: {<name>: {target: "module:attribute", config: "module:Class"}}`.
# `limbeck list --pieces` shows the kinds that exist. Code is imported only when a recipe uses a piece.
check:
  $name.damped: {target: "$module.pieces:check", about: "damped SDS against its closed form"}
operator:
  $name.damped: {target: "$module.pieces:damped", about: "SDS whose large entries are damped"}
"""

PIECES = '''\
"""The pieces: an operator, and the check that proves it."""

import torch
from limbeck.api import EDM, Check, GaussianMixture, Prediction, generator, operator
from torch import Tensor


@operator("eps", "sigma2")
def damped(teacher: Prediction, eps: Tensor, scale: float = 1.0) -> Tensor:
    """SDS's residual r as r / (1 + scale |r|), eps space."""
    r = teacher.eps - eps
    return r / (1 + scale * r.abs())


def check() -> list[Check]:
    """At the mode of a Gaussian with no noise drawn, nothing pulls; far from it, the pull is bounded by 1/scale."""
    teacher, t = GaussianMixture(torch.zeros(1, 2), 0.5, EDM()), torch.full((64,), 0.5)
    at_mode = teacher.predict(torch.zeros(64, 2), t, {})
    far = teacher.predict(50 * torch.randn(64, 2, generator=generator(0, "$name.check", 0)), t, {})
    none = torch.zeros(64, 2)
    return [
        Check("the pull at the mode", float(damped(at_mode, none).abs().max()), 1e-6, "<="),
        Check("the pull far away", float(damped(far, none, scale=2.0).abs().max()), 0.5, "<="),
    ]
'''

RECIPE = """\
extends: toy/ring4
about: The toy, trained with the operator of this plugin
inputs: {}
stages: [{name: main, losses: [{kind: score, operator: $name.damped, guidance: 1.0}]}]
steps: 200
"""

TEST = '''\
"""The plugin as users meet it: installed, listed, checked, run."""

from pathlib import Path

from limbeck.api import Recipe
from limbeck.core.run import job, recipe
from limbeck.core.run.registry import registry


def test_it_is_read_without_problems() -> None:
    assert not registry().problems
    assert "$name/hello" in recipe.names()


def test_its_check_passes() -> None:
    checks = registry().load(registry().get("check", "$name.damped"))()
    assert checks and all(check.passed for check in checks)


def test_its_recipe_runs(tmp_path: Path) -> None:
    tiny = ["steps=2", "batch=8", "eval=[]", "space.count=10"]
    found: Recipe = recipe.load("$name/hello", tiny)
    assert job.run(found, tmp_path / "run", device="cpu", quiet=True) == 0
    assert (tmp_path / "run" / "report.html").exists()
'''

README = """\
# limbeck-$name

    pip install -e .          # in the environment of limbeck
    limbeck plugins           # it is listed, or the reason why not
    limbeck verify $name
    limbeck run $name/hello
    pytest

Pieces are named in `$module/pieces.yaml` and written with the names of `limbeck.api`. Settings of a piece are a
pydantic model (a subclass of `limbeck.api.Strict`) in a module that imports no torch, named by `config:`.
"""


def write(name: str, out: Path) -> str:
    """Write `out/limbeck-NAME`; what to do next, as text."""
    module = _checked(name)
    root = out / f"limbeck-{name}"
    if root.exists():
        raise BadInput(f"{root} exists already; choose another name or --out")
    files = {
        "pyproject.toml": PYPROJECT, "README.md": README, "tests/test_plugin.py": TEST, f"{module}/__init__.py": "",
        f"{module}/pieces.yaml": PIECES_YAML, f"{module}/pieces.py": PIECES, f"{module}/recipes/hello.yaml": RECIPE,
    }  # fmt: skip
    for place, text in files.items():
        path = root / place
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(text).substitute(name=name, module=module), encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    return f"{root} is written; next: pip install -e {root} && pytest {root}"


def _checked(name: str) -> str:
    short = name.removeprefix("limbeck-")
    if not NAME.match(name) or short != name or len(name) > 40:
        raise BadInput(f'"{clean(name, 40)}": use small letters, digits and single hyphens, such as {_tidy(short)}')
    module = f"limbeck_{name.replace('-', '_')}"
    if importlib.util.find_spec(module):
        raise BadInput(f'a package "{module}" is installed already; choose another name')
    return module


def _tidy(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:40] or "my-plugin"
