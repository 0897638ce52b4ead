"""A run as one self-contained page: opens offline, loads nothing from elsewhere, runs no script, escapes everything."""

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.core.run import plot, yamlio
from limbeck.core.run.errors import BadInput

MAX_MEDIA = 15 * 2**20  # bytes of pictures and clips in one page
MAX_WIDTH, MAX_SHEETS, MAX_PANELS = 1600, 8, 18
PLAYABLE = {".gif": "image/gif", ".webp": "image/webp", ".mp4": "video/mp4", ".webm": "video/webm"}
STEP = re.compile(r"step-(\d+)")


def write(folder: Path) -> Path:
    """Write `report.html` for this run folder from whatever it holds so far."""
    path = folder / "report.html"
    path.write_text(page(folder), encoding="utf-8")
    return path


def page(folder: Path) -> str:
    """The report as HTML."""
    raw = recipe_of(folder)
    name, budget = str(raw.get("name", folder.name)), _Budget(MAX_MEDIA)
    sections = [
        _failure(folder),
        _samples(folder, budget),
        _clips(folder, budget),
        _evaluation(folder),
        _curves(folder),
        _repeat(folder, raw),
        _text("Recipe", text_of(folder / "recipe.yaml"), "every key of this run, defaults included"),
        _environment(folder),
    ]
    parts = {"title": html.escape(f"{name} · {folder.name}"), "head": _head(folder, raw, name)}
    parts["body"] = "\n".join(filter(None, sections))
    template = Path(__file__).with_name("page.html").read_text("utf-8")
    return re.sub("<!--(title|head|body)-->", lambda found: parts[found[1]], template)


def text_of(path: Path) -> str:
    """A file's text; nothing where there is no such file."""
    return path.read_text("utf-8", "replace") if path.is_file() else ""


def recipe_of(folder: Path) -> dict[str, Any]:
    """The run's recipe as plain data; empty where it cannot be read."""
    try:
        data = yamlio.parse(text_of(folder / "recipe.yaml"), "recipe.yaml").data
    except BadInput:
        return {}
    return data if isinstance(data, dict) else {}


def json_of(path: Path) -> Any:
    """What a JSON file holds; None where it cannot be read."""
    try:
        return json.loads(text_of(path) or "null")
    except ValueError:
        return None


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    out = []
    for line in text_of(folder / "metrics.jsonl").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            out.append(row)
    return out


def _head(folder: Path, raw: dict[str, Any], name: str) -> str:
    curves, _ = series(rows_of(folder))
    environment = json_of(folder / "environment.json") or {}
    facts = {
        "steps": int(max(one.xs[-1] for one in curves)) if curves else None,
        "batch": raw.get("batch"),
        "seed": raw.get("seed"),
        "device": environment.get("device") if isinstance(environment, dict) else None,
        "limbeck": environment.get("limbeck") if isinstance(environment, dict) else None,
    }
    items = "".join(
        f"<div><dt>{k}</dt><dd>{html.escape(cell(v))}</dd></div>" for k, v in facts.items() if v is not None
    )
    paper = f'<p class="paper">{html.escape(str(raw["paper"]))}</p>' if raw.get("paper") else ""
    about = html.escape(str(raw.get("about", "")))
    run = html.escape(folder.name)
    return (
        f'<p class="run">run {run}</p><h1>{html.escape(name)}</h1><p class="about">{about}</p>{paper}<dl>{items}</dl>'
    )


def _section(title: str, body: str, note: str = "", style: str = "") -> str:
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'<section class="{style}"><h2>{html.escape(title)}</h2>{note}{body}</section>'


def _text(title: str, text: str, note: str = "") -> str:
    return _section(title, f"<pre>{html.escape(text)}</pre>", note) if text.strip() else ""


def _failure(folder: Path) -> str:
    """What went wrong, from error.txt; absent when nothing did."""
    text = text_of(folder / "error.txt").strip()
    if not text:
        return ""
    after = f"Once that is mended, go on from the last checkpoint: limbeck resume {folder}"
    return _section("This run stopped", f"<pre>{html.escape(text)}</pre>", after, "failure")


