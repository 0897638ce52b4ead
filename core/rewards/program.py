"""A reward that is the user's own program: a folder of samples in, one number a line out.

The folder holds the samples in the file form of the recipe's space and `prompts.jsonl`, a JSON object a sample; the
command gets its path as the last argument. No shell is involved, time and output are bounded.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from limbeck.core.rewards import config as settings
from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.rewards.files import Files, files
from limbeck.core.run import outside
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, LimbeckError, clean

LINE = 64  # bytes of output a number, at most, on average
SLACK = 4096  # bytes besides


def build(config: settings.Program, build: Build) -> Reward:
    """Factory of the reward program; the command is looked up when samples come."""
    form = files(build)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        command = outside.programs().get(config.name)
        if command is None:
            raise outside.missing("program", config.name)
        values = judged(command, x, cond, form, config)
        return torch.tensor(values, dtype=torch.float32, device=x.device)

    return Reward(score, f"program {config.name}", chunk=config.chunk)


def judged(command: list[str], x: Tensor, cond: Condition, form: Files, config: settings.Program) -> list[float]:
    """What the program says of samples x [B,*S]; LimbeckError when it fails or gives anything but B numbers."""
    with tempfile.TemporaryDirectory(prefix="limbeck-") as place:
        folder = Path(place)
        form.write(x.detach(), folder)
        (folder / "prompts.jsonl").write_text("".join(rows(cond, len(x))), encoding="utf-8")
        text = answer([*command, place], config.timeout, LINE * len(x) + SLACK, config.name)
    return numbers(text, len(x), config.name)


def rows(cond: Condition, count: int) -> list[str]:
    """The condition as JSON lines, one a sample."""
    columns = {key: value.tolist() if isinstance(value, Tensor) else list(value) for key, value in cond.items()}
    objects = [{key: column[i] for key, column in columns.items()} for i in range(count)]
    return [json.dumps(one, ensure_ascii=False) + "\n" for one in objects]


def answer(command: list[str], timeout: float, limit: int, name: str) -> str:
    """The program's standard output; LimbeckError when it fails, is late or says more than `limit` bytes.

    It runs in a session of its own: Ctrl-C lets a step finish, and all that it started ends with it when it is stopped.
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise BadInput(f"the reward program {name} cannot be started ({error.strerror})") from None
    with process:
        try:
            out, said = _read(process, time.monotonic() + timeout, limit)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise _failed(name, f"took longer than {timeout:g} s; set its timeout") from None
            if isinstance(error, OverflowError):
                raise _failed(name, f"said more than {limit} bytes; print one number a sample") from None
            raise
    if process.returncode:
        last = clean((said.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1], 200)
        raise _failed(name, f"ended with status {process.returncode}: {last}")
    return out.decode(errors="replace")


def _read(process: subprocess.Popen[bytes], deadline: float, limit: int) -> tuple[bytes, bytes]:
    """Both streams until the program ends; of standard error only the end is kept."""
    kept = {"out": b"", "err": b""}
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ, "out")  # type: ignore[arg-type]
        ready.register(process.stderr, selectors.EVENT_READ, "err")  # type: ignore[arg-type]
        while ready.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(process.args, 0)
            for key, _ in ready.select(left):
                data = os.read(key.fd, 65536)
                if not data:
                    ready.unregister(key.fileobj)
                kept[key.data] += data
            kept["err"] = kept["err"][-SLACK:]
            if len(kept["out"]) > limit:
                raise OverflowError
    process.wait(max(0.0, deadline - time.monotonic()))
    return kept["out"], kept["err"]


def numbers(text: str, count: int, name: str) -> list[float]:
    """`count` finite numbers, one a line; LimbeckError otherwise."""
    lines = text.strip().splitlines()
    if len(lines) != count:
        raise _failed(name, f"gave {len(lines)} lines for {count} samples; print one number a sample")
    values = []
    for i, line in enumerate(lines, 1):
        try:
            values.append(float(line))
        except ValueError:
            raise _failed(name, f"gave {clean(line.strip(), 40)} on line {i}; print a number") from None
        if not math.isfinite(values[-1]):
            raise _failed(name, f"gave {clean(line.strip(), 40)} on line {i}; rewards must be finite")
    return values


def _failed(name: str, why: str) -> LimbeckError:
    return LimbeckError(f"the reward program {clean(name, 40)} {why}")
