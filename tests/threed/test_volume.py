"""The volume renderer: alpha and depth known exactly, conventions of cameras, fits, normals, shading, sparing work."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.run.errors import BadInput
from limbeck.domains.threed import posed, volume
from limbeck.domains.threed.cameras import Cameras, lamp, orbit, ring
from limbeck.domains.threed.config import HashGrid, Nerf, Sampling, Voxels
from limbeck.domains.threed.scene import seen


class Fog(nn.Module):
    """Constant density; the colour is the place."""

    channels, radius = 3, 1.0

    def __init__(self, density: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(density, dtype=torch.float64))
        self.most = 0

    def density(self, points: Tensor) -> Tensor:
        self.most = max(self.most, len(points))
        return self.value.to(points).expand(len(points))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(points) + 0 * points.sum(1), points

    def grids(self) -> list[Tensor]:
        return []


class Ball(Fog):
    """A soft ball of radius `reach` around `centre`."""

    centre, reach = (0.0, 0.0, 0.0), 0.5

    def density(self, points: Tensor) -> Tensor:
        self.most = max(self.most, len(points))
        away = (points - points.new_tensor(self.centre)).square().sum(1).sqrt()
        return self.value.to(points) * torch.sigmoid((self.reach - away) / 0.02)


class Marked(Ball):
    """That ball with a red patch on +x, a blue cap on +z, and green on +y, dark elsewhere."""

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        colour = torch.where(points > 0.3, 1.0, -1.0)
        return self.density(points), colour[:, [0, 1, 2]]


def even(samples: int, proposal: int = 0, occupancy: int = 0) -> Sampling:
    return Sampling(samples=samples, proposal=proposal, occupancy=occupancy)


def double(cameras: Cameras) -> Cameras:
    return cameras.to(torch.zeros((), dtype=torch.float64))


def white(cameras: Cameras, channels: int = 3) -> Tensor:
    return torch.ones(len(cameras), channels, dtype=cameras.fov.dtype)


def exact(cameras: Cameras, density: float) -> tuple[Tensor, Tensor]:
    """Alpha and depth [V,H,W] of fog in the unit ball, by geometry alone."""
    origin, ray = cameras.rays()
    middle = -(origin * ray).sum(-1)
    half = (1 - (origin + middle[..., None] * ray).square().sum(-1)).clamp_min(0).sqrt()
    passed = torch.exp(-density * 2 * half)
    along = (middle - half) * (1 - passed) + (1 - passed * (1 + density * 2 * half)) / density
    ahead = (ray * cameras.forward[:, None, None]).sum(-1)
    return 1 - passed, along * ahead


@pytest.mark.parametrize(("proposal", "jitter"), [(0, None), (0, 0.37), (16, 0.37)])
def test_fog_is_exact(proposal: int, jitter: float | None) -> None:
    cameras = double(ring(2, 9, elevation=20))
    moved = None if jitter is None else torch.full((2,), jitter, dtype=torch.float64)
    views = volume.Nerf(Fog(0.8), even(200, proposal)).render(cameras, white(cameras), moved)
    alpha, depth = exact(cameras, 0.8)
    assert torch.allclose(views.alpha[:, 0], alpha, atol=1e-12)  # wherever the samples lie
    assert torch.allclose(views.depth[:, 0], depth, atol=2e-3 if jitter is None else 6e-3)  # half an interval
    assert alpha.max() > 0.7 and alpha.min() == 0  # the picture's corners miss the ball


def test_a_camera_inside_sees_what_is_ahead() -> None:
    cameras = double(orbit(*(torch.tensor([value]) for value in (0.3, 0.2, 0.5, 0.6)), 5, 5))
    alpha = volume.Nerf(Fog(0.8), even(8)).render(cameras, white(cameras)).alpha
    assert alpha[0, 0, 2, 2].item() == pytest.approx(1 - math.exp(-0.8 * 1.5), abs=1e-6)


def test_rays_of_another_length_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    cameras = double(ring(1, 9))
    alpha, _ = exact(cameras, 0.8)
    rays = Cameras.rays
    monkeypatch.setattr(Cameras, "rays", lambda self: (rays(self)[0], rays(self)[1] * 1.06))
    wrong = volume.Nerf(Fog(0.8), even(50)).render(cameras, white(cameras)).alpha[:, 0]
    assert (wrong - alpha).abs().max() > 0.02


def test_front_is_in_front_and_up_is_up() -> None:
    scene = volume.Nerf(Marked(80.0), even(48))
    front, left, back, right = seen(scene, ring(4, 33, elevation=0, distance=3.0)).image  # from +x, +y, -x, -y
    assert (front[:, 16, 16] > 0.5).tolist() == [True, False, False]
    assert (back[:, 16, 16] > 0.5).tolist() == [False, False, False]
    assert (left[:, 16, 16] > 0.5).tolist() == [False, True, False]
    assert [(front[:, row, 16] > 0).tolist() for row in (10, 22)] == [[True, False, True], [True, False, False]]
    assert (front[1, 16, 22] > 0, front[1, 16, 10] > 0) == (True, False)  # +y is at the right, seen from the front
    assert (right[0, 16, 22] > 0, right[0, 16, 10] > 0) == (True, False)  # and +x, seen from -y


def pool(size: int, swapped: bool = False) -> Cameras:
    """Forty cameras, or what they become where azimuth and elevation are mistaken for each other."""
    azimuth = torch.arange(40) * (2 * math.pi / 40)
    elevation = torch.tensor([-0.1, 0.3, 0.8, 0.1, 0.5] * 8)
    if swapped:
        azimuth, elevation = elevation, azimuth
    one = torch.ones(40)
    return orbit(azimuth, elevation, 2.6 * one, math.radians(40) * one, size, size)


def fitted(config: Nerf, rate: float, steps: int, swapped: bool = False) -> float:
    """The PSNR on held-out views of a scene fitted to posed pictures of a ball."""
    solid, size = posed.SOLIDS[posed.PROMPTS[0]], 16
    cameras, known = pool(size, swapped), posed.truth(solid, pool(size))[0]
    torch.manual_seed(0)
    scene = volume.scene(config, 3)
    optim = torch.optim.Adam(scene.parameters(), lr=rate, betas=(0.9, 0.99))
    gen = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(40, generator=gen)[:4]
        some = cameras.pick(rows)
        found = scene.render(some, torch.ones(4, 3), torch.rand(4, generator=gen)).image
        optim.zero_grad()
        (found - known[rows]).square().sum().div(4).backward()
        optim.step()
    held_out = posed.held_out(size)
    error = (seen(scene, held_out).image - posed.truth(solid, held_out)[0]) / 2
    return float(-10 * error.square().mean((1, 2, 3)).log10().mean())


def test_a_ball_is_fitted_from_posed_views() -> None:
    assert fitted(Nerf(field=Voxels(size=28)), 0.15, 150) > 32


def test_a_hash_grid_fits_it_too() -> None:
    small = HashGrid(levels=4, entries=13, base=6, finest=40, hidden=24)
    assert fitted(Nerf(field=small, sampling=even(16, 16, 16)), 0.02, 100) > 25


def test_mistaken_angles_are_caught() -> None:
    assert fitted(Nerf(field=Voxels(size=24)), 0.15, 60, swapped=True) < 20


def test_gradients() -> None:
    """Of all that a picture has, with respect to densities and colours; normals need second derivatives."""
    torch.manual_seed(0)
    scene = volume.scene(Nerf(field=Voxels(size=4), sampling=even(5), oriented=True), 3).double()
    cameras = double(ring(1, 3))
    gen = torch.Generator().manual_seed(0)
    inputs = [torch.randn(p.shape, generator=gen, dtype=torch.float64, requires_grad=True) for p in scene.parameters()]
    names = [name for name, _ in scene.named_parameters()]

    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scene = scene

        def forward(self) -> tuple[Tensor, ...]:
            views = self.scene.render(cameras, white(cameras) * 0.3, torch.tensor([0.2]))
            assert views.normals is not None
            return views.image, views.alpha, views.depth, views.normals, views.aux["facing"]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        given = {f"scene.{name}": value for name, value in zip(names, values, strict=True)}
        found: tuple[Tensor, ...] = torch.func.functional_call(Shown(), given, ())
        return found

    assert torch.autograd.gradcheck(call, tuple(inputs))


def test_a_step_repeats_with_two_threads(threads: None) -> None:
    torch.manual_seed(0)
    scene = volume.scene(Nerf(field=Voxels(size=16), oriented=True), 3)
    cameras = ring(2, 20)

    def gradients() -> list[Tensor]:
        views = scene.render(cameras, white(cameras), torch.tensor([0.1, 0.6]))
        loss = views.image.square().sum() + views.aux["facing"].square().sum() + views.depth.sum()
        return list(torch.autograd.grad(loss, list(scene.parameters())))

    first = gradients()
    assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("step", [None, 0.01])
def test_normals_point_out(step: float | None) -> None:
    scene = volume.Nerf(Ball(200.0), even(200), oriented=True, step=step)
    cameras = double(ring(3, 15, elevation=30))
    views = scene.render(cameras, white(cameras))
    assert views.normals is not None
    middle = views.normals[:, :, 7, 7]
    assert torch.allclose(middle, F.normalize(cameras.position, dim=1), atol=2e-2)
    weights, facing = views.aux["weights"], views.aux["facing"]
    at_centre = 7 * 15 + 7
    assert (weights[at_centre] * facing[at_centre]).sum().item() == pytest.approx(-1, abs=0.02)
    with torch.no_grad():
        shown = scene.render(cameras, white(cameras))
    assert shown.normals is not None and torch.allclose(shown.normals, views.normals.detach(), atol=1e-9)


def test_normals_cost_nothing_where_nobody_asks() -> None:
    views = volume.Nerf(Ball(50.0), even(8)).render(ring(1, 4), torch.ones(1, 3))
    assert views.normals is None and set(views.aux) == {"weights", "places", "widths"}


def test_lambert() -> None:
    colour, up = torch.tensor([[0.6, -1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    beside = torch.tensor([[0.0, math.sqrt(3), 1.0]])  # 60 degrees
    assert torch.allclose(volume.shaded(colour, up, beside, "diffuse"), (colour + 1) * 0.55 - 1)
    assert torch.allclose(volume.shaded(colour, up, beside, "textureless"), torch.full((1, 3), 0.1))
    assert torch.allclose(volume.shaded(colour, up, -up, "diffuse"), (colour + 1) * 0.1 - 1)  # lit from behind


def test_shading_lights_the_lamp_s_side() -> None:
    cameras, light = ring(2, 15, elevation=0), torch.tensor([[3.0, 0.0, 0.0]]).expand(2, 3)
    scene = volume.Nerf(Ball(100.0), even(100))
    front, back = scene.render(cameras, white(cameras), shading="textureless", light=light).image[:, :, 7, 7]
    assert front.min() > 0.9 and back.max() < -0.7
    lamps = lamp(cameras.position, torch.zeros(2, 3), torch.tensor([0.8, 1.5]))
    assert torch.allclose(lamps, cameras.position / 3 * torch.tensor([[0.8], [1.5]]), atol=1e-5)


def test_what_cannot_be_shaded() -> None:
    with pytest.raises(BadInput, match="lamp"):
        volume.Nerf(Ball(1.0), even(4)).render(ring(1, 4), torch.ones(1, 3), shading="diffuse")
    latent = volume.scene(Nerf(field=Voxels(size=4)), 4)
    assert latent.render(ring(1, 4), torch.zeros(1, 4)).image.shape == (1, 4, 4, 4)
    with pytest.raises(BadInput, match="latent"):
        latent.render(ring(1, 4), torch.zeros(1, 4), shading="diffuse", light=torch.ones(1, 3))


def test_jitter_moves_samples_of_each_ray_differently() -> None:
    scene, cameras = volume.Nerf(Ball(20.0), even(12)), ring(2, 8)
    still, moved, again = (
        scene.render(cameras, white(cameras), torch.tensor(u)) for u in ([0.0, 0.0], [0.4, 0.0], [0.4, 0.0])
    )
    assert torch.equal(moved.image, again.image)
    assert not torch.equal(still.image[0], moved.image[0]) and torch.equal(still.image[1], moved.image[1])
    assert (still.image - moved.image).abs().max() < 0.3
    places, widths = still.aux["places"], still.aux["widths"]
    hit = widths[:, 0] > 0
    offsets = ((places[:, 0] - (places[:, 1] - widths[:, 0])) / widths[:, 0])[hit]  # evenly spaced
    assert offsets.abs().max() < 1e-4
    origin, ray = (x.reshape(-1, 3) for x in cameras.rays())
    share = ((places[:, 0] - volume.ball(origin, ray, 1.0)[0]) / widths[:, 0])[hit]
    assert share.min() > -1e-3 and share.max() < 1 + 1e-3
    assert 0.2 < share.std() < 0.4  # uniform: .29


def test_without_a_graph_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, cameras = volume.Nerf(Ball(20.0), even(12, 8)), ring(2, 16)
    graph = scene.render(cameras, white(cameras))
    assert scene.body.most > 2000  # type: ignore[attr-defined]
    monkeypatch.setattr(volume, "SAMPLES", 600)
    scene.body.most = 0  # type: ignore[attr-defined]
    with torch.no_grad():
        plain = scene.render(cameras, white(cameras))
    assert scene.body.most <= 600 and plain.aux == {}  # type: ignore[attr-defined]
    assert torch.allclose(plain.image, graph.image.detach(), atol=1e-6)
    assert torch.allclose(plain.depth, graph.depth.detach(), atol=1e-5)


def test_empty_cells_are_left_out() -> None:
    """A small ball that no cell's corner need meet is not lost, wherever it lies."""
    body = Ball(40.0)
    body.centre, body.reach = (0.45, -0.3, 0.1), 0.2
    cameras = ring(2, 16)
    looked, views = [], []
    for cells in (0, 16):
        body.most = 0
        scene = volume.Nerf(body, even(32, 0, cells))
        views.append(scene.render(cameras, white(cameras)))
        looked.append(body.most if not cells else int((views[-1].aux["weights"] > 0).sum()))
    assert looked[1] < 0.4 * looked[0]
    assert (views[0].alpha - views[1].alpha).abs().max() < 0.02
    assert (views[0].image - views[1].image).abs().max() < 0.04


