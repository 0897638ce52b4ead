"""Several processes: who we are, averaging gradients, sharding parameters, starting the processes.

There is no DDP wrapper: DDP hooks one module's forward and expects each of its parameters in every backward, while a
step here runs several nets whose gradients are switched on and off by phase. So each phase's gradients are averaged in
one flat all-reduce after its backward, and `fully_shard` is called by us (accelerate refuses it for several models).
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player

CALLED = ("sample", "denoise", "rollout", "predict")  # methods other than forward that may be called on a sharded net
PATIENCE = timedelta(days=1)  # others wait while the first process samples and evaluates; torchrun ends them if it dies
GRACE_SECONDS = 600  # to finish a step and write a checkpoint once a signal has come


class Team:
    """This process among the others: device, precision, collectives. One process needs no process group."""

    def __init__(self, device: str | None = None, precision: str = "fp32", shard: bool = False) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs

        cpu = device == "cpu" or not _has_accelerator()
        if device not in (None, "cpu") and (cpu or not _works(device)):
            raise BadInput(f'device "{device}" is not there; use --device cpu or leave it out')
        if precision == "fp16" and cpu:
            raise BadInput("precision: fp16 needs a GPU; use precision: bf16 or fp32 on the CPU")
        AcceleratorState._reset_state()  # it remembers the last run's precision
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        kind = "no" if precision == "fp32" else precision
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=kind, kwargs_handlers=[patience])
        self.device = torch.device(device) if device and not cpu and self.size == 1 else self.accelerator.device
        self.precision, self.shard = precision, shard
        if shard and self.size == 1:
            raise BadInput("distributed.shard needs several processes; start with --processes N or set it to false")

    @property
    def rank(self) -> int:
        """0 for the process that writes."""
        return int(self.accelerator.process_index)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return int(self.accelerator.num_processes)

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision inside, when the recipe asks for it."""
        return contextlib.nullcontext() if self.precision == "fp32" else self.accelerator.autocast()

    def mean_gradients(self, params: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Average the gradients over the processes in place (one flat all-reduce per dtype); returns the mean loss.

        All processes trace the same graph, so the same parameters have gradients everywhere. Sharded parameters were
        averaged by their reduce-scatter already. The loss travels along, so that a NaN of one process stops all.
        """
        if self.size == 1:
            return loss
        grads = [p.grad for p in params if p.grad is not None and not hasattr(p.grad, "full_tensor")]
        mean = loss.detach().clone().reshape(1)
        for dtype in sorted({g.dtype for g in grads} | {mean.dtype}, key=str):  # the same order everywhere
            group = [g for g in grads if g.dtype == dtype] + ([mean] if mean.dtype == dtype else [])
            flat = torch.cat([g.reshape(-1) for g in group])
            dist.all_reduce(flat)
            parts = torch.split(flat / self.size, [g.numel() for g in group])
            torch._foreach_copy_(group, [part.view_as(g) for part, g in zip(parts, group, strict=True)])
        return mean[0]

    def agree(self, value: int) -> int:
        """The largest of all processes' values (a signal may reach them at different steps)."""
        if self.size == 1:
            return value
        box = torch.tensor([value], device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box.item())

    def mean_numbers(self, numbers: dict[str, float]) -> dict[str, float]:
        """Every number averaged over the processes (for the log)."""
        if self.size == 1 or not numbers:
            return numbers
        box = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(box)
        return dict(zip(numbers, (box / self.size).tolist(), strict=True))

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _works(device: str | None) -> bool:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # no such name, no such index, not compiled in
        return False
    return True


def full(tensor: Tensor) -> Tensor:
    """The whole of a (perhaps sharded) tensor; a collective call when it is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def shard(player: Player, team: Team) -> None:
    """Split a player's parameters over the processes (FSDP2): the blocks of its net one by one, then the net.

    A net stays whole between its forward and the end of the phase (`Player.reshard`), because a loss may reach into it
    by other ways than its output: features taken by hooks need the weights in the backward. Gradients, optimiser and
    EMA are sharded throughout.
    """
    if player.module is None:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(team.device.type, (team.size,))
    for body in _bodies(player.module):
        if isinstance(body, FSDPModule):
            continue  # two players may share one net
        for part in (*_blocks(body), body):
            fully_shard(part, mesh=mesh, reshard_after_forward=False)
        for name in CALLED:
            if hasattr(body, name):
                register_fsdp_forward_method(body, name)
    names = set(player.params)
    player.bind({n: p for n, p in player.module.named_parameters() if n in names})
    player.shards = [m for m in player.module.modules() if isinstance(m, FSDPModule)]


def _bodies(module: nn.Module) -> Iterator[nn.Module]:
    """The nets themselves, inside containers and wrappers that own nothing else: who calls a wrapper calls those."""
    children = list(module.children())
    wrapper = len(children) == 1 and not list(module.parameters(recurse=False))
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or wrapper:
        for child in children:
            yield from _bodies(child)
    elif list(module.parameters()):
        yield module


def _blocks(body: nn.Module) -> Iterator[nn.Module]:
    for child in body.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if list(block.parameters()))


def launch(argv: Sequence[str], n: int) -> int:
    """`limbeck ARGV` in n processes through torchrun on a free local port; returns the run's exit code.

    torchrun lives in its own session, so a Ctrl-C reaches the workers once (through it) and not twice.
    """
    if n < 1:
        raise BadInput(f"--processes {n}: must be at least 1")
    options = {
        "nproc-per-node": n,
        "master-addr": "127.0.0.1",
        "master-port": free_port(),
        "shutdown-timeout": GRACE_SECONDS,
    }
    flags = [f"--{key}={value}" for key, value in options.items()]
    start = "from limbeck.core.run.distributed import agent; agent()"
    command = [sys.executable, "-c", start, *flags, "-m", "limbeck", *argv]
    codes: list[int] = []
    stopped = supervise(1, lambda *_: command, lambda _, code: codes.append(code), share=n)
    return stopped or codes[0]


def supervise(
    count: int, command: Callable[[int, int], list[str]], ended: Callable[[int, int], None],
    at_once: int = 1, share: int | None = None, quiet: bool = False,
) -> int:  # fmt: skip
    """Carry out `count` commands, `at_once` at a time, each in a session of its own: 0, or 128 + the signal that came.

    `command(number, place)` is asked when there is a place, `ended(number, exit code)` is told. Each has a `share`-th
    of the cores. The first SIGINT or SIGTERM is passed on to all that run and no other starts; a second one kills.
    """
    threads = str(max(1, (os.cpu_count() or 1) // (share or at_once)))
    env = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # processes must not spin on cores
    out = subprocess.DEVNULL if quiet else None
    running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}  # by place
    caught: list[int] = []

    def forward(number: int, frame: Any) -> None:
        caught.append(number)
        for _, worker in running.values():
            worker.send_signal(number if len(caught) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    waiting = list(range(count))
    try:
        while running or (waiting and not caught):
            for place in set(range(at_once)) - set(running):
                if waiting and not caught:
                    number = waiting.pop(0)
                    worker = subprocess.Popen(command(number, place), env=env, start_new_session=True, stdout=out)
                    running[place] = number, worker
            time.sleep(0.1)
            for place, (number, worker) in list(running.items()):
                if worker.poll() is not None:
                    del running[place]
                    ended(number, int(worker.returncode))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + caught[0] if caught else 0


def agent() -> None:
    """torchrun itself, with the workers' exit code and without its tracebacks."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(sys.argv[1:])
    except SignalException as stop:
        sys.exit(128 + int(stop.sigval))
    except ChildFailedError as failure:
        sys.exit(failure.get_first_failure()[1].exitcode % 256)


def free_port() -> int:
    """A local port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
