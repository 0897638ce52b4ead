"""`python ARGS` in real processes that start in milliseconds: forked from a server in which the imports are done.

The server is a fresh interpreter (multiprocessing's forkserver), not the tests' process, so a child knows nothing of
what they have loaded, patched or trained. What a test says about imports themselves needs `sys.executable` instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOAD = ("limbeck.verbs", "limbeck.core.run.job", "torch._dynamo", "torch.distributed.fsdp", "accelerate", "PIL")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*PRELOAD, "pytest"])  # the last is the parent's main module, which children import


def child(words: Sequence[str], env: Mapping[str, str], cwd: Path, out: Path, err: Path) -> None:
    """What an interpreter does with these words (-m MODULE or a file, then arguments)."""
    import torch

    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    module = words[0] == "-m"
    sys.argv = list(words[module:])
    before = "" if module else str(Path(words[0]).parent)
    sys.path[:0] = [before, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()


class Child:
    """A running process; the methods of `subprocess.Popen` that tests use."""

    def __init__(self, words: Sequence[object], env: Mapping[str, str], cwd: Path, folder: Path) -> None:
        self.args, self.out, self.err = [str(word) for word in words], folder / "out", folder / "err"
        for path in (self.out, self.err):
            path.touch()
        if self.args[0] == "-c":  # as a file
            code = folder / "code.py"
            code.write_text(self.args[1])
            self.args[:2] = [str(code)]
        order = (self.args, dict(env), cwd, self.out, self.err)
        self.process = CONTEXT.Process(target=child, args=order, daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """The exit status, minus the signal that killed it; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float = 120) -> int:
        """The exit status at the end; a process that takes longer is killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, self.out.read_bytes(), self.err.read_bytes())
        return self.process.exitcode

    def ended(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """The exit status and all that was said."""
        return subprocess.CompletedProcess(self.args, self.wait(timeout), self.out.read_text(), self.err.read_text())

    def line(self, timeout: float = 60) -> str:
        """The first line that it says; empty when it ends without one."""
        end = time.monotonic() + timeout
        while "\n" not in (said := self.out.read_text()) and self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        return said.partition("\n")[0]

    def send_signal(self, number: int) -> None:
        """One of `signal.SIG…`."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)


class Python:
    """Starts processes; what they say is kept in files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def start(self, words: Sequence[object], env: Mapping[str, str] | None = None, cwd: Path = Path()) -> Child:
        """A process that runs beside the test; the environment is this one's unless given."""
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        return Child(words, os.environ if env is None else env, cwd.resolve(), folder)

    def run(self, words: Sequence[object], check: bool = False, timeout: float = 120, **more: Any) -> Ended:
        """A process, ended; `check` refuses any status but 0."""
        done = self.start(words, **more).ended(timeout)
        assert not check or done.returncode == 0, done.stderr
        return done

    def team(self, words: Sequence[object], size: int = 2, env: Mapping[str, str] | None = None) -> list[Ended]:
        """`size` processes with the environment that torchrun gives its workers, ended; all must end with 0."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
        base = dict(os.environ if env is None else env) | place
        members = [self.start(words, {**base, "RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(size)]
        found = [member.ended() for member in members]
        assert all(one.returncode == 0 for one in found), "".join(one.stderr[-2000:] for one in found)
        return found


Ended = subprocess.CompletedProcess[str]
