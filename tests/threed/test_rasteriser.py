"""Our rasteriser against the dense one, against what one Gaussian must look like, and on more threads."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from limbeck.domains.threed import rasteriser
from limbeck.domains.threed.cameras import Cameras, ring
from limbeck.domains.threed.rasteriser import Picture, Splats, dense, render

Frame = tuple[Tensor, ...]


def cloud(n: int, channels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Splats:
    """Needles and dust in all sizes, from hardly visible to opaque."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    parts = [draw(n, 3) * 0.4, math.log(0.05) + draw(n, 3), draw(n, 4), 4 * draw(n), draw(n, channels)]
    return Splats(*(part.to(dtype).requires_grad_() for part in parts))


def cameras(views: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Cameras:
    """The last one stands in the middle of the cloud, with splats behind it and beside it."""
    far, near = ring(views - 1, 1, 20.0, 2.0), ring(1, 1, 0.0, 0.3)
    pose, fov = torch.cat([far.pose, near.pose]), torch.cat([far.fov, near.fov])
    return Cameras(pose.to(dtype), fov.to(dtype), height, width)


def values(picture: Picture) -> Tensor:
    return torch.cat([picture.colour, picture.alpha, picture.depth], 1)


def gradients(way, splats: Splats, views: Cameras) -> tuple[Tensor, Frame]:
    """The picture, and the gradients of a random sum of it on everything, `screen` being the last."""
    screen = splats.means.new_zeros(len(views), len(splats.means), 2, requires_grad=True)
    picture = values(way(splats, views, screen))
    weight = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(picture)
    return picture.detach(), torch.autograd.grad((picture * weight).sum(), [*vars(splats).values(), screen])


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def worst(splats: Splats, views: Cameras) -> tuple[float, float]:
    """How far picture and gradients are from the dense ones."""
    picture, slopes = gradients(render, splats, views)
    wanted, known = gradients(dense, splats, views)
    return apart(picture, wanted), max(apart(a, b) for a, b in zip(slopes, known, strict=True))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_it_is_the_dense_one(channels: int) -> None:
    picture, slopes = worst(cloud(150, channels), cameras(3, 37, 29))
    assert picture < 1e-12 and slopes < 1e-10


def test_it_is_the_dense_one_in_single_precision() -> None:
    picture, slopes = worst(cloud(150, dtype=torch.float32), cameras(3, 37, 29, torch.float32))
    assert picture < 1e-5 and slopes < 5e-5


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rasteriser, "CHUNK", 1)  # a tile at a time
    assert max(worst(cloud(60), cameras(2, 20, 20))) < 1e-10


