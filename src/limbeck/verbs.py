"""What the verbs do. Nothing here imports torch until a verb needs a model."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.run import outside, yamlio
from limbeck.core.run import recipe as recipes
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.core.run.registry import registry


@dataclass(frozen=True)
class Order:
    """One `limbeck run`: the recipe, what follows it on the command line, and the flags."""

    recipe: str
    extra: list[str]
    sets: list[str]
    out: Path | None = None
    name: str | None = None
    seed: int | None = None
    device: str | None = None
    dry_run: bool = False
    processes: int = 1
    programs: Sequence[str] = ()
    addresses: Sequence[str] = ()
    prompts: Path | None = None
    seeds: int = 1


def run(order: Order, flags: Sequence[str]) -> int:
    """Load, check and carry out a recipe; the exit status."""
    recipe = _ordered(order, flags)
    outside_of(recipe, order.programs, order.addresses)
    folder, again = new_folder(recipe, order)
    if order.processes > 1 and recipe.job != "table":
        from limbeck.core.run import distributed

        return distributed.launch(_arguments(order, folder), order.processes)
    from limbeck.core.run import job

    at_once, dry_run = order.processes, order.dry_run
    return job.run(recipe, folder, device=order.device, dry_run=dry_run, resume=again, at_once=at_once)


def _ordered(order: Order, flags: Sequence[str]) -> recipes.Recipe:
    """The recipe as the command line has it; a table of it where there are several prompts or seeds."""
    from limbeck.core.run import batch

    prompts = [] if order.prompts is None else batch.read_prompts(order.prompts)
    inputs = parse_inputs(order, flags)
    sets = order.sets + ([f"seed={order.seed}"] if order.seed is not None else [])
    if not prompts and order.seeds == 1:
        return recipes.load(order.recipe, sets, inputs)
    whole = batch.table(order.recipe, sets, inputs, prompts, order.seeds)
    if not order.dry_run:
        return whole
    from limbeck.core.run import table

    print(f"each of {len(whole.rows)} runs:")
    return table.recipe_of(whole, whole.rows[0])


def outside_of(recipe: recipes.Recipe, programs: Sequence[str], addresses: Sequence[str]) -> None:
    """Take what the command line names, which must be what the recipe's rewards need (rows of a table say it later)."""
    outside.take(programs, addresses)
    if recipe.job != "table":
        outside.agree(recipe.rewards.model_dump(mode="json") if recipe.rewards else None)


def parse_inputs(order: Order, flags: Sequence[str]) -> dict[str, str]:
    """The recipe's inputs among the arguments: `--name value` or `--name=value`."""
    known = _declared(recipes.source(order.recipe).data)
    values: dict[str, str] = {}
    rest = list(order.extra)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        key = name.removeprefix("--")
        if not name.startswith("--") or key not in known:
            hint = did_you_mean(key, [*(flag.removeprefix("--") for flag in flags), *known]).replace('"', '"--', 1)
            raise BadInput(
                f"{clean(order.recipe)} has no input {clean(name)}{hint}; `limbeck run RECIPE --help` shows them"
            )
        if not equals and (not rest or rest[0].startswith("--")):
            raise BadInput(f"{name} needs a value: {name} VALUE")
        values[key] = value if equals else rest.pop(0)
    return values


def _declared(data: Mapping[str, Any]) -> dict[str, Any]:
    inputs = data.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def new_folder(recipe: recipes.Recipe, order: Order) -> tuple[Path, bool]:
    """DIR/NAME, by default runs/<recipe>/<time>: empty yet, or (then True) with the very same table begun in it."""
    folder = (order.out or Path("runs") / recipe.name) / (order.name or time.strftime("%Y-%m-%d-%H%M%S"))
    there = folder / "recipe.yaml"
    if recipe.job == "table" and there.is_file() and recipes.load(str(there)) == recipe:
        return folder, True
    if "RANK" not in os.environ and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} is not empty; choose another --name, or `limbeck resume {folder}`")
    return folder, False


