"""Run by torchrun: one float64 step and a short run of the tiny pair, their ends written by the first process."""

import os
import sys
from pathlib import Path

import torch

import tinyrun
from limbeck.core.run import checkpoint
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.checkpoint import Manifest
from limbeck.core.run.distributed import Team
from limbeck.core.run.registry import registry
from limbeck.core.run.trainer import Trainer

SGD = "{kind: sgd, lr: 1.0, betas: [0.0, 0.0], clip: null}"
ADAM = "{lr: 0.01, ema: 0.9, every: 2, clip: 0.1}"


def train(path: str, out: Path, optim: str, steps: int, shard: bool) -> None:
    """Train and keep the full end state; with plain SGD of rate 1 one step's change is the gradient."""
    sets = [f"stages.0.losses.0.{player}={optim}" for player in ("generator", "critic")]
    recipe = recipes.load(path, [*sets, "student.double=true", "student.depth=2", f"distributed.shard={shard}".lower()])
    team = Team("cpu", shard=shard)
    build = Build(recipe, team.device, rank=team.rank, world=team.size)
    trainer = Trainer(build.objective("main"), team, 0, "main", steps, recipe.batch)
    checkpoint.save(out, trainer.state(), Manifest("main", 0), writes=team.rank == 0)
    trainer.run()
    if shard:
        params = trainer.objective.players["generator"].tensors
        assert all(hasattr(p, "full_tensor") for p in params) and any(p.to_local().shape != p.shape for p in params)
    checkpoint.save(out, trainer.state(), Manifest("main", steps), writes=team.rank == 0)
    team.barrier()
    again = Trainer(build.objective("main"), team, 0, "main", steps, recipe.batch)
    loaded = checkpoint.latest(out)
    again.load(loaded.tensors, steps, {})
    assert all(torch.equal(_full(t), loaded.tensors[name]) for name, t in again.state().items())


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(path: str, out: Path, shard: bool) -> None:
    torch.set_num_threads(1)
    train(path, out / "step", SGD, 1, shard)
    train(path, out / "run", ADAM, 30, shard)


if __name__ == "__main__":
    if not registry().specs.get(("objective", "tinyrun.pair")):
        registry().add("tinyrun", "tinyrun", Path(tinyrun.__file__).parent)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "shard")
    if torch.distributed.is_initialized():  # the others wait while one evaluates, for hours if need be
        backend = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() > 3600
        torch.distributed.destroy_process_group()
        os._exit(0)  # all is written; gloo's threads may abort an interpreter that takes itself apart
