"""`job: table`: several recipes at one budget, each in a folder of its own, their evaluations in one table."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.core.run import recipe as recipes
from limbeck.core.run.recipe import Recipe, Row
from limbeck.core.run.trainer import Stopped

Tables = dict[str, list[dict[str, Any]]]
OWN = "student"  # in a metric's column `generator`: what the run made; other generators are references, shown once


def carry_out(recipe: Recipe, folder: Path, run: Callable[..., int]) -> None:
    """Carry out every row that has no evaluation yet, then write eval.json and one sample sheet a row.

    Stopped, when a row was stopped by a signal.
    """
    for row in recipe.rows:
        inner = folder / "rows" / row.label
        if not (inner / "eval.json").exists():
            code = run(recipe_of(recipe, row), inner, resume=(inner / "recipe.yaml").exists())
            if code:
                raise Stopped(code - 128)
        _keep_samples(inner, folder / "samples", row.label)
        tables = merged({row.label: _evaluation(folder / "rows" / row.label) for row in _done(recipe, folder)})
        (folder / "eval.json").write_text(json.dumps(tables, indent=1))


def recipe_of(table: Recipe, row: Row) -> Recipe:
    """The row's recipe at the table's steps, batch and seed; the table's `set:` lines first, then the row's."""
    budget = [f"steps={table.steps}", f"batch={table.batch}", f"seed={table.seed}"]
    return recipes.load(row.recipe, [*budget, *table.set, *row.set])


def merged(parts: dict[str, Tables]) -> Tables:
    """Every row's own results under its label; what a metric says of other generators once, from the first row."""
    out: Tables = {}
    for index, (label, tables) in enumerate(parts.items()):
        for metric, lines in tables.items():
            own = [line for line in lines if line.get("generator", OWN) == OWN]
            others = [line for line in lines if line not in own] if index == 0 else []
            found = out.setdefault(metric, [])
            found += [{"recipe": "", **line} for line in others] + [{"recipe": label, **line} for line in own]
    return out


def _done(recipe: Recipe, folder: Path) -> list[Row]:
    return [row for row in recipe.rows if (folder / "rows" / row.label / "eval.json").exists()]


def _evaluation(folder: Path) -> Tables:
    found: Tables = json.loads((folder / "eval.json").read_text())
    return found


def _keep_samples(inner: Path, samples: Path, label: str) -> None:
    """The row's last sheet, beside those of the other rows."""
    sheets = sorted((inner / "samples").glob("step-*.*"))
    if sheets:
        samples.mkdir(parents=True, exist_ok=True)
        shutil.copy(sheets[-1], samples / f"{label}{sheets[-1].suffix}")
