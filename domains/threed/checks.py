"""Closed-form checks of score distillation in 3D (`limbeck verify threed`): voxels against solids known exactly."""

from __future__ import annotations

import torch

from limbeck.core.run.build import Build
from limbeck.core.run.checks import Check
from limbeck.core.run.distributed import Team
from limbeck.core.run.recipe import load
from limbeck.core.run.trainer import Trainer
from limbeck.domains.threed import known, space
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.scene import seen

SPHERE, CUBE = "a red and blue sphere with a green patch", "a green and yellow cube with a red patch"
LOSS = "stages.0.losses.0"


def made(prompt: str, *sets: str, steps: int = 200) -> float:
    """PSNR at the held-out cameras of a solid made by the recipe toy/solids."""
    recipe = load("toy/solids", [f"data.prompt={prompt}", f"steps={steps}", *sets])
    build = Build(recipe)
    objective = build.objective(recipe.stages[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Trainer(objective, Team("cpu"), recipe.seed, "make", steps, recipe.batch).run()
    finally:
        torch.set_num_threads(threads)
    truth = Known.of(build, prompt)
    assert truth is not None
    return known.psnr(seen(space.scenes(build)[0], truth.cameras).image, truth.image)


def sds() -> list[Check]:
    """SDS without guidance finds the object (threed.md, section 0: 34.3 dB); with guidance 100 it over-saturates."""
    found = [made(prompt) for prompt in (SPHERE, CUBE)]
    return [
        Check("SDS, guidance 1: mean PSNR of two solids, dB", sum(found) / 2, 32.0, ">="),
        Check("SDS, guidance 100 is over-saturated, dB", made(SPHERE, f"{LOSS}.guidance=100.0"), 22.0, "<="),
    ]


def asd() -> list[Check]:
    """ASD without guidance finds it too, with less force (32.5 dB at a shift of .3)."""
    return [Check("ASD, shift .3: PSNR, dB", made(SPHERE, f"{LOSS}.operator=asd", f"{LOSS}.shift=0.3"), 28.0, ">=")]
