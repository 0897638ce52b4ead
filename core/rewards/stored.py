"""Learned rewards at rest: out of a run folder or one safetensors file, into rewards that recipes name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.core.rewards import base
from limbeck.core.rewards import config as settings
from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.rewards.learned import Scorers, scorers
from limbeck.core.run import checkpoint
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.errors import BadInput, clean
from limbeck.core.run.players import Player

KEY = "limbeck.student"  # of the file's metadata: the student's settings as JSON, names of pieces and numbers


def export(build: Build, path: Path) -> list[Path]:
    """Exporter `reward`: the scorer's weights with what is needed to build it again."""
    student, path = build.piece("student"), path.with_suffix(".safetensors")
    about = {KEY: build.recipe.student.model_dump_json()}
    save_file({name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}, path, about)
    return [path]


def opened(path: Path, device: torch.device) -> nn.Module:
    """The student of a run folder (its EMA where there is one) or of an exported file, frozen."""
    student = _of_run(path, device) if path.is_dir() else _of_file(path, device)
    return student.eval().requires_grad_(False)


def _of_run(folder: Path, device: torch.device) -> nn.Module:
    recipe = recipes.load(str(folder / "recipe.yaml"))
    loaded = checkpoint.result(folder / "checkpoints")
    if loaded is None:
        raise BadInput(f"{folder} has no checkpoint; give the run folder of a reward that was trained")
    student: nn.Module = Build(recipe, device, folder).piece("student")
    weights: dict[str, Tensor] = {}
    for part in ("param", "ema"):
        prefix = f"player/student/{part}/"
        weights |= {key[len(prefix) :]: t for key, t in loaded.tensors.items() if key.startswith(prefix)}
    Player("student", student, OptimConfig(), 1).load_weights(weights)
    return student


def _of_file(path: Path, device: torch.device) -> nn.Module:
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(about[KEY])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadInput(f"{path}: no learned reward ({clean(error, 80)}); `limbeck export --format reward`") from None
    data = {"name": "reward", "job": "sample", "steps": 1, "batch": 1, "student": config}
    student: nn.Module = Build(recipes.of(data, where=str(path)), device).piece("student")
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        raise BadInput(f"{path}: the weights do not fit the scorer ({clean(error, 120)}); export it again") from None
    return student


def member(scorer: nn.Module, name: str, column: int | None) -> Reward:
    """One member of an ensemble; its gradient reaches the samples."""

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        values: Tensor = scorer(x, cond)
        return values if column is None or values.ndim == 1 else values[:, column]

    return Reward(score, name, getattr(scorer, "space", "any"), differentiable=True)


def rewards(model: Scorers, axis: str | None) -> list[Reward]:
    """Every member, on one axis or on all."""
    column = None if axis is None else model.column(axis)
    return [member(scorer, f"member {i}", column) for i, scorer in enumerate(model.members)]


def build(config: settings.Learned, build: Build) -> Reward:
    """Factory of the reward learned: mean, minimum or lower confidence bound of its members."""
    model = scorers(opened(Path(config.path), build.device))
    return base.ensemble(rewards(model, config.axis), config.rule, config.width)
