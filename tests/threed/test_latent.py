"""Latent scenes: the codec of patches and its teacher, maps between latents and colours, stages, a guide of shape."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.core.diffusion.config import Vp
from limbeck.core.diffusion.denoiser import Denoiser
from limbeck.core.diffusion.process import process
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.core.run.rng import Draws, generator
from limbeck.core.run.trainer import Trainer
from limbeck.domains.threed import asset, fields, known, latent, posed, space, textured
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.latent import LatentScene, PatchDenoiser, Patches
from limbeck.domains.threed.objects import objects
from limbeck.domains.threed.scene import seen

SPHERE = posed.PROMPTS[0]
FEW = ["student.of.field.size=16", "student.of.sampling.samples=12", "student.of.sampling.proposal=12"]
SOLID = ["teacher.of={kind: threed.solids, size: 16}", f"data.prompt={SPHERE}", "data.distance=[2.6,2.6]", *FEW]


def pictures(index: int = 1) -> Tensor:
    """Training views of one object [V,3,32,32]."""
    return objects().training[index, :, :3].float() / 127.5 - 1


@pytest.fixture(scope="module")
def codec() -> Patches:
    return Patches.of(objects().training[:, ::16, :3].flatten(0, 1).float() / 127.5 - 1, 2, 4)


def test_latents_are_what_their_pictures_hold(codec: Patches) -> None:
    z = torch.randn(2, 4, 16, 16, generator=generator(0, "test", 0))
    assert torch.allclose(codec.encode(codec.decode(z)), z, atol=1e-4)
    assert torch.allclose(codec.rows @ codec.rows.T, torch.eye(4), atol=1e-5)
    x = pictures()
    assert codec.encode(x).shape[1:] == (4, 16, 16) and known.psnr(codec.decode(codec.encode(x)), x) > 21
    poor = Patches(codec.rows[[0, 1, 2]], codec.mean)
    assert known.psnr(poor.decode(poor.encode(x)), x) < known.psnr(codec.decode(codec.encode(x)), x) - 0.5


class Asked(Denoiser):
    """Keeps what it is asked, and says that all is a given picture."""

    prompts = ("a",)

    def __init__(self, answer: Tensor) -> None:
        super().__init__(process(Vp()), "x0")
        self.answer = answer

    def forward(self, x_t, t, cond, features=False):  # type: ignore[no-untyped-def]
        self.x_t, self.cond = x_t, cond
        return self.answer.expand_as(x_t)


def test_a_teacher_of_pixels_is_asked_about_a_noisy_picture_of_its_own_law(codec: Patches) -> None:
    noise = torch.randn(latent.BANK, 12, 16, 16, generator=generator(0, "test", 1))
    inner = Asked(pictures()[0])
    net = PatchDenoiser(inner, codec, noise - codec.up(codec.down(noise)))
    t, z_t = torch.rand(64, generator=generator(0, "test", 2)), torch.randn(64, 4, 16, 16)
    found = net.predict(z_t, t, {"camera": ring(64, 8).rows()})
    assert torch.allclose(found.x0, codec.encode(inner.answer[None]).expand(64, -1, -1, -1), atol=1e-5)
    assert inner.cond["camera"][:, 13:].unique().tolist() == [32.0]
    alpha, sigma = net.process.coefficients(t, z_t)
    patch = torch.nn.functional.pixel_unshuffle(inner.x_t, 2) - alpha * codec.mean[:, None, None]
    assert torch.allclose(codec.down(patch), z_t, atol=1e-4)
    rest = (patch - codec.up(codec.down(patch))) / sigma  # 8 of 12 directions, each of variance one
    assert float(rest.square().mean()) == pytest.approx(8 / 12, rel=0.02)
    first = inner.x_t
    net.predict(z_t, t, {"camera": ring(64, 8).rows()})
    assert torch.equal(first, inner.x_t)
    net.predict(z_t, t + 1e-5, {"camera": ring(64, 8).rows()})
    assert float((first - inner.x_t).square().mean()) > 0.1


def context(step: int = 0) -> Context:
    return Context(step, "make", Draws(0, step, 4), 1, 0, torch.device("cpu"))


def test_latents_come_first_and_pictures_afterwards() -> None:
    build = Build(load("threed/latent-nerf", [*SOLID, "student.rgb=5", "data.size=[[4, 8], [5, 16]]"]))
    student, model = build.piece("student"), build.piece("teacher")
    (scene,) = student.scenes
    assert not scene.latent  # a scene that is not in training shows its end
    for step, side in ((0, 8), (5, 16)):
        cond = model.encode([SPHERE] * 4) | build.piece("data").ask(context(step), [SPHERE] * 4)[1]
        found = student.sample(torch.zeros(4, *model.shape), cond)
        assert found.x.shape == (4, 4, 8, 8) and found.aux["image"].shape == (4, 3, side, side)
        scene.zero_grad(set_to_none=True)
        found.x.square().sum().backward()
        assert (scene.to_rgb.grad is None) == (step == 0)
        assert scene.inner.body.colour.grad.abs().max() > 0
        if step == 0:
            assert torch.equal(found.x, found.aux["latent"])
        else:
            assert torch.equal(found.x, model.codec.encode(found.aux["image"]))


def test_colours_and_latents_are_maps_of_each_other(codec: Patches) -> None:
    there, back = latent.colour_maps(codec, 4, torch.device("cpu"))
    colour = torch.tensor([[1.0, 1, 1], [-0.7, 0.2, 0.4]])[..., None, None]
    assert torch.allclose(latent.affine(back, latent.affine(there, colour)), colour, atol=1e-3)
    z = codec.encode(pictures())
    small = torch.nn.functional.avg_pool2d(pictures(), 2)
    assert known.psnr(latent.affine(back, z), small) > 34
    with pytest.raises(BadInput, match="makes 4 channels"):
        latent.colour_maps(codec, 8, torch.device("cpu"))


def made() -> tuple[Build, Any]:
    """A short run against solids, in memory."""
    build = Build(load("threed/latent-nerf", [*SOLID, "data.size=8", "student.rgb=null", "steps=60"]))
    Trainer(build.objective("make"), Team("cpu"), 0, "make", 60, 4).run()
    return build, space.scenes(build)[0]


def recovered() -> tuple[float, Any]:
    """Decibels between decoded latents of a made scene and of the true views, at the held-out cameras; the scene."""
    build, scene = made()
    truth, codec = Known.of(build, SPHERE), build.piece("teacher").codec
    assert truth is not None
    with torch.no_grad():
        ground = latent.affine(scene.to_latent, torch.ones(len(truth.image), 3, 1, 1))[..., 0, 0]
        z = scene.inner.render(truth.cameras.sized(8, 8), ground).image
    return known.psnr(codec.decode(z), codec.decode(codec.encode(truth.image))), scene


def test_latents_of_a_known_solid_are_found() -> None:
    found, scene = recovered()
    assert found > 20
    mesh = asset.make(scene, Files(resolution=24, faces=500, texture=256)).asset  # its colours are the map's
    assert mesh.mesh.watertight or len(mesh.mesh.faces) > 50
    patch = mesh.at(mesh.uv)[mesh.mesh.vertices[:, 0] < -0.3].mean(0)  # the back of this ball is blue
    assert patch[2] > patch[0] + 40


def test_fault_latents_are_squashed_as_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "squashed", lambda colour, channels: torch.tanh(colour / 2))
    assert recovered()[0] < 17


def ball() -> Tensor:
    """Faces [M,3,3] of a ball of radius .6."""
    mesh = textured.ball(32).mesh
    return torch.as_tensor(0.6 * mesh.corners, dtype=torch.float32)


def test_a_guide_knows_inside_outside_and_how_far() -> None:
    guide = latent.Guide(ball(), 0.3, 1.0, generator(0, "test", 3))
    away = guide.points.norm(dim=1) - 0.6
    clear = away.abs() > 0.02
    assert torch.equal(guide.inside[clear], (away < 0).float()[clear])
    expected = 1 - torch.exp(-away.square() / (2 * 0.3**2))
    assert float((guide.weight - expected).abs().max()) < 0.05
    assert float(guide.weight[away.abs() < 0.01].max()) < 0.01 and float(guide.weight[away > 0.9].min()) > 0.95
    turned = latent.Guide(ball().flip(1), 0.0, 1.0, generator(0, "test", 3))
    assert torch.equal(turned.inside, guide.inside) and float(turned.weight.min()) == 1.0


def test_a_density_like_the_guide_costs_little_and_its_complement_much() -> None:
    guide = latent.Guide(ball(), 0.3, 1.0, generator(0, "test", 3))
    like = [latent.sketched(1e3 * x, guide.inside, guide.weight, 0.2) for x in (guide.inside, 1 - guide.inside)]
    assert float(like[1]) > 50 * float(like[0])
    density = torch.full_like(guide.inside, 2.0, requires_grad=True)
    (slope,) = torch.autograd.grad(latent.sketched(density, guide.inside, guide.weight, 0.2), density)
    here = guide.weight > 0.01
    assert bool((slope[here & (guide.inside == 1)] < 0).all()) and bool((slope[here & (guide.inside == 0)] > 0).all())


def test_a_scene_becomes_its_guide() -> None:
    loss = "{kind: threed.sketch, points: 1024, optim: {kind: adam, lr: 0.2, clip: null, betas: [0.9, 0.95]}}"
    sets = [*SOLID, "data.size=4", f"stages.0.losses=[{loss}]", "student.rgb=null", "student.of.field.height=0.0"]
    build = Build(load("threed/sketch-shape", sets))
    objective, points = build.objective("make"), 2 * torch.rand(4000, 3, generator=generator(0, "test", 4)) - 1
    scene, away = space.scenes(build)[0], points.norm(dim=1)

    def filled() -> tuple[float, float]:
        with torch.no_grad():
            solid = 1 - torch.exp(-0.2 * scene.field(points)[0])
        return float(solid[away < 0.55].mean()), float(solid[(away > 0.85) & (away < 1)].mean())

    before = filled()
    Trainer(objective, Team("cpu"), 0, "make", 30, 4).run()
    assert before[0] == pytest.approx(before[1], abs=0.1)
    assert filled()[0] > 0.7 and filled()[1] < 0.25


def test_a_pipeline_makes_a_scene_of_its_latents_and_then_of_colours(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = f"teacher={{kind: image.teacher, model: {pipeline}}}"
    sets = [teacher, "data.prompt=a cat", "data.words=true", *FEW, "student.rgb=1", "data.size=[[0, 8], [1, 16]]"]
    build = Build(load("threed/latent-nerf", sets))
    objective = build.objective("make")
    (scene,) = space.scenes(build)
    before = [p.detach().clone() for p in scene.parameters()]
    monkeypatch.setattr(type(build.piece("teacher").codec), "decode", lambda *_: pytest.fail("decoded"))
    Trainer(objective, Team("cpu"), 0, "make", 2, 4).run()
    assert isinstance(scene, LatentScene) and not scene.latent
    assert all(not torch.equal(a, b) for a, b in zip(before, scene.parameters(), strict=True))
    assert seen(scene, ring(2, 16)).image.shape == (2, 3, 16, 16)


def test_meshes_have_no_latents() -> None:
    with pytest.raises(BadInput, match="threed.mesh has no latent channels; use threed.nerf or threed.gaussians"):
        Build(load("threed/latent-nerf", ["student.of={kind: threed.mesh}"])).piece("student")
