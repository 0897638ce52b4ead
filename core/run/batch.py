"""One recipe for many prompts and seeds: a table with a row each, which stops, resumes and reports as tables do."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from limbeck.core.run import recipe as recipes
from limbeck.core.run import yamlio
from limbeck.core.run.errors import BadInput, clean
from limbeck.core.run.recipe import Recipe, Row

MOST_LINE, MOST_ROWS = 1000, 1000


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file, one a line, each once; blank lines are left out. BadInput for anything else."""
    where = f"--prompts {clean(path)}"
    try:
        if path.stat().st_size > yamlio.MAX_BYTES:  # the prompts become part of a recipe
            raise BadInput(f"{where}: is larger than {yamlio.MAX_BYTES // 1024} KiB; split it into several files")
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise BadInput(f"{where}: cannot be read ({error.strerror}); give a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: is not UTF-8 (byte {error.start}); save it as UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        if len(line) > MOST_LINE or not line.strip().replace("\t", " ").isprintable():
            raise BadInput(f"{where}:{number}: must be one prompt of at most {MOST_LINE} printable characters")
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise BadInput(f"{where}: has no prompt; write one a line")
    return prompts


def table(name: str, sets: Sequence[str], inputs: Mapping[str, str], prompts: Sequence[str], seeds: int) -> Recipe:
    """The recipe `name` once a prompt and seed: its rows; no prompts: its own one. Seeds count up from the recipe's."""
    first = {"prompt": prompts[0]} if prompts else {}
    if prompts and "prompt" in inputs:
        raise BadInput("--prompts and --prompt exclude each other; give one of them")
    base = recipes.load(name, sets, {**inputs, **first})
    if base.job == "table":
        raise BadInput(f"{clean(name)} is a table of recipes; --prompts and --seeds take one of them")
    count = max(1, len(prompts)) * seeds
    if count > MOST_ROWS:
        raise BadInput(f"{count} runs are more than one job takes ({MOST_ROWS}); split the prompts into several files")
    where = name if name in recipes.names() else str(Path(name).expanduser().resolve())
    shared = [*sets, *(item for key, text in inputs.items() for item in _sets(base, key, text))]
    rows = []
    for i, prompt in enumerate(prompts or [None]):
        own = _sets(base, "prompt", json.dumps(prompt, ensure_ascii=False)) if prompt is not None else []
        for seed in range(base.seed, base.seed + seeds):
            label = _label(i, prompt, seed if seeds > 1 or prompt is None else None)
            caption = (prompt or base.name) + (f"\nseed {seed}" if seeds > 1 else "")
            rows.append(Row(recipe=where, label=label, caption=caption, set=[*own, f"seed={seed}"]))
    kept = base.model_dump(include={"name", "about", "paper", "steps", "batch", "seed"})
    whole = Recipe(job="table", rows=rows, set=shared, **kept)
    if len(recipes.dump(whole).encode()) > yamlio.MAX_BYTES:  # it could not be read at a resume
        raise BadInput(f"{count} runs of such long prompts are more than one job takes; split them into several files")
    return whole


def _sets(base: Recipe, name: str, text: str) -> list[str]:
    """What an input of the recipe sets, as KEY=VALUE."""
    return [f"{key}={text}" for key in recipes.keys_of(base.inputs[name].set)]


def _label(number: int, prompt: str | None, seed: int | None) -> str:
    from limbeck.core.pictures import slug

    words = [] if prompt is None else [f"{number:03d}", slug(prompt)]
    return "-".join(words + ([] if seed is None else [f"seed-{seed}"]))
