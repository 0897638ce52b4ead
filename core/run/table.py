"""`job: table`: several recipes at one budget, each in a folder of its own, their evaluations in one table."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from limbeck.core.run import contact, distributed, outside
from limbeck.core.run import recipe as recipes
from limbeck.core.run.errors import LimbeckError
from limbeck.core.run.recipe import Recipe, Row
from limbeck.core.run.trainer import Stopped

Tables = dict[str, list[dict[str, Any]]]
OWN = "student"  # in a metric's column `generator`: what the run made; other generators are references, shown once
PAGE = 24  # rows of a contact sheet
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}
Say = Callable[[str], None]


def carry_out(recipe: Recipe, folder: Path, run: Callable[..., int], say: Say) -> None:
    """Carry out every row that has no evaluation yet, one after the other; after each, what all gave comes together.

    Stopped, when a row was stopped by a signal; LimbeckError, once all were tried, when some failed.
    """
    failed: dict[str, str] = {}
    for row in left(recipe, folder):
        inner = folder / "rows" / row.label
        try:
            code = run(recipe_of(recipe, row), inner, resume=(inner / "recipe.yaml").exists())
        except LimbeckError as error:
            failed[row.label] = str(error)
            say(f"{row.label} failed: {error}")
            continue
        if code:
            raise Stopped(code - 128)
        gather(recipe, folder, [row])
    _end(recipe, failed)


def carry_out_apart(recipe: Recipe, folder: Path, at_once: int, device: Callable[[int], str], say: Say) -> None:
    """The same with a process a row, `at_once` at a time; `device` says what each place among them computes on."""
    rows = left(recipe, folder)
    began: dict[int, float] = {}
    failed: dict[str, str] = {}

    def start(number: int, place: int) -> list[str]:
        began[number] = time.monotonic()
        say(f"{rows[number].label}: begins")
        return _resume(recipe_of(recipe, rows[number]), folder / "rows" / rows[number].label, device(place))

    def ended(number: int, code: int) -> None:
        row, note = rows[number], folder / "rows" / rows[number].label / "error.txt"
        if code == 0:
            gather(recipe, folder, [row])
        elif code < 128:
            failed[row.label] = note.read_text().strip() if note.exists() else f"exit status {code}"
        how = "done" if code == 0 else "failed" if code < 128 else "stopped"
        say(f"{row.label}: {how} after {time.monotonic() - began[number]:.0f} s")

    stopped = distributed.supervise(len(rows), start, ended, at_once, quiet=True)
    if stopped:
        raise Stopped(stopped - 128)
    _end(recipe, failed)


def _resume(recipe: Recipe, folder: Path, device: str) -> list[str]:
    """The command that starts or goes on with a row, whose recipe lies in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "recipe.yaml").exists():
        (folder / "recipe.yaml").write_text(recipes.dump(recipe))
    rewards = recipe.rewards.model_dump(mode="json") if recipe.rewards else None
    return [sys.executable, "-m", "limbeck", "resume", str(folder), "--device", device, *outside.flags_for(rewards)]


def _end(recipe: Recipe, failed: dict[str, str]) -> None:
    if failed:
        label, why = next(iter(failed.items()))
        raise LimbeckError(f"{len(failed)} of {len(recipe.rows)} rows failed; {label}: {why}")


def left(recipe: Recipe, folder: Path) -> list[Row]:
    """The rows that are not done; what the others gave is brought together (a stop may have come before that)."""
    there = done(recipe, folder)
    gather(recipe, folder, there)
    return [row for row in recipe.rows if row not in there]


def done(recipe: Recipe, folder: Path) -> list[Row]:
    """The rows whose evaluation is there."""
    return [row for row in recipe.rows if (folder / "rows" / row.label / "eval.json").exists()]


def recipe_of(table: Recipe, row: Row) -> Recipe:
    """The row's recipe at the table's steps, batch and seed; the table's `set:` lines first, then the row's."""
    budget = [f"steps={table.steps}", f"batch={table.batch}", f"seed={table.seed}"]
    return recipes.load(row.recipe, [*budget, *table.set, *row.set])


def gather(recipe: Recipe, folder: Path, rows: Sequence[Row]) -> None:
    """These rows are done: their sheets go beside (or on a contact sheet with) the others', evaluations together."""
    for row in rows:
        mark, sheet = folder / "rows" / row.label / "eval.json", last_sheet(folder / "rows" / row.label)
        if not mark.exists():  # a recipe without metrics
            mark.write_text("{}")
        if sheet and not row.caption:
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            shutil.copy(sheet, folder / "samples" / f"{row.label}{sheet.suffix}")
    there = done(recipe, folder)
    for page in sorted({recipe.rows.index(row) // PAGE for row in rows if row.caption}):
        shown = [row for row in recipe.rows[page * PAGE : (page + 1) * PAGE] if row in there]
        cells = [(row.caption, sheet) for row in shown if (sheet := last_sheet(folder / "rows" / row.label))]
        if cells:
            contact.write(cells, folder / "samples" / f"contact-{page + 1}.png")
    if there:
        parts = {_title(row): json.loads((folder / "rows" / row.label / "eval.json").read_text()) for row in there}
        (folder / "eval.json").write_text(json.dumps(merged(parts), indent=1))


def _title(row: Row) -> str:
    return row.caption.replace("\n", " · ") or row.label


def last_sheet(folder: Path) -> Path | None:
    """The picture of a run's last step, or the first of its samples where it draws none at steps."""
    pictures = sorted(path for path in (folder / "samples").glob("*") if path.suffix.lower() in PICTURES)
    steps = [path for path in pictures if path.name.startswith("step-")]
    return steps[-1] if steps else pictures[0] if pictures else None


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
