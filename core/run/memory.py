"""How much memory and time a run will take, from three real steps on a throw-away copy; advice when memory ends."""

import ctypes
import gc
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from limbeck.core.run.errors import LimbeckError
from limbeck.core.run.players import Player
from limbeck.core.run.recipe import Recipe
from limbeck.core.run.trainer import Trainer


@dataclass(frozen=True)
class Estimate:
    """Bytes above the interpreter's baseline at the peak of training, their larger parts, and seconds a step."""

    peak: int
    parts: dict[str, int]
    seconds: float
    steps: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items())
        total = f"{clock(self.seconds * self.steps)} for {self.steps} steps of {self.seconds:.3f} s"
        return f"estimate: {self.peak / 1e9:.2f} GB of memory ({parts}), {total} (sampling and metrics not counted)"


def measure(trainer: Trainer, baseline: int) -> Estimate:
    """Three timed steps: two in which every player is due (the first one warms up) and one between them.

    The trainer is spent afterwards: build it again for the run itself.
    """
    period = max([player.config.every for player in trainer.objective.players.values()], default=1)
    first = trainer.steps // 2 // period * period  # warm-ups are over by then
    device, players = trainer.team.device, list(trainer.objective.players.values())
    reset_peak(device)
    seconds = []
    for step in (first, first, first + 1):
        trainer.step = step
        began = time.perf_counter()
        trainer.one_step()
        trainer.numbers()  # waits for the device
        seconds.append(time.perf_counter() - began)
    _, full, light = seconds
    peak = max(0, highest(device) - baseline)
    return Estimate(peak, _parts(players, peak), _mean(full, light, period), trainer.steps)


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _mean(full: float, light: float, period: int) -> float:
    return (full + light * (period - 1)) / period if period > 1 else (full + light) / 2


def _parts(players: list[Player], peak: int) -> dict[str, int]:
    def size(*kinds: str) -> int:
        states = [player.state() for player in players]
        return sum(t.numel() * t.element_size() for s in states for key, t in s.items() if key.startswith(kinds))

    parts = {"trained weights": size("param/"), "gradients": size("param/"), "optimiser": size("optim/")}
    parts["EMA"] = size("ema/")
    return parts | {"frozen weights, activations and the rest": max(0, peak - sum(parts.values()))}


def now(device: torch.device) -> int:
    """Bytes held: on the GPU if that is the device, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return _status("VmRSS") or highest(device)


def highest(device: torch.device) -> int:
    """The largest number of bytes held since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Start measuring the peak anew (where the system lets us)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak since the start of the process is measured then


def release() -> None:
    """Give freed memory back to the system, so that the throw-away copy does not count."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def advice(recipe: Recipe, where: str) -> LimbeckError:
    """Out of memory, with the keys to change."""
    parts = next((n for n in range(recipe.accumulate + 1, recipe.batch + 1) if recipe.batch % n == 0), None)
    keys = [f"--set accumulate={parts} (the same batch in {parts} parts)"] if parts else []
    keys += [f"--set batch={max(1, recipe.batch // 2)} (now {recipe.batch})"]
    keys += ["--set precision=bf16 (now fp32)"] if recipe.precision == "fp32" else []
    keys += ["--processes N with --set distributed.shard=true"] if not recipe.distributed.shard else []
    return LimbeckError(f"out of memory {where}; try {', or '.join(keys)}")
