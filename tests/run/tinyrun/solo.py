"""Trains and saves without any estimate (or only imports, without arguments), and prints its own peak in kB."""

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
from limbeck.core.run.trainer import Cadence, Trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    team = Team("cpu")
    if len(sys.argv) > 1:
        if not registry().specs.get(("objective", "tinyrun.pair")):
            registry().add("tinyrun", "tinyrun", Path(tinyrun.__file__).parent)
        recipe = recipes.load(sys.argv[1], sys.argv[3:])
        trainer = Trainer(Build(recipe).objective("main"), team, 0, "main", recipe.steps, recipe.batch, Cadence(1))
        trainer.cadence.save = lambda t: (
            checkpoint.save(Path(sys.argv[2]), t.state(), Manifest("main", t.step)) and None
        )
        trainer.run()
    print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
