"""One net for many prompts: scenes differ by prompt, steps share one prompt, all come from one forward."""

import torch

from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.recipe import load
from limbeck.core.run.rng import Draws
from limbeck.core.run.trainer import Trainer
from limbeck.domains.threed import known, space
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.scene import seen

TWO = ["a red and blue sphere with a green patch", "a green and yellow torus with a red patch"]
SETS = [f"data.prompts=[{', '.join(TWO)}]", "teacher={kind: threed.solids, size: 16}", "data.size=16", "eval=[]",
        "data.distance=[2.6, 2.6]", "student.size=16", "student.features=8", "student.width=16"]  # fmt: skip


def test_a_step_has_one_prompt_and_every_prompt_has_steps() -> None:
    data, seen_ = Build(load("threed/asd-amortised", SETS)).piece("data"), set()
    for step in range(12):
        ctx = Context(step, "s", Draws(0, step, 4), 1, 0, torch.device("cpu"))
        prompts = data.prompts(4, ctx.draws.gen("prompts"), slice(None))
        _, asked = data.ask(ctx, prompts)
        assert len(set(prompts)) == 1 and asked["sentence"].shape == (4, 384)
        seen_ |= set(prompts)
    assert seen_ == set(TWO)


def test_both_scenes_come_near_their_own_objects_and_not_the_other() -> None:
    recipe = load("threed/asd-amortised", [*SETS, "steps=80", "stages.0.losses.0.optim.lr=3e-3"])
    build = Build(recipe)
    stage = recipe.stages[0]
    before = build.piece("student").writer(torch.randn(1, 384, generator=torch.Generator().manual_seed(0)))
    assert before.shape == (1, 3, 8, 16, 16)
    Trainer(build.objective(stage), Team("cpu"), 0, stage.name, recipe.steps, 4).run()
    truths = [Known.of(build, prompt) for prompt in TWO]
    for k, (prompt, scene) in enumerate(space.shown(build)):
        assert prompt == TWO[k]
        own, other = (known.psnr(seen(scene, truth.cameras).image, truth.image) for truth in (truths[k], truths[1 - k]))
        assert own > other + 1, (own, other)