# Pictures and clips


def _samples(folder: Path, budget: "_Budget") -> str:
    """The last sheet large, earlier ones in a row below (a table's sheets all large), within the page's budget."""
    media = sorted((folder / "samples").glob("*")) if (folder / "samples").is_dir() else []
    media = [path for path in media if path.suffix.lower() in {".png", ".jpg", ".jpeg", *PLAYABLE}]
    sheets = [path for path in media if path.name.startswith("step-")]
    if not sheets:
        figures = "".join(f'<div class="sheet">{_figure(path, budget, MAX_WIDTH)}</div>' for path in media)
        return _section("Samples", figures) if figures else ""
    last = sheets[-1]
    big = _figure(last, budget, MAX_WIDTH)
    early = [_figure(path, budget, 720) for path in _spread(sheets[:-1], MAX_SHEETS - 1)]
    strip = f'<div class="strip">{"".join(early)}</div>' if any(early) else ""
    return _section("Samples", f'<div class="sheet">{big}</div>{strip}', "the same noise and prompts at every step")


def _clips(folder: Path, budget: "_Budget") -> str:
    """What moves among the exports: turntables, videos."""
    found = [path for path in sorted((folder / "exports").rglob("*")) if path.suffix.lower() in PLAYABLE]
    figures = "".join(_figure(path, budget, MAX_WIDTH) for path in found[:MAX_SHEETS])
    return _section("Clips", f'<div class="strip">{figures}</div>') if figures else ""


