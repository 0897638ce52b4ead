"""Students of many steps, the families that take guidance as an input, anchors, views and paired gains."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.alignment.backprop import Anchor
from limbeck.core.diffusion.guidance import guided_by, with_scale
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.rewards.metric import gain
from limbeck.core.run import job
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.players import Player
from limbeck.core.run.rng import Draws, generator
from limbeck.domains.image import pipelines, rewards, students

PROMPTS = ["a cat", "a dog"]
Folder = Callable[[str], Path]


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_an_untrained_student_draws_what_the_teachers_own_sampler_draws(family: str, pipeline_folder: Folder) -> None:
    model = pipelines.load_pipeline(str(pipeline_folder(family)), size=16)
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    student = ManyStep(model, students.trainable(model, "auto", None), 3, 4.0)
    x = student.sample(noise, model.encode(PROMPTS)).x
    assert torch.equal(x, pipelines.sample(model, noise, PROMPTS, 3, 4.0))
    assert not torch.allclose(x, pipelines.sample(model, noise, PROMPTS, 3, 1.5)), "the scale must reach the net"
    other = student.but(steps=2, guidance=1.5)
    assert torch.equal(other.sample(noise, model.encode(PROMPTS)).x, pipelines.sample(model, noise, PROMPTS, 2, 1.5))
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    assert student.before().denoiser is model.denoiser


def test_a_scale_goes_into_the_condition_where_the_net_takes_it_and_nowhere_else() -> None:
    net = nn.Identity()
    embedded, plain = {"guidance": torch.tensor([3.5, 3.5])}, {"states": torch.zeros(2, 1)}
    assert with_scale(embedded, 2.0)["guidance"].tolist() == [2.0, 2.0] and with_scale(plain, 2.0) is plain
    assert guided_by(net, embedded, 2.0) is net and guided_by(net, plain, 1.0) is net  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["flux"])
def test_a_tuned_lora_learns_resumes_and_exports(family: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    sets = [
        f"teacher.model={pipeline_folder(family)}",
        "teacher.size=16",
        "student.steps=2",
        "stages.0.losses.0.walk.steps=3",
        "batch=2",
    ]
    sets += ["rewards={train: [{kind: image.colourfulness}], held_out: [{kind: image.colourfulness}]}", "eval=[]"]
    sets += ["steps=2", "space.steps=2", "sample.prompts=[a cat]", "checkpoint.every=2"]
    assert job.run(recipes.load("image/alignprop", sets), tmp_path / "run", device="cpu", quiet=True) == 0
    build = job.open_run(tmp_path / "run", "cpu")
    files = build.piece("space").export(build, tmp_path / "lora", "lora")
    assert files and all(file.exists() for file in files)


def test_an_anchor_pulls_back_to_where_the_first_step_began() -> None:
    layer = nn.Linear(2, 2)
    anchor = Anchor(Player("student", layer, OptimConfig(), 10))
    with torch.no_grad():
        layer.weight.zero_()  # as `init_from` does, after the objective was made
    ctx = Context(0, "s", Draws(0, 0, 1), 1, 0, torch.device("cpu"))
    assert next(iter(anchor.phases(ctx))).loss()["anchor"].item() == 0.0  # type: ignore[index]
    with torch.no_grad():
        layer.weight.fill_(3.0)
    again = Anchor(Player("student", layer, OptimConfig(), 10))
    again.load(anchor.state())
    value = next(iter(again.phases(ctx))).loss()["anchor"]  # type: ignore[index]
    assert float(value) == 18.0
    value.backward()
    assert layer.weight.grad is not None and layer.weight.grad.unique().tolist() == [3.0]


def test_gains_are_paired() -> None:
    before = torch.randn(1000, generator=generator(0, "gain", 0), dtype=torch.float64)
    found = gain(before, before + 0.1)
    assert found["gain"] == pytest.approx(0.1) and found["high"] - found["low"] < 1e-9
    assert found["in sd"] == pytest.approx(0.1 / float(before.std()))
    shuffled = gain(before, before.flip(0) + 0.1)
    assert shuffled["high"] - shuffled["low"] > 0.1  # pairs that belong together are what narrows it


def test_views_move_blur_and_roughen_and_keep_the_gradient() -> None:
    gen = generator(0, "views", 0)
    x = torch.zeros(8, 3, 32, 32)
    x[:, :, 16, 16] = 1.0
    plain = rewards.view(x, 0.1, 0.0, gen)
    places = {int(picture[0].argmax()) for picture in plain}
    assert len(places) > 3 and {round(float(picture.max()), 3) for picture in plain} == {1.0, 0.111}
    assert float(rewards.view(x, 0.0, 0.5, gen).std()) == pytest.approx(0.5, abs=0.02)
    recipe = recipes.load("image/alignprop", ["rewards.train.0.of.kind=image.colourfulness"])
    reward = Build(recipe).piece("rewards.train.0")
    pixels: Tensor = torch.rand(2, 3, 32, 32, generator=gen).requires_grad_(True)
    values = reward(pixels, {"prompt": PROMPTS})
    assert torch.equal(values, reward(pixels, {"prompt": PROMPTS})) and reward.differentiable
    values.sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().sum()) > 0
