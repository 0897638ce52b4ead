"""The closed-form teacher, the cameras' conventions and the law they are drawn from."""

import math

import pytest
import torch

from limbeck.core.diffusion.process import VP
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import Draws
from limbeck.domains.threed import known, law, posed
from limbeck.domains.threed.cameras import Cameras, direction, look_at, ring
from limbeck.domains.threed.config import Law

SPHERE = posed.PROMPTS[0]


def context(batch: int = 4, rank: int = 0, world: int = 1, step: int = 0) -> Context:
    return Context(step, "make", Draws(0, step, batch, rank, world), world, rank, torch.device("cpu"))


def test_a_camera_is_where_it_says_and_looks_at_the_origin() -> None:
    cameras = ring(4, 16, elevation=30, distance=2.5)
    azimuth, elevation = cameras.angles()
    assert torch.allclose(torch.rad2deg(azimuth) % 360, torch.tensor([0.0, 90.0, 180.0, 270.0]), atol=1e-3)
    assert torch.allclose(torch.rad2deg(elevation), torch.full((4,), 30.0), atol=1e-3)
    assert torch.allclose(cameras.position + 2.5 * cameras.forward, torch.zeros(4, 3), atol=1e-5)
    turn = cameras.pose[:, :, :3]
    assert torch.allclose(torch.linalg.det(turn), torch.ones(4), atol=1e-5)  # right-handed
    assert (turn[:, 2, 1] > 0).all()  # up is up in the picture


def test_rays_agree_with_the_projection() -> None:
    cameras = ring(3, 8, elevation=20)
    origin, ray = cameras.rays()
    turn, shift = cameras.view()
    point = origin + 2.0 * ray
    seen = torch.einsum("vij,vhwj->vhwi", turn, point) + shift[:, None, None]
    u = seen[..., 0] / seen[..., 2] * cameras.focal[:, None, None] + 4
    v = seen[..., 1] / seen[..., 2] * cameras.focal[:, None, None] + 4
    rows, columns = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
    assert torch.allclose(u, columns.expand_as(u), atol=1e-4)
    assert torch.allclose(v, rows.expand_as(v), atol=1e-4)  # row 0 is the top
    assert torch.allclose(ray.norm(dim=-1), torch.ones_like(u))


def test_rows_bring_the_cameras_back() -> None:
    cameras = ring(3, 24)
    back = Cameras.of(cameras.rows())
    assert torch.equal(back.pose, cameras.pose) and torch.equal(back.fov, cameras.fov)
    assert (back.height, back.width) == (24, 24)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "word"),
    [(0, 10, "front"), (44, 0, "front"), (90, 0, "side"), (-136, 0, "back"), (180, 0, "back"), (0, 61, "overhead")],
)
def test_view_words(azimuth: float, elevation: float, word: str) -> None:
    assert direction(azimuth, elevation) == word


def test_front_shows_the_patch_and_up_is_up() -> None:
    front, back = posed.truth(posed.SOLIDS[SPHERE], ring(2, 33, elevation=0, distance=2.6))[0]
    assert front[:, 16, 16].argmax() == 1  # green
    assert back[:, 16, 16].argmax() == 2  # blue
    overhead = posed.truth(posed.SOLIDS[posed.PROMPTS[2]], ring(1, 33, elevation=80, distance=2.6))[1][0, 0]
    assert overhead[16, 16] < 0.1  # the torus has its hole along z


def cond(views: int = 2, label: int = 0) -> dict[str, torch.Tensor]:
    return {"object": torch.full((views,), label), "camera": ring(views, 12, distance=2.6).rows()}


def test_the_teacher_is_exact() -> None:
    """The score equals the gradient of the log-density, with an object and without one."""
    teacher = posed.Posed(VP(), 0.05)
    views = torch.stack([posed.truth(s, ring(2, 12, distance=2.6))[0] for s in posed.SOLIDS.values()]).double()
    gen = torch.Generator().manual_seed(0)
    for label in (0, -1):
        t = torch.tensor([0.9, 0.9])
        alpha, sigma = teacher.process.coefficients(t, views[0])
        x = alpha * views[0] + sigma * torch.randn(views[0].shape, generator=gen, dtype=torch.float64)
        x.requires_grad_()
        means = views[:1] if label == 0 else views
        variance = (alpha * 0.05) ** 2 + sigma**2
        logs = -(x - alpha * means).square().div(2 * variance).flatten(2).sum(2)
        (score,) = torch.autograd.grad(torch.logsumexp(logs, 0).sum(), x)
        found = teacher.predict(x.detach(), t, cond(label=label))
        assert torch.allclose(found.score.double(), score, atol=1e-3 * float(score.abs().max()))


def test_the_law_spreads_azimuths_and_repeats() -> None:
    config = Law(prompt="a horse", spread=0.33)
    prompts, asked = law.Law(config).ask(context(), ["a horse"] * 4)
    azimuth = torch.rad2deg(Cameras.of(asked["camera"]).angles()[0]) % 360
    gaps = azimuth.sort().values.diff()
    assert (gaps > 90 * (1 - 0.67)).all() and (gaps < 90 * 1.67).all()
    again = law.Law(config).ask(context(), ["a horse"] * 4)[1]
    assert all(torch.equal(asked[key], again[key]) for key in asked)
    assert prompts == ["a horse"] * 4 and asked["background"].tolist() == [[1.0, 1.0, 1.0]] * 4


def test_processes_share_one_circle() -> None:
    config = Law(prompt="a horse", background="random", jitter=0.1)
    whole = law.Law(config).ask(context(), ["a horse"] * 4)[1]
    parts = [law.Law(config).ask(context(4, rank, 2), ["a horse"] * 2)[1] for rank in range(2)]
    for key in whole:
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts])), key


def test_words_follow_the_camera() -> None:
    config = Law(prompt="a horse", words=True, spread=0.0, azimuth=(0.0, 0.001))
    prompts, _ = law.Law(config).ask(context(2), ["a horse"] * 2)
    assert prompts == ["a horse, front view"] * 2


def test_bad_laws_are_told() -> None:
    with pytest.raises(BadInput, match="no prompt"):
        law.build(Law(prompt=" "), None)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="elevation: 50 is above 10"):
        law.Law(Law(prompt="a", elevation=(50.0, 10.0))).ask(context(), ["a"] * 4)
    with pytest.raises(BadInput, match="there is no solid"):
        posed.encode(["a red and blue spere with a green patch"])


def test_psnr_and_held_out_cameras() -> None:
    one = torch.zeros(2, 3, 4, 4)
    assert known.psnr(one, one + 0.2) == pytest.approx(20.0, abs=1e-3)
    cameras = posed.held_out(8)
    assert len(cameras) == 12 and math.degrees(float(cameras.angles()[1][-1])) == pytest.approx(35, abs=1e-3)
    assert torch.allclose(
        look_at(cameras.position, torch.zeros(12, 3), torch.tensor([[0.0, 0, 1]]).expand(12, 3)), cameras.pose
    )
