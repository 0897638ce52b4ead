"""The teacher of views: what its net looks at, how it learns through a recipe, its files, and what it says alone."""

import json
import math
from pathlib import Path

import pytest
import torch

from limbeck.core.diffusion.denoiser import repeat_cond
from limbeck.core.distillation.denoising import dropped
from limbeck.core.distillation.source import Source
from limbeck.core.run import checkpoint, job
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import Draws, generator
from limbeck.domains.threed import teacher
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.net import ViewNet, turns
from limbeck.domains.threed.objects import objects

TINY = ["teacher.widths=[8, 8, 8]", "teacher.hidden=16", "batch=4", "steps=3", "checkpoint.every=3"]


def net(seed: int = 0) -> ViewNet:
    """A small net whose every layer does something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = ViewNet(32, (8, 8, 8), 16)
        for value in made.parameters():
            torch.nn.init.normal_(value, std=0.2)
    return made.eval()


def context(batch: int = 8) -> Context:
    return Context(0, "learn", Draws(0, 0, batch, 0, 1), 1, 0, torch.device("cpu"))


def asked(views: int = 3) -> dict[str, torch.Tensor]:
    text = torch.nn.functional.normalize(torch.randn(views, 384, generator=generator(0, "text", 0)), dim=1)
    return {"text": text, "camera": ring(views, 32, elevation=20, offset=10).rows()}


def said(made: ViewNet, cond: dict[str, torch.Tensor]) -> torch.Tensor:
    x = torch.randn(len(cond["text"]), 3, 32, 32, generator=generator(0, "x", 0))
    with torch.no_grad():
        return teacher.Views(made, recipes.load("threed/teacher").teacher.process).predict(
            x, torch.full((len(x),), 0.7), cond
        ).raw  # fmt: skip


def test_turns_are_those_of_azimuth_and_elevation() -> None:
    cameras = ring(3, 32, elevation=20, offset=10)
    found = turns(cameras.rows())
    azimuth, elevation = cameras.angles()
    assert found.shape == (3, 20)
    assert torch.allclose(found[:, 2], (3 * azimuth).sin(), atol=1e-5)
    assert torch.allclose(found[:, 10 + 5], elevation.cos(), atol=1e-5)


def test_the_net_looks_at_text_camera_and_time_and_nothing_else() -> None:
    made, cond = net(), asked()
    base = said(made, cond)
    assert base.shape == (3, 3, 32, 32)
    for key in ("text", "camera"):
        other = said(made, {**cond, key: cond[key].roll(1, 0)})
        assert not torch.allclose(other, base, atol=1e-3), key
    more = {"background": torch.rand(3, 3), "jitter": torch.rand(3), "particle": torch.rand(3)}
    assert torch.equal(said(made, {**cond, **more}), base)


def test_a_camera_that_is_not_told() -> None:
    made, cond = net(), asked()
    none = said(made, {"text": cond["text"]})
    assert torch.equal(said(made, {**cond, "camera": torch.zeros(3, 15)}), none)
    half = cond["camera"].clone()
    half[1] = 0
    mixed = said(made, {**cond, "camera": half})
    assert torch.equal(mixed[1], none[1]) and not torch.allclose(mixed[0], none[0], atol=1e-3)


def test_null_text_keeps_the_camera() -> None:
    source = Source.of(Build(recipes.load("threed/teacher", TINY)))
    assert set(source.null) == {"text"} and source.null["text"].shape == (1, 384)
    cond = {**asked(8), "jitter": torch.rand(8)}
    gone = dropped(context(), "test", cond, source.null, 1.0, False)
    assert torch.equal(gone["text"], source.null["text"].expand(8, -1))
    assert torch.equal(gone["camera"], cond["camera"]) and torch.equal(gone["jitter"], cond["jitter"])
    some = dropped(context(), "test", cond, source.null, 0.5, False)
    assert 0 < (some["text"] == source.null["text"]).all(1).sum() < 8


def test_real_data_brings_its_cameras() -> None:
    source = Source.of(Build(recipes.load("threed/teacher", [*TINY, "data.cameraless=0.0"])))
    x0, cond = source.real(context())
    assert x0.shape == (8, 3, 32, 32) and {k: tuple(v.shape) for k, v in cond.items()} == {
        "text": (8, 384), "camera": (8, 15),
    }  # fmt: skip
    assert (cond["camera"][:, 12] - math.radians(40)).abs().max() < 1e-6
    assert repeat_cond(source.null, 8)["text"].shape == (8, 384)


def test_gradients_repeat_with_two_threads() -> None:
    made, cond = net().train(), asked(16)
    cond["camera"][3] = 0
    x = torch.randn(16, 3, 32, 32, generator=generator(0, "x", 0))
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            made.zero_grad()
            made(x, torch.linspace(0.1, 1, 16), **cond).square().mean().backward()
            found.append([value.grad.clone() for value in made.parameters() if value.grad is not None])
    finally:
        torch.set_num_threads(threads)
    assert len(found[0]) == len(list(made.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def trained(folder: Path, *more: str) -> dict[str, torch.Tensor]:
    assert job.run(recipes.load("threed/teacher", [*TINY, *more]), folder, device="cpu", quiet=True) == 0
    loaded = checkpoint.latest(folder / "checkpoints")
    assert loaded is not None
    return loaded.tensors


def test_the_recipe_learns_repeats_measures_and_exports(tmp_path: Path) -> None:
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two", "eval=[]")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    lines = json.loads((tmp_path / "one" / "eval.json").read_text())["threed.teacher"]
    assert len(lines) == len(objects().names) + 1 and lines[0]["object"].startswith("mean of")
    assert lines[0]["PSNR"] == pytest.approx(sum(line["PSNR"] for line in lines[1:]) / len(lines[1:]))
    build = job.open_run(tmp_path / "one", "cpu")
    teacher.export(build, tmp_path / "mine")
    again = Build(recipes.load("threed/teacher", ["teacher.kind=threed.views", f"teacher.model={tmp_path / 'mine'}"]))
    model = again.piece("teacher")
    assert model.shape == (3, 32, 32) and not any(p.requires_grad for p in model.denoiser.parameters())
    for key, value in build.piece("teacher").denoiser.net.state_dict().items():
        assert torch.equal(model.denoiser.net.state_dict()[key], value.bfloat16().float()), key


def test_a_prompt_that_it_cannot_know_gets_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    encode = teacher.Texts(torch.device("cpu"))
    rows = encode(["a teddy bear", "teddy bear", "", "a submarine under the sea"])["text"]
    assert torch.equal(rows[0], rows[1]) and torch.allclose(rows.norm(dim=1), torch.ones(4), atol=1e-4)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "submarine" in told[0] and any(f'"{name}"' in told[0] for name in objects().names)
    alone = encode(["a teddy bear"])["text"]
    assert torch.equal(alone[0], rows[0])  # a row's bits do not depend on its company


def test_a_teacher_that_is_not_there() -> None:
    with pytest.raises(BadInput, match="teacher.model: there is no nothing"):
        teacher.load("nothing")


def test_the_embedded_teacher_knows_its_objects() -> None:
    made = teacher.model(teacher.load("views-32"), torch.device("cpu"), "views-32")
    found = list(teacher.rows(made, 0.98, 0))
    assert float(found[0]["PSNR"]) > 24.0
    assert all(float(row["PSNR"]) > float(row["a white picture"]) for row in found)
    with torch.no_grad():  # the camera is what it goes by: turned by 60 degrees the pictures are wrong
        truth = objects().known("horse")
        assert truth is not None
        cond = {"text": made.encode(["horse"])["text"].expand(12, -1), "camera": truth.cameras.rows()}
        noise = torch.randn(truth.image.shape, generator=generator(0, "x", 0))
        answer = {k: made.denoiser.predict(noise, torch.ones(12), {**cond, "camera": rows}).x0
                  for k, rows in {"true": cond["camera"], "turned": cond["camera"].roll(6, 0)}.items()}  # fmt: skip
    error = {k: float((x.clamp(-1, 1) - truth.image).square().mean()) for k, x in answer.items()}
    assert error["true"] < 0.5 * error["turned"]
