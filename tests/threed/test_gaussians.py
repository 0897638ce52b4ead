"""Scenes of Gaussians: what they show and answer, dead rows, and that they learn."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from limbeck.core.run.rng import generator
from limbeck.domains.threed import gaussians, rasteriser, surface
from limbeck.domains.threed.cameras import Cameras, ring
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.config import Gaussians as Settings
from limbeck.domains.threed.gaussians import PARTS, Gaussians, field
from limbeck.domains.threed.known import psnr
from limbeck.domains.threed.posed import PROMPTS, SOLIDS, truth
from limbeck.domains.threed.rasteriser import Splats
from limbeck.domains.threed.scene import seen


def ball(count: int = 200, capacity: int | None = None, channels: int = 3) -> Gaussians:
    return Gaussians.ball(Settings(count=count, capacity=capacity), channels, generator(0, "test", 0))


def shell(n: int = 4000, radius: float = 0.5) -> Gaussians:
    """A sphere of opaque splats, one colour a hemisphere."""
    gen = torch.Generator().manual_seed(0)
    means = radius * torch.nn.functional.normalize(torch.randn(n, 3, generator=gen), dim=1)
    colours = torch.where(means[:, :1] > 0, torch.tensor([1.5, 0.0, -1.5]), torch.tensor([-1.5, 0.0, 1.5]))
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(n, 1)
    return Gaussians(Splats(means, torch.full((n, 3), -3.2), quats, torch.full((n,), 2.0), colours))


def white(views: Cameras, channels: int = 3) -> Tensor:
    return torch.ones(len(views), channels)


def test_a_ball_starts_inside_its_radius_round_faint_and_grey() -> None:
    scene, views = ball(), ring(2, 16)
    away = scene.means.detach().norm(dim=1)
    assert 0.4 < float(away.median()) < 0.5 and float(away.max()) < 0.6  # uniform in the ball: .6 * .5^(1/3) = .476
    shown = scene.render(views, white(views))
    assert shown.alpha.max() > 0.3 and shown.image.min() > -0.3
    assert torch.equal(ball().means, scene.means)


def test_dead_rows_change_nothing() -> None:
    full, spare, views = ball(), ball(capacity=260), ring(2, 16)
    assert len(spare.means) == 260 and int(spare.alive.sum()) == 200
    a, b = (scene.render(views, white(views)) for scene in (full, spare))
    assert torch.equal(a.image, b.image) and torch.equal(a.depth, b.depth)
    (a.image.square().sum() + a.depth.sum()).backward()
    (b.image.square().sum() + b.depth.sum()).backward()
    for name in PARTS:
        assert torch.equal(getattr(full, name).grad, getattr(spare, name).grad[:200])
        assert not getattr(spare, name).grad[200:].any()
    with torch.no_grad():
        spare.opacity.fill_(-100.0)
    nothing = spare.render(views, white(views))
    assert (nothing.image == 1).all() and not nothing.alpha.any() and torch.isfinite(nothing.normals).all()
    assert not spare.field(torch.zeros(3, 3))[0].any()


def test_screen_gradients_are_there_in_training_alone() -> None:
    scene, views = ball(capacity=210), ring(2, 16)
    shown = scene.render(views, white(views))
    shown.image.square().sum().backward()
    assert shown.aux["screen"].grad.shape == (2, 200, 2) and shown.aux["screen"].grad.any()
    assert torch.equal(shown.aux["rows"], torch.arange(200))
    assert "screen" not in seen(scene, views).aux


def test_latent_scenes_show_their_channels_as_they_are() -> None:
    scene, views = ball(channels=4), ring(1, 16)
    with torch.no_grad():
        scene.colours.fill_(5.0)
        scene.opacity.fill_(8.0)
    assert scene.render(views, white(views, 4)).image.max() > 4.9
    scene.constrain()
    assert (scene.colours == 5).all()


def test_constraints_keep_colours_where_they_have_a_gradient() -> None:
    scene, views = ball(), ring(1, 16)
    with torch.no_grad():
        scene.colours.fill_(9.0)
        scene.scales.fill_(3.0)
        scene.scales[0] = -30.0
    scene.constrain()
    largest, smallest = float(scene.scales.detach().max()), float(scene.scales.detach().min())
    assert math.isclose(largest, math.log(0.2), rel_tol=1e-6) and smallest == -5
    image = scene.render(views, white(views)).image
    assert image.max() <= 1 + 1e-5
    image.sum().backward()
    assert scene.colours.grad.abs().sum() > 0


def test_normals_face_the_camera_and_away_from_the_sphere() -> None:
    scene, views = shell(), ring(3, 48, elevation=20.0)
    shown = seen(scene, views)
    origin, ray = views.rays()
    along = (ray * views.forward[:, None, None]).sum(-1, keepdim=True)
    point = origin + ray * (shown.depth / shown.alpha.clamp_min(1e-6)).movedim(1, -1) / along
    outward = torch.nn.functional.normalize(point, dim=-1).movedim(-1, 1)
    inside = (shown.alpha > 0.95) & ((outward * -ray.movedim(-1, 1)).sum(1, keepdim=True) > 0.5)
    cosine = (shown.normals * outward).sum(1, keepdim=True)[inside]
    assert inside.sum() > 300 and float(cosine.mean()) > 0.85
    assert ((shown.normals * ray.movedim(-1, 1)).sum(1, keepdim=True)[inside] < 0).all()


def slow_field(splats: Splats, points: Tensor) -> tuple[Tensor, Tensor]:
    """Every splat at every point, by the covariance itself."""
    axes = splats.axes()
    inverse = torch.linalg.inv(axes @ axes.transpose(1, 2))
    away = points[:, None] - splats.means
    square = torch.einsum("pki,kij,pkj->pk", away, inverse, away)
    weight = splats.opacity.sigmoid() * torch.where(square < gaussians.REACH**2, torch.exp(-0.5 * square), 0.0)
    return weight.sum(1), weight @ splats.colours / weight.sum(1, keepdim=True).clamp_min(1e-12)


def needles(n: int = 120) -> Splats:
    gen = torch.Generator().manual_seed(2)
    sizes = ((n, 3), (n, 3), (n, 4), (n,), (n, 3))
    means, scales, quats, opacity, colours = (torch.randn(s, generator=gen, dtype=torch.float64) for s in sizes)
    return Splats(0.4 * means, math.log(0.08) + 0.7 * scales, quats, opacity, colours)


@pytest.mark.parametrize("points", [1, 3000])
def test_a_field_asked_by_blocks_is_the_whole_one(points: int) -> None:
    places = 0.5 * torch.randn(points, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    density, colour = field(needles(), places)
    wanted, known = slow_field(needles(), places)
    assert torch.allclose(density, wanted, atol=1e-12) and torch.allclose(colour, known, atol=1e-9)


def test_fault_a_field_of_the_blocks_own_splats(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gaussians.Blobs.near
    monkeypatch.setattr(
        gaussians.Blobs, "near", lambda self, points: plain(replace(self, reach=self.reach / 3), points)
    )
    places = 0.5 * torch.randn(3000, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert (field(needles(), places)[0] - slow_field(needles(), places)[0]).abs().max() > 1e-3


def test_a_field_says_where_the_sphere_is_and_its_colours() -> None:
    scene = shell()
    points = torch.tensor([[0.5, 0, 0], [-0.5, 0, 0], [0, 0, 0], [0.9, 0, 0]])
    density, colour = scene.field(points)
    assert (density[:2] > 1).all() and not density[2:].any()
    assert colour[0, 0] > 0.7 and colour[0, 2] < -0.7 and colour[1, 0] < -0.7


def test_the_mesh_of_a_sphere_is_the_sphere_that_views_show() -> None:
    """Splats have a width: the outline at half opacity lies outside the radius that their centres are at."""
    pytest.importorskip("skimage")
    scene, views = shell(2000), ring(1, 128, elevation=0.0)
    mesh, _ = surface.extract(scene, Files(resolution=48))
    area = int((seen(scene, views).alpha > 0.5).sum())
    radius = 3 * math.sqrt(area / math.pi) / float(views.focal)
    assert 0.5 < radius < 0.65
    assert mesh.watertight and mesh.components()[0] == 1
    assert abs(float(mesh.volumes.sum()) / (4 / 3 * math.pi * radius**3) - 1) < 0.15
    assert ((mesh.normals * mesh.vertices).sum(1) > 0).all()


def test_splats_learn_a_known_object() -> None:
    """Plain regression on its views: what score distillation cannot do better than."""
    scene, views = ball(500), ring(8, 24, elevation=15.0, distance=2.6)
    wanted = truth(SOLIDS[PROMPTS[0]], views)[0]
    rates = {"means": 6e-3, "scales": 0.02, "quats": 0.02, "opacity": 0.05, "colours": 0.05}
    optim = torch.optim.Adam([{"params": [getattr(scene, n)], "lr": lr} for n, lr in rates.items()], betas=(0.9, 0.95))
    gen = torch.Generator().manual_seed(0)
    for _ in range(60):
        some = torch.randint(8, (2,), generator=gen)
        image = scene.render(views.pick(some), white(views.pick(some))).image
        optim.zero_grad()
        (image - wanted[some]).square().sum().div(2).backward()
        optim.step()
        scene.constrain()
    held = ring(4, 24, elevation=15.0, distance=2.6, offset=22.5)
    assert psnr(seen(scene, held).image, truth(SOLIDS[PROMPTS[0]], held)[0]) > 22


@pytest.mark.gpu
def test_gsplat_shows_the_same() -> None:
    pytest.importorskip("gsplat")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    splats = Splats(*(part.float().cuda().requires_grad_() for part in vars(needles()).values()))
    views = ring(3, 40, elevation=20.0).to(splats.means)
    found = []
    for way in (gaussians.by_tiles, gaussians.by_gsplat):
        picture, screen = way(splats, views)
        values = torch.cat([picture.colour, picture.alpha, picture.depth], 1)
        weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).cuda()
        slopes = torch.autograd.grad((values * weight).sum(), [*vars(splats).values(), screen])
        found.append((values, *slopes))
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 2e-3  # gsplat stops where light is below 1e-4


def test_rotations_are_rotations() -> None:
    turn = rasteriser.rotation(needles().quats)
    assert torch.allclose(turn @ turn.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(120, 3, 3))
    assert torch.allclose(torch.linalg.det(turn), torch.ones(120, dtype=torch.float64))
    quarter = rasteriser.rotation(torch.tensor([[1.0, 0, 0, 1.0]]))[0]  # w x y z: about z, x becomes y
    assert torch.allclose(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6)
