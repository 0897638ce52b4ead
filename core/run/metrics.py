"""What a run says: metrics.jsonl, log.txt, a live table on a terminal (plain lines elsewhere), trackers when asked."""

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck.core.run import memory
from limbeck.core.run.errors import BadInput

CPU = torch.device("cpu")


class Progress:
    """What is being done now: in place on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self._width, self._last = quiet, 0, time.perf_counter()

    def __call__(self, line: str) -> None:
        """Show a line in the place of the one before."""
        terminal, now = sys.stdout.isatty(), time.perf_counter()
        if self.quiet or now - self._last < (0.1 if terminal else 10):
            return
        self._last = now
        print(f"\r{line:<{self._width}}" if terminal else line, end="" if terminal else "\n", flush=True)
        self._width = len(line) if terminal else 0

    def clear(self) -> None:
        """Make room for a lasting line."""
        if self._width:
            print("\r" + " " * self._width, end="\r", flush=True)
            self._width = 0


class Metrics:
    """One writer per run (the first process); `quiet` keeps the terminal still."""

    def __init__(self, folder: Path, device: torch.device = CPU, *, quiet: bool = False, writes: bool = True) -> None:
        self.folder, self.device, self.writes, self.quiet = folder, device, writes, quiet or not writes
        self.stage, self.steps, self._from = "", 0, 0
        self.progress = Progress(self.quiet)
        self._live: Any = None
        self._trackers: list[Any] = []
        self._began = self._since = time.perf_counter()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.stop_live()
        for tracker in self._trackers:
            tracker.finish()

    def track(self, names: Sequence[str], config: dict[str, Any]) -> None:
        """Start the trackers that the recipe asks for: a project a recipe, an entry a run, files in its folder."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        project, run = str(config["recipe"]).replace("/", "-"), {"name": self.folder.name}
        places: dict[str, tuple[str, dict[str, str]]] = {
            "tensorboard": ("tensorboard", {"logging_dir": str(self.folder)}),
            "trackio": (project, run),
            "wandb": (project, {**run, "dir": str(self.folder)}),
        }
        for name in names if self.writes else []:
            if importlib.util.find_spec(name) is None:
                raise BadInput(f"track: {name} is not installed; run `pip install 'limbeck[logging]'` or drop it")
            title, where = places[name]
            tracker = LOGGER_TYPE_TO_CLASS[name](title, **where)
            try:
                tracker.start()
                tracker.store_init_configuration(config)
            except Exception as error:  # its login, its disk, its network
                raise BadInput(f"track: {name} does not start ({_first_line(error)}); mend that or drop it") from error
            self._trackers.append(tracker)

    def begin(self, stage: str, step: int, steps: int, before: list[str]) -> None:
        """A stage starts after `step` steps: later rows, left by an interrupted run, are dropped."""
        self.stage, self.steps, self._from = stage, steps, step
        self._since = time.perf_counter()
        if self.writes:
            spent = truncate(self.folder / "metrics.jsonl", stage, step, before)
            self._began = min(self._began, self._since - spent)

    def row(self, step: int, numbers: dict[str, float]) -> None:
        """One line of numbers; `time` (seconds since the start) is the only key that differs between equal runs."""
        now = time.perf_counter()
        if not self.writes:
            return
        line = {"stage": self.stage, "step": step, **numbers, "time": round(now - self._began, 3)}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self._trackers:
            tracker.log(numbers, step=step)
        self._show(step, numbers, (now - self._since) / max(1, step - self._from))

    def say(self, line: str) -> None:
        """One line for log.txt and, unless quiet, for the terminal."""
        if self.writes and self.folder.is_dir():
            with contextlib.suppress(OSError), (self.folder / "log.txt").open("a") as file:  # a full disk: still say it
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self.progress.clear()
        if not self.quiet:
            print(line, flush=True)

    def stop_live(self) -> None:
        """Leave the table as it stands."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, step: int, numbers: dict[str, float], seconds: float) -> None:
        speed = {"it/s": f"{1 / max(seconds, 1e-9):.2f}", "memory": f"{memory.now(self.device) / 1e9:.2f} GB"}
        facts = {**speed, "ETA": memory.clock((self.steps - step) * seconds)}
        if self.quiet:
            return
        if not sys.stdout.isatty():
            losses = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items() if _main(key))
            print(f"{self.stage} {step}/{self.steps}  {losses}  " + "  ".join(map(" ".join, facts.items())), flush=True)
            return
        from rich.live import Live

        if self._live is None:
            self._live = Live(auto_refresh=False)
            self._live.start()
        self._live.update(_table(f"{self.stage} {step}/{self.steps}", numbers, facts), refresh=True)


def truncate(path: Path, stage: str, step: int, before: list[str]) -> float:
    """Keep the whole rows of the stages before, and this stage's up to `step`; the last one's time."""
    if not path.exists():
        return 0.0
    rows = [row for row in map(_row, path.read_text("utf-8", "replace").splitlines()) if row]
    kept = [
        r for r in rows if r.get("stage") in before or (r.get("stage") == stage and r.get("step", step + 1) <= step)
    ]
    temporary = path.with_name(".metrics.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(temporary, path)
    return float(kept[-1].get("time", 0.0)) if kept else 0.0


def _row(line: str) -> dict[str, Any]:
    """Half a line, left by a crash, is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _main(key: str) -> bool:
    return key.startswith(("loss/", "reward/")) or key in ("held_out", "gap", "kl")


def _table(title: str, numbers: dict[str, float], facts: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("  ".join(f"[bold]{key}[/] {value}" for key, value in facts.items()))
    table.add_row("  ".join(f"{key} [bold]{value:.4g}[/]" for key, value in numbers.items() if _main(key)))
    table.add_row("  ".join(f"{key} {value:.4g}" for key, value in numbers.items() if not _main(key)))
    return table