FAULTS = {
    "boxes of three sigmas": ("SLACK", 0.9),
    "boxes of one sigma": ("SLACK", 0.3),
    "tiles of centres alone": ("SLACK", 0.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_boxes_that_are_too_small(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rasteriser, *FAULTS[fault])
    assert min(worst(cloud(150), cameras(3, 37, 29))) > 1e-4


def test_fault_splats_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rasteriser.Plan.of
    shuffle = lambda seen, *rest: plain(replace(seen, depth=-seen.depth), *rest)  # noqa: E731
    monkeypatch.setattr(rasteriser.Plan, "of", shuffle)
    assert worst(cloud(150), cameras(3, 37, 29))[0] > 1e-2


def test_gradients_are_those_of_differences() -> None:
    gen = torch.Generator().manual_seed(3)
    start = [0.3, math.log(0.35), 1.0, 0.5, 1.0]
    sizes = [(3, 3), (3, 3), (3, 4), (3,), (3, 2), (2, 3, 2)]
    draws = [torch.randn(size, generator=gen, dtype=torch.float64) for size in sizes]
    parts = [0.2 * draws[0], start[1] + 0.2 * draws[1], draws[2], 0.5 + 0.3 * draws[3], draws[4], 0.1 * draws[5]]
    views = cameras(3, 10, 12).pick(slice(0, 2))
    sums = torch.randn(2 * 4 * 10 * 12, 12, generator=gen, dtype=torch.float64)  # of pixels, for speed

    def shown(*inputs: Tensor) -> Tensor:
        return values(render(Splats(*inputs[:5]), views, inputs[5])).flatten() @ sums

    assert torch.autograd.gradcheck(shown, [part.requires_grad_() for part in parts], eps=1e-6, atol=1e-6)


def one(scale: float, opacity: float) -> Splats:
    """A round splat at the origin."""
    logit = torch.tensor([opacity], dtype=torch.float64).logit()
    log = torch.full((1, 3), math.log(scale), dtype=torch.float64)
    turn, colour = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    return Splats(torch.zeros(1, 3, dtype=torch.float64), log, turn, logit, colour)


def moments(scale: float) -> tuple[float, float, float]:
    """The largest alpha, and the measured and expected variance in pixels, of one round splat of opacity .9."""
    views = ring(1, 33, 0.0, 3.0).to(torch.zeros((), dtype=torch.float64))
    alpha = render(one(scale, 0.9), views).alpha[0, 0]
    place = torch.arange(33, dtype=torch.float64) - 16
    variance = float((alpha.sum(0) * place**2).sum() / alpha.sum())
    return float(alpha[16, 16]), variance, float((views.focal * scale / 3) ** 2 + 0.3)


@pytest.mark.parametrize("scale", [0.02, 0.05, 0.15])
def test_one_splat_has_its_opacity_and_its_covariance(scale: float) -> None:
    centre, variance, expected = moments(scale)
    assert abs(centre - 0.9) < 1e-12
    assert abs(variance / expected - 1) < 0.05  # alphas below 1/255 are cut, which takes 3 to 4%


def test_fault_no_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rasteriser, "BLUR", 0.0)
    _, variance, expected = moments(0.02)
    assert abs(variance / expected - 1) > 0.2


def test_the_nearer_splat_hides_the_farther() -> None:
    near, far = one(0.2, 0.999), one(0.2, 0.999)
    both = Splats(
        torch.cat([far.means - 0.5, near.means + torch.tensor([0.5, 0, 0])]), *(
            torch.cat([getattr(far, name), getattr(near, name)]) for name in ("scales", "quats", "opacity")
        ),
        torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64),
    )  # fmt: skip
    picture = render(both, ring(1, 9, 0.0, 3.0).to(both.means))  # it looks along -x: x = .5 is in front
    assert picture.colour[0, 1, 4, 4] > 0.99 and picture.colour[0, 0, 4, 4] < 0.01
    assert abs(float(picture.depth[0, 0, 4, 4] / picture.alpha[0, 0, 4, 4]) - 2.5) < 0.01


def test_nothing_to_see_is_black_and_has_no_gradient() -> None:
    views = cameras(2, 9, 9)
    assert not values(render(Splats(*(part[:0] for part in vars(cloud(1)).values())), views)).any()
    behind = cloud(5)
    with torch.no_grad():
        behind.means[:, 0] += 50.0
    picture, slopes = gradients(render, behind, views.pick(slice(0, 1)))
    assert not picture.any() and not any(slope.any() for slope in slopes)


def test_it_repeats_bit_for_bit_on_more_threads() -> None:
    """Long sums are where threads would show: many splats in one tile, one splat in many tiles."""
    splats, views = cloud(1500, dtype=torch.float32), cameras(2, 24, 24, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(gradients(render, splats, views))
    finally:
        torch.set_num_threads(before)
    for picture, slopes in found[1:]:
        assert torch.equal(picture, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(slopes, found[0][1], strict=True))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("rasteriser")


SMALL = ["--rounds", "1", "--count", "2000", "--size", "64", "--double", "300", "--counts", "300", "600", "900"]


def test_the_benchmark_holds_its_bars(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Small: here a hit gets cheaper with more of them, most of the time being overhead."""
    assert benchmark.main([*SMALL, "--sizes", "16", "32", "64"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n| ") == 3 + 8 + 7 and said.endswith("pass\n")


def test_a_slow_or_different_rasteriser_misses_the_bars(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "render", dense)
    assert len(benchmark.against(300, 32, 1)) == 1
    monkeypatch.setattr(
        benchmark, "render", lambda *args: render(replace(args[0], scales=args[0].scales + 0.01), *args[1:])
    )
    assert benchmark.agreement(300, 32, 100)