class _Budget:
    """Bytes that media may still take."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, size: int) -> bool:
        if size > self.left:
            return False
        self.left -= size
        return True


def _spread(items: Sequence[Path], count: int) -> list[Path]:
    """At most `count` items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _figure(path: Path, budget: _Budget, width: int) -> str:
    mime, data = _media(path, width)
    if not budget.take(len(data) * 4 // 3):
        return ""
    found = STEP.search(path.name)
    label = html.escape(f"step {int(found.group(1)):,}" if found else path.stem)
    source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    video = mime.startswith("video/")
    tag = f'<video controls loop muted src="{source}"></video>' if video else f'<img alt="{label}" src="{source}">'
    return f"<figure>{tag}<figcaption>{label}</figcaption></figure>"


def _media(path: Path, width: int) -> tuple[str, bytes]:
    """Moving media as they are; pictures no wider than `width`, as WebP where that is smaller."""
    data = path.read_bytes()
    if path.suffix.lower() in PLAYABLE:
        return PLAYABLE[path.suffix.lower()], data
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as picture:
            return _shrunk(picture.convert("RGB"), data, width, path.suffix.lower())
    except (UnidentifiedImageError, OSError, ValueError):
        return "image/png", b""


def _shrunk(picture: Any, data: bytes, width: int, suffix: str) -> tuple[str, bytes]:
    if picture.width <= width and len(data) <= 2**18:
        return ("image/png" if suffix == ".png" else "image/jpeg"), data
    if picture.width > width:
        picture = picture.resize((width, max(1, round(picture.height * width / picture.width))))
    box = io.BytesIO()
    picture.save(box, "WEBP", quality=90)
    return "image/webp", box.getvalue()


# Numbers


def series(rows: Sequence[dict[str, Any]]) -> tuple[list[plot.Series], list[float]]:
    """The finite numbers of metrics.jsonl by name over the run's steps, and where each later stage starts."""
    xs: dict[str, list[float]] = {}
    ys: dict[str, list[float]] = {}
    offset, last, stage, starts = 0.0, 0.0, None, []
    for row in rows:
        if stage is not None and row.get("stage") != stage:
            offset = last
            starts.append(offset)
        stage, last = row.get("stage"), offset + _number(row.get("step"))
        for name, value in _numbers(row):
            xs.setdefault(name, []).append(last)
            ys.setdefault(name, []).append(value)
    return [plot.Series(name, xs[name], ys[name]) for name in sorted(xs, key=_rank)], starts


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _numbers(row: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{above}{key}/")
        elif key not in ("step", "stage", "time") and type(value) in (int, float) and math.isfinite(value):
            yield above + key, float(value)


def _rank(name: str) -> tuple[int, str]:
    order = ("loss", "reward", "held", "gap", "eval")
    place = next((i for i, word in enumerate(order) if name.startswith(word)), len(order))
    return (len(order) + 1 if name.startswith(("lr/", "norm/", "time", "memory", "it/")) else place, name)


def _curves(folder: Path) -> str:
    found, starts = series(rows_of(folder))
    if not found:
        return ""
    panels = [plot.panel(one, starts) for one in found]
    body = f'<div class="panels">{"".join(panels[:MAX_PANELS])}</div>'
    if len(panels) > MAX_PANELS:
        rest = "".join(panels[MAX_PANELS:])
        body += f'<details><summary>{len(panels) - MAX_PANELS} more</summary><div class="panels">{rest}</div></details>'
    stages = "; dotted lines: a new stage begins" if starts else ""
    return _section("Curves", body, f"thin: every logged value; bold: running mean{stages}")


def _evaluation(folder: Path) -> str:
    parts = [_table(name, rows) for name, rows in tables(folder).items()]
    return _section("Evaluation", "".join(parts)) if parts else ""


def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each metric in eval.json, `{metric: [row, …]}` (or one list of rows)."""
    data = json_of(folder / "eval.json")
    named = {"": data} if isinstance(data, list) else data if isinstance(data, dict) else {}
    lists = {str(name): rows for name, rows in named.items() if isinstance(rows, list)}
    found = {name: [row for row in rows if isinstance(row, dict)] for name, rows in lists.items()}
    return {name: rows for name, rows in found.items() if rows}


def _table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in columns)
    body = "".join("<tr>" + "".join(_td(row.get(column)) for column in columns) + "</tr>" for row in rows)
    caption = f"<caption>{html.escape(name)}</caption>" if name else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _td(value: Any) -> str:
    style = ' class="num"' if isinstance(value, int | float) else ""
    return f"<td{style}>{html.escape(cell(value))}</td>"


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return plot.number(value) if isinstance(value, float) and math.isfinite(value) else f"{value}"


def _repeat(folder: Path, raw: dict[str, Any]) -> str:
    """The exact commands: the same run again, going on with it, and using it."""
    environment = json_of(folder / "environment.json") or {}
    given = environment.get("command") if isinstance(environment, dict) else None
    lines = [f"# as it was started\n{given}"] if isinstance(given, str) and given else []
    lines.append(
        f"# the same run again, from its resolved recipe (below)\nlimbeck run {folder}/recipe.yaml --name again"
    )
    lines.append(f"# go on with it, look at it\nlimbeck resume {folder}\nlimbeck view {folder}")
    if raw.get("job") != "table":  # its rows have pages of their own
        prompts = raw.get("sample", {}).get("prompts") if isinstance(raw.get("sample"), dict) else None
        prompt = f" --prompt {json.dumps(str(prompts[0]), ensure_ascii=False)}" if prompts else ""
        lines.append(f"# measure it, sample from it\nlimbeck eval {folder}\nlimbeck sample {folder}{prompt}")
    text = "\n\n".join(lines)
    return _text(
        "Repeat it", text, "the same versions (see Environment) on the same kind of device give the same numbers"
    )


def _environment(folder: Path) -> str:
    data = json_of(folder / "environment.json")
    if not isinstance(data, dict) or not data:
        return ""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in flat(data))
    return _section("Environment", f'<div class="wide"><table class="plain"><tbody>{rows}</tbody></table></div>')


def flat(data: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested data as names and what a table shows."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key} · ")
        else:
            yield f"{above}{key}", cell(value) if not isinstance(value, list) else ", ".join(map(str, value))
