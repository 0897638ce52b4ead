"""The loop: context, then for each phase loss, backward, guard, after_backward, clip, step, EMA; log, checkpoint."""

import signal
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck.core.run import guard
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team, full, shard
from limbeck.core.run.players import Objective, Phase, Player
from limbeck.core.run.rng import Draws, derive

OnStep = Callable[["Trainer"], None]


@dataclass
class Cadence:
    """What is called after how many steps; a callback sees the trainer with `step` finished steps."""

    log_every: int = 10
    log: Callable[[int, dict[str, float]], None] = lambda step, numbers: None
    save_every: int = 100
    save: OnStep = lambda trainer: None
    sample_every: int = 10**9
    sample: OnStep = lambda trainer: None


class Stopped(Exception):
    """A signal came; the step was finished and a checkpoint written."""

    def __init__(self, number: int) -> None:
        self.number, self.code = number, 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}")


@dataclass
class Trainer:
    """Trains one stage: `step` counts finished steps. Nothing here depends on what is trained.

    An objective may end the stage after a step (`ctx.finish`); `ended` then holds its reason.
    """

    objective: Objective
    team: Team
    seed: int
    stage: str
    steps: int
    batch: int
    cadence: Cadence = field(default_factory=Cadence)
    step: int = 0
    parts: int = 1  # of a batch, one after the other: less memory, the same gradient

    def __post_init__(self) -> None:
        self.pending: dict[str, Tensor | float] = {}
        self.ended = ""  # why the stage ends before its last step
        self.held_out: float | None = None  # the last value logged under this name decides which checkpoint is best
        self.scale = guard.LossScale() if self.team.precision == "fp16" else None
        if self.team.shard:
            for player in self.objective.players.values():
                shard(player, self.team)
        self._on: tuple[str, ...] | None = None
        self._seed = derive(self.seed, self.stage)  # the stages of one run draw apart
        self._stop = 0

    def run(self) -> None:
        """All remaining steps; Stopped after a signal (checkpoint written), NonFinite before a bad update.

        Then no player of the bad phase has changed and nothing is saved: the last good checkpoint stays the newest.
        (Updates of the same step's earlier phases stand in memory: undoing them would cost a copy at every step.)
        """
        c = self.cadence
        with self._signals():
            while self.step < self.steps and not self.ended:
                self.one_step()
                last = self.step == self.steps or bool(self.ended)
                if self.step % c.log_every == 0 or last:
                    c.log(self.step, self.numbers())
                    self.pending.clear()
                stop = self.team.agree(self._stop)
                if self.step % c.save_every == 0 or last or stop:
                    c.save(self)
                if self.step % c.sample_every == 0 or last:
                    c.sample(self)
                if stop:
                    raise Stopped(stop)
        self.toggle(tuple(self.objective.players))

    def one_step(self) -> None:
        """Every phase that has a player due."""
        draws = Draws(self._seed, self.step, self.batch, self.team.rank, self.team.size, self.team.device)
        ctx = Context(self.step, self.stage, draws, self.team.size, self.team.rank, self.team.device, self.parts)
        for phase in self.objective.phases(ctx):
            due = tuple(name for name in phase.players if self.objective.players[name].due(self.step))
            if due:
                self.run_phase(phase, due, ctx)
        self.pending.update(ctx.logged)
        self.ended = ctx.finish
        self.step += 1

    def run_phase(self, phase: Phase, due: tuple[str, ...], ctx: Context) -> None:
        """One backward (of each part of the batch) and one update of the players that are due."""
        players = [self.objective.players[name] for name in due]
        self.toggle(due)
        parts = [self.backward(phase) for _ in ctx.each()]
        terms = {key: mean([found[key] for found, _ in parts]) for key in parts[0][0]}
        total = mean([found for _, found in parts])
        loss = self.team.mean_gradients([p for player in players for p in player.tensors], total)
        norms = guard.check(players, terms, loss, ctx.step, self.scale)
        if norms is None:
            return
        if phase.after_backward:
            phase.after_backward()
        for player, norm in zip(players, norms, strict=True):
            guard.clip(player, norm, ctx.step)
            player.step(ctx.step)
            ctx.log(f"norm/{player.name}", norm)
        for key, value in terms.items():
            ctx.log(f"{players[0].name}/{key.lstrip('_')}", value)
        ctx.log(f"loss/{players[0].name}", loss)

    def backward(self, phase: Phase) -> tuple[dict[str, Tensor], Tensor]:
        """Adds this part's share to the gradients; the detached terms and their sum."""
        with self.team.autocast():
            terms = phase.loss()
            total = guard.total(phase.players, terms)
        scale = (self.scale.value if self.scale else 1.0) / self.parts
        (total if scale == 1 else total * scale).backward()  # type: ignore[no-untyped-call]
        return {key: value.detach() for key, value in terms.items()}, total.detach()

    def toggle(self, names: tuple[str, ...]) -> None:
        """Only these players' parameters require grad."""
        if names == self._on:
            return
        players = self.objective.players
        for name, player in players.items():
            if name not in names and (self._on is None or name in self._on):
                _require(player, False)
        for name in names:
            if self._on is None or name not in self._on:
                _require(players[name], True)
        self._on = names

    def numbers(self) -> dict[str, float]:
        """One log line: everything since the last one, and the learning rates."""
        rates = {f"lr/{p.name}": p.lr(max(0, self.step - 1)) for p in self.objective.players.values()}
        return self.settled() | rates

    def settled(self) -> dict[str, float]:
        """What was logged since the last line, as floats averaged over processes (this waits for the device)."""
        tensors = [name for name, value in self.pending.items() if isinstance(value, Tensor)]
        packed = [full(self.pending[name]).float().to(self.team.device) for name in tensors]  # type: ignore[arg-type]
        moved = dict(zip(tensors, torch.stack(packed).tolist(), strict=True)) if packed else {}
        out = self.team.mean_numbers({name: float(moved.get(name, v)) for name, v in self.pending.items()})
        self.pending = dict(out)
        self.held_out = out.get("held_out", self.held_out)
        return out

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, as references, under the checkpoint's names."""
        out = {f"player/{n}/{key}": t for n, p in self.objective.players.items() for key, t in p.state().items()}
        out |= {f"objective/{key}": value for key, value in self.objective.state().items()}
        if self.scale:
            out["trainer/scale"] = torch.tensor([self.scale.value, self.scale.good], dtype=torch.float64)
        return out

    def load(self, state: dict[str, Tensor], step: int, pending: dict[str, float]) -> None:
        """Go on after `step` finished steps; `pending` is what the next log line has to hold besides."""
        for name, player in self.objective.players.items():
            player.load(_below(state, f"player/{name}/"))
        self.objective.load(_below(state, "objective/"))
        if self.scale and "trainer/scale" in state:
            self.scale = guard.LossScale(float(state["trainer/scale"][0]), int(state["trainer/scale"][1]))
        self.step, self.pending = step, dict(pending)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop after this step; a second one stops at once."""

        def ask(number: int, frame: types.FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
            self._stop = number

        try:
            before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns it handles signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean of what a batch's parts gave."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(0)


def _require(player: Player, on: bool) -> None:
    for p in player.tensors:
        p.requires_grad_(on)
    player.reshard()


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