def _arguments(order: Order, folder: Path) -> list[str]:
    """The same order for a worker process, with the folder spelt out."""
    flags = [part for item in order.sets for part in ("--set", item)]
    flags += ["--out", str(folder.parent), "--name", folder.name]
    flags += ["--seed", str(order.seed)] if order.seed is not None else []
    flags += ["--device", order.device] if order.device else []
    flags += ["--dry-run"] if order.dry_run else []
    flags += outside.arguments(order.programs, order.addresses)
    return ["run", order.recipe, *flags, *order.extra]


def inputs_help(name: str) -> str:
    """The inputs of a recipe with their help and present values."""
    data = recipes.source(name).data
    rows = [
        (f"--{key}", clean(entry.get("help", "")), f"[{clean(', '.join(keys))}: {clean(_lookup(data, keys[0]), 40)}]")
        for key, entry in _declared(data).items()
        if isinstance(entry, dict) and (keys := recipes.keys_of(entry.get("set")))
    ]
    head = f"Inputs of {clean(data.get('name', name))}:"
    return "\n".join([head, *table(rows)]) if rows else f"{clean(name)} has no inputs of its own; use --set KEY=VALUE."


def _lookup(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else data[int(part)] if _inside(data, part) else None
    return "default" if data is None else data


def _inside(data: Any, part: str) -> bool:
    return isinstance(data, list) and part.isdigit() and int(part) < len(data)


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of left-aligned columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def list_recipes() -> None:
    """Name, expected minutes and what it is about; a file that cannot be read says so."""
    rows = []
    for name in recipes.names():
        try:
            data = recipes.source(name).data
        except BadInput as error:
            rows.append((clean(name), "", f"(broken: {clean(error, 120)})"))
            continue
        expect = data.get("expect")
        minutes = f"{expect['minutes']:g} min" if isinstance(expect, dict) and "minutes" in expect else ""
        rows.append((clean(name), minutes, clean(data.get("about", ""))))
    print("\n".join(table(rows)) or "no recipes are installed")
    _mention_problems()


def list_pieces() -> None:
    """Every piece by kind."""
    found = registry()
    for kind in dict.fromkeys(spec.kind for spec in found.all()):
        print(f"{kind}:")
        print("\n".join(table([(spec.name, spec.source, clean(spec.about)) for spec in found.all(kind)])))
    _mention_problems()


def _mention_problems() -> None:
    count = len(registry().problems)
    if count:
        print(f"limbeck: {count} problem(s) with plugins; see `limbeck plugins`", file=sys.stderr)


def show(name: str, sets: Sequence[str]) -> None:
    """What a recipe does, and every resolved key."""
    recipe = recipes.load(name, sets)
    print(f"{recipe.name}: {recipe.about}")
    if recipe.paper:
        print(f"paper: {recipe.paper}")
    if recipe.expect:
        print(f"expected on two CPU cores: {recipe.expect.minutes:g} min, {recipe.expect.memory_gb:g} GB")
    print(f"\n{inputs_help(name)}\n\nAll keys, for --set KEY=VALUE:")
    data = yamlio.parse(recipes.dump(recipe), name).data
    told = ("name", "about", "paper", "inputs", "expect")
    keys = yamlio.dump({key: value for key, value in data.items() if key not in told and value is not None})
    print("\n".join(f"  {line}" for line in keys.splitlines()))


def list_runs(out: Path) -> None:
    """Every run folder below `out`: recipe, last step, state, when."""
    rows = []
    for path in sorted(out.rglob("recipe.yaml")) if out.is_dir() else []:
        folder, last = path.parent, last_numbers(path.parent)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        states = {"error.txt": "failed", "eval.json": "evaluated"}
        done = next((state for name, state in states.items() if (folder / name).exists()), "")
        rows.append((str(folder), f"step {last.get('step', 0)}", clean(last.get("stage", "")), done, when))
    print("\n".join(table(rows)) or f"no runs below {out}; start one with `limbeck run RECIPE`")


def run_data(folder: Path) -> dict[str, Any]:
    """The recipe of a run folder as plain data."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise BadInput(f"{clean(folder)} is not a run folder (it has no recipe.yaml); `limbeck runs` lists them")
    data = yamlio.parse(yamlio.read(path), str(path)).data
    if not isinstance(data, dict):
        raise BadInput(f"{clean(path)}:1: must be a mapping; restore the file or start the run again")
    return data


def last_numbers(folder: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    for line in reversed(path.read_text("utf-8", "replace").splitlines() if path.exists() else []):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def compare(first: Path, second: Path) -> None:
    """The keys, numbers and evaluations in which two runs differ."""
    a, b = flatten(run_data(first)), flatten(run_data(second))
    _differences("recipe", a, b, first, second, only_different=True)
    _differences("last numbers", last_numbers(first), last_numbers(second), first, second)
    _differences("evaluation", _evaluation(first), _evaluation(second), first, second)


def _evaluation(folder: Path) -> dict[str, Any]:
    path = folder / "eval.json"
    try:
        return flatten(json.loads(path.read_text())) if path.exists() else {}
    except ValueError:
        raise BadInput(f"{clean(path)}: not valid JSON; write it anew with `limbeck eval {clean(folder)}`") from None


def flatten(data: Any, above: str = "") -> dict[str, Any]:
    """Nested data as dotted keys."""
    if not isinstance(data, dict | list):
        return {above: data}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return {
        key: v for name, value in items for key, v in flatten(value, f"{above}.{name}" if above else str(name)).items()
    }


def _differences(
    title: str, a: dict[str, Any], b: dict[str, Any], first: Path, second: Path, only_different: bool = False
) -> None:
    keys = [key for key in {**a, **b} if not only_different or a.get(key) != b.get(key)]
    print(f"{title}:" if keys else f"{title}: the same" if only_different else f"{title}: none")
    rows = [(key, _short(a.get(key)), _short(b.get(key))) for key in keys]
    print("\n".join(table([("", str(first), str(second)), *rows] if rows else [])), end="\n" if rows else "")


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else clean(value, 40)


def resume(
    folder: Path, device: str | None, processes: int, programs: Sequence[str] = (), addresses: Sequence[str] = ()
) -> int:
    """Go on from the last checkpoint."""
    run_data(folder)
    recipe = recipes.load(str(folder / "recipe.yaml"))
    outside_of(recipe, programs, addresses)
    if processes > 1 and recipe.job != "table":
        from limbeck.core.run import distributed

        extra = ["--device", device] if device else []
        extra += outside.arguments(programs, addresses)
        return distributed.launch(["resume", str(folder), *extra], processes)
    from limbeck.core.run import job

    return job.run(recipe, folder, device=device, resume=True, at_once=processes)


def _opened(folder: Path, device: str | None) -> Any:
    run_data(folder)
    recipe = recipes.load(str(folder / "recipe.yaml"))  # a broken one is refused before torch is imported
    if recipe.job == "table":
        raise BadInput(
            f"{clean(folder)} holds several runs; name one of them, such as {folder}/rows/{recipe.rows[0].label}"
        )
    from limbeck.core.run import job

    return job.open_run(folder, device)


def sample(
    folder: Path, prompts: list[str], which: str | None, steps: int | None, guidance: float | None, seed: int,
    out: Path | None, device: str | None,
) -> None:  # fmt: skip
    """Sample from the run's models and print the files written."""
    if which not in (None, "student", "teacher"):
        raise BadInput(
            f"--which {clean(which)}: must be student or teacher{did_you_mean(which, ('student', 'teacher'))}"
        )
    if guidance is not None and not math.isfinite(guidance):
        raise BadInput(f"--guidance {guidance}: must be a finite number")
    build = _opened(folder, device)
    which = which or ("student" if build.has("student") else "teacher")
    space = build.piece("space")
    prompts = prompts or list(build.recipe.sample.prompts)
    if not prompts and hasattr(space, "subject"):  # a run that makes one thing knows what
        prompts = [space.subject(build)]
    if not prompts:
        raise BadInput('this recipe has no sample prompts; give one with --prompt "…"')
    place = out or folder / "samples" / "prompts"
    _print_paths(space.sample(build, prompts, seed, place, which=which, steps=steps, guidance=guidance))


def evaluate(folder: Path, device: str | None, programs: Sequence[str] = (), addresses: Sequence[str] = ()) -> None:
    """Run the recipe's metrics, keep them in eval.json and print the tables."""
    outside.take(programs, addresses)
    build = _opened(folder, device)
    if not build.recipe.eval:
        raise BadInput("this recipe names no metrics; add some under eval:")
    from limbeck.core.run import job, report
    from limbeck.core.run.metrics import Progress

    build.note = progress = Progress()
    tables = job.evaluate(build)
    progress.clear()
    for name, rows in tables.items():
        print(f"{name}:")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print("\n".join(table([columns, *([_short(row.get(key)) for key in columns] for row in rows)])))
    print(report.write(folder))


def serve_reward(name: str, sets: Sequence[str], host: str, port: int, device: str | None) -> None:
    """Answer until a signal comes; the address is the first line printed."""
    registry().get("reward", name)
    both = {split: [{"kind": name}] for split in ("train", "held_out")}
    data = {"name": "reward-server", "job": "sample", "steps": 1, "batch": 1, "rewards": both}
    both_sets = [f"rewards.{split}.0.{item}" for split in both for item in sets]
    recipe = recipes.of(data, both_sets, f"reward {clean(name, 60)}")
    from limbeck.core.rewards.base import as_reward
    from limbeck.core.rewards.remote import Server
    from limbeck.core.run.build import Build
    from limbeck.core.run.distributed import Team

    build = Build(recipe, Team(device).device)
    with Server(as_reward(build.piece("rewards.train.0"), name), host, port) as server:
        print(f"{name} at {server.address}", flush=True)
        server.serve_forever()


def export(folder: Path, format: str, out: Path | None, device: str | None) -> None:
    """Write the student in one of the space's formats, or with an exporter of that name."""
    build = _opened(folder, device)
    space, exporters = build.piece("space") if build.has("space") else None, registry().specs
    own = space.formats if space else ()
    known = [*own, *(name for kind, name in exporters if kind == "exporter")]
    if format not in known:
        raise BadInput(f"--format {clean(format)}: must be one of {', '.join(known)}{did_you_mean(format, known)}")
    path = out or folder / "exports" / format
    path.parent.mkdir(parents=True, exist_ok=True)
    if space and format in own:
        return _print_paths(space.export(build, path, format))
    write = registry().load(exporters["exporter", format])
    _print_paths(write(build, path))


def _print_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        print(path)


def view(folder: Path, port: int) -> None:
    """Serve a run's page until a signal comes; print its address, and open it where there is a screen."""
    run_data(folder)
    from limbeck.core.run.view import Server

    with Server(folder, port) as server:
        print(f"{server.address} shows {clean(folder)}; Ctrl-C ends it", flush=True)
        if sys.stdout.isatty() and (
            sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        ):
            import webbrowser

            webbrowser.open(server.address)
        server.serve_forever()


def build_asset(name: str) -> None:
    """Build one embedded data set."""
    found = registry()
    found.load(found.get("asset", name))()


def list_plugins() -> None:
    """Each plugin with its version and pieces, then every problem; nothing is imported."""
    found = registry()
    for plugin in found.plugins:
        pieces = [f"{spec.kind} {spec.name}" for spec in found.all() if spec.source == plugin.name]
        pieces += [f"recipe {name}" for name in found.recipes if name.startswith(f"{plugin.name}/")]
        print(f"{plugin.name} {plugin.version} ({plugin.package}): {', '.join(pieces) or 'nothing'}")
    for problem in found.problems:
        print(f"problem: {problem.source}: {problem.message}")
    if not found.plugins and not found.problems:
        print("no plugins are installed; `limbeck new-plugin NAME` writes one")
