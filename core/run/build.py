"""From a recipe's data to live pieces: every piece is `factory(config, build)`, made once and with its own seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from limbeck.core.run.config import OptimConfig
from limbeck.core.run.errors import BadInput, did_you_mean
from limbeck.core.run.players import Objective, Player, compose
from limbeck.core.run.recipe import Recipe, Stage
from limbeck.core.run.registry import Registry, registry
from limbeck.core.run.rng import derive
from limbeck.core.scheduled import in_steps

LISTS = {"eval": "metric", "rewards": "reward"}  # `eval.0`, `rewards.train.0` are slots too


@dataclass
class Batch:
    """Real data: samples [b, *S] (None where only prompts are asked for), one prompt a row, and what else is known.

    `cond` has rows that join the encoded prompts as they are (the camera of a view); `encoded` samples are latents of
    the run's teacher already.
    """

    x: Tensor | None
    prompts: list[str]
    cond: dict[str, Tensor] = field(default_factory=dict)
    encoded: bool = False


class Data(Protocol):
    """What the slot `data` builds; draws for the global batch of n, then takes this process's rows."""

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """Samples with their prompts."""

    def prompts(self, n: int, gen: Generator, rows: slice) -> list[str]:
        """Prompts alone."""


class Space(Protocol):
    """What the slot `space` builds: how samples are shown, drawn and exported."""

    formats: tuple[str, ...]

    def show(self, build: "Build", step: int, folder: Path) -> list[Path]:
        """Pictures of the current student beside the teacher, with fixed noise and prompts."""

    def sample(
        self,
        build: "Build",
        prompts: list[str],
        seed: int,
        folder: Path,
        which: str = "student",
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[Path]:
        """Samples for prompts, as files."""

    def export(self, build: "Build", path: Path, format: str) -> list[Path]:
        """The student in one of `formats`."""


@dataclass
class Build:
    """The pieces of one run on one device; `stage` is the stage whose objective was made last."""

    recipe: Recipe
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folder: Path = Path(".")
    rank: int = 0
    world: int = 1
    dtype: torch.dtype = torch.float32
    registry: Registry = field(default_factory=registry)
    stage: Stage | None = None
    step: int = 0  # finished steps of the weights that an opened run holds
    note: Callable[[str], None] = lambda line: None  # tells the user what a long evaluation is at

    def __post_init__(self) -> None:
        self.seed = self.recipe.seed
        self._pieces: dict[str, Any] = {}
        self._players: dict[str, Player] = {}

    def piece(self, slot: str) -> Any:
        """The piece in this slot (`teacher`, `student`, `data`, `space`, `eval.0`, …), built at the first call.

        `data` is that of the stage being built, where the stage has its own.
        """
        if slot == "data" and self.stage is not None and self.stage.data is not None:
            slot = f"stages.{self.recipe.stages.index(self.stage)}.data"
        if slot not in self._pieces:
            kind = LISTS.get(slot.split(".")[0], slot.rpartition(".")[2])
            self._pieces[slot] = self._make(kind, slot, self.config(slot))
        return self._pieces[slot]

    def part(self, kind: str, config: Any, name: str = "") -> Any:
        """A piece inside another one's settings (`of: {kind: …}`), made anew at each call, with the seed of `name`."""
        return self._make(kind, f"{kind}/{config.kind}{'/' if name else ''}{name}", config)

    def config(self, slot: str) -> Any:
        """The settings in this slot, shares as steps: of its stage inside `stages`, of the recipe elsewhere."""
        value: Any = self.recipe
        parts = slot.split(".")
        for part in parts:
            inside = isinstance(value, list) and part.isdigit() and int(part) < len(value)
            value = value[int(part)] if inside else getattr(value, part, None)
        if value is None:
            raise BadInput(f"the recipe {self.recipe.name} has no {slot}; add `{slot}: {{kind: …}}`")
        staged = parts[0] == "stages"
        return in_steps(value, self.total_steps(self.recipe.stages[int(parts[1])]) if staged else self.recipe.steps)

    def has(self, slot: str) -> bool:
        """Whether the recipe (or, for `data`, the stage being built) fills this slot."""
        return getattr(self.recipe, slot, None) is not None or getattr(self.stage, slot, None) is not None

    def objective(self, stage: Stage | str) -> Objective:
        """A fresh objective of this stage, all its losses composed."""
        self.stage = stage = self.stage_of(stage)
        self._players = {}
        losses = in_steps(stage.losses, self.total_steps())
        parts = [self._make("objective", f"{stage.name}.losses.{i}", loss) for i, loss in enumerate(losses)]
        return compose(parts, [loss.weight for loss in losses])

    def player(self, name: str, params: Mapping[str, nn.Parameter] | nn.Module, config: OptimConfig) -> Player:
        """The stage's player of this name: losses that train the same net share one player."""
        if name not in self._players:
            self._players[name] = Player(name, params, config, self.total_steps())
        player = self._players[name]
        if player.config != config:
            raise BadInput(f'two losses give player "{name}" different optimisers; give them the same `optim`')
        return player

    def total_steps(self, stage: Stage | str | None = None) -> int:
        """How many steps a stage has (by default the one being built)."""
        chosen = self.stage if stage is None else self.stage_of(stage)
        return self.recipe.steps if chosen is None or chosen.steps is None else chosen.steps

    def stage_of(self, stage: Stage | str) -> Stage:
        """A stage by its name."""
        if isinstance(stage, Stage):
            return stage
        names = {s.name: s for s in self.recipe.stages}
        if stage not in names:
            raise BadInput(f'there is no stage "{stage}"{did_you_mean(stage, names)}')
        return names[stage]

    def forget(self) -> None:
        """Drop every piece but the data, so that the next stage starts from fresh ones."""
        self._pieces = {slot: piece for slot, piece in self._pieces.items() if slot.endswith("data")}

    def _make(self, kind: str, slot: str, config: Any) -> Any:
        """Call the factory under its own seed; the global generator is as before afterwards."""
        factory = self.registry.load(self.registry.get(kind, config.kind))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive(self.seed, f"build/{slot}"))
            return factory(config, self)
