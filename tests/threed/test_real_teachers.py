"""A teacher of pictures makes scenes: a tiny pipeline shaped as Stable Diffusion, its autoencoder in the gradient."""

from pathlib import Path

import pytest
import torch

from limbeck.core.run import job
from limbeck.core.run.build import Build
from limbeck.core.run.distributed import Team
from limbeck.core.run.recipe import load
from limbeck.core.run.trainer import Trainer


def sets(pipeline: Path, *more: str) -> list[str]:
    teacher = f"teacher={{kind: image.teacher, model: {pipeline}}}"
    small = ["data.words=true", "data.size=16", "data.background=random", "student.field.size=8", "steps=2"]
    return [teacher, "data.prompt=a cat", *small, "stages.0.losses.0.guidance=5.0", *more]


@pytest.mark.parametrize("operator", ["sds", "asd", "vsd"])
def test_a_pipeline_moves_a_field(operator: str, pipeline: Path) -> None:
    recipe = load("threed/sds-nerf", sets(pipeline, f"stages.0.losses.0.operator={operator}"))
    build = Build(recipe)
    objective = build.objective(recipe.stages[0])
    scenes = list(build.piece("student").scenes.parameters())
    before = [value.detach().clone() for value in scenes]
    Trainer(objective, Team("cpu"), 0, "make", 2, 4).run()
    assert all(not torch.equal(a, b) for a, b in zip(before, scenes, strict=True))


def test_no_picture_is_decoded_and_views_are_named(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, asked = load("threed/sds-nerf", sets(pipeline)), []
    build = Build(recipe)
    model = build.piece("teacher")
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda prompts: asked.extend(prompts) or encode(prompts))
    monkeypatch.setattr(type(model.codec), "decode", lambda *_: pytest.fail("decoded"))
    Trainer(build.objective(recipe.stages[0]), Team("cpu"), 0, "make", 2, 4).run()
    named = {prompt for prompt in asked if prompt}
    assert named <= {f"a cat, {view} view" for view in ("front", "side", "back", "overhead")} and len(named) > 1


def test_a_run_with_it_ends_in_files(pipeline: Path, tmp_path: Path) -> None:
    files = ["space.files.resolution=16", "space.files.texture=256", "eval.0.formats=[ply]"]
    recipe = load("threed/sds-nerf", sets(pipeline, *files))
    assert job.run(recipe, tmp_path / "run", device="cpu", quiet=True) == 0
    assert (tmp_path / "run" / "exports" / "ply" / "asset.ply").exists()