def test_proposals_go_where_something_is() -> None:
    cameras = double(ring(2, 16))
    fine = volume.Nerf(Ball(80.0), even(400)).render(cameras, white(cameras))
    few = volume.Nerf(Ball(80.0), even(16)).render(cameras, white(cameras))
    sought = volume.Nerf(Ball(80.0), even(16, 16)).render(cameras, white(cameras))
    error = [(v.depth - fine.depth).square().mean().sqrt().item() for v in (few, sought)]
    assert error[1] < 0.6 * error[0]
    widths = sought.aux["widths"].sum(1)
    assert torch.allclose(widths, few.aux["widths"].sum(1))  # they fill the ball from one end to the other


def test_refined_edges_by_hand() -> None:
    edges = torch.linspace(0, 8, 9)[None].double()
    weight = torch.tensor([[0.0, 0, 0, 1, 0, 0, 0, 0]]).double()
    found = volume.refined(edges, weight, 4)[0]
    assert found[0] == 0 and found[-1] == 8
    # The three widened intervals have weight 1 each, and .02 * 3 / 8 is added to all: .06 + 3 in all.
    extra = 0.06 / 8
    assert found[1].item() == pytest.approx(2 + (3.06 / 4 - 2 * extra) / (1 + extra))
    assert found[2].item() == pytest.approx(2 + (3.06 / 2 - 2 * extra) / (1 + extra))
    flat = volume.refined(edges, torch.zeros(1, 8).double(), 8)[0]
    assert torch.allclose(flat, edges[0])  # where nothing is they are even
