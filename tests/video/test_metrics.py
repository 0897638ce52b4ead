"""The measures of clips against values known by arithmetic, and against clips that would cheat."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.fidelity import frechet_distance
from limbeck.core.run.errors import BadInput
from limbeck.domains.video import metrics, shapes
from limbeck.domains.video.config import Shapes

RATE = torch.full((1,), 12.0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [-1,1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def frozen(x: Tensor) -> Tensor:
    """The first frame all the time."""
    return x[:, :, :1].expand_as(x)


@pytest.fixture(scope="module")
def moving() -> shapes.Drawn:
    return shapes.ShapeData(Shapes()).draw(72, torch.Generator().manual_seed(0))


def pooled(x: Tensor) -> Tensor:
    """Features of pictures [N,3,H,W]: their colours in a coarse grid."""
    return F.adaptive_avg_pool2d(x, 4).flatten(1)


def test_a_still_clip_has_the_best_of_all_but_motion() -> None:
    still = frozen(noise(2, 3, 8, 32, 32))
    for found in (metrics.flicker(still), metrics.neighbour_smoothness(still)):
        assert found.tolist() == [1, 1]
    for measure in (metrics.subject_consistency, metrics.background_consistency):
        torch.testing.assert_close(measure(still, pooled), torch.ones(2))
    assert metrics.displacement(still).max() == 0 and metrics.dynamic_degree(still, RATE.expand(2)) == 0


def test_pure_noise_flickers_by_a_third() -> None:
    x = noise(4, 3, 8, 32, 32)
    assert metrics.flicker(x).mean() == pytest.approx(1 - 85 / 255, abs=0.002)
    assert 0.4 < metrics.flicker(x * 10).mean() < 0.6, "values are clamped as in a file: more contrast, more flicker"


def test_flicker_and_smoothness_of_brightness() -> None:
    ramp = torch.linspace(-1, 1, 16).view(1, 1, 16, 1, 1).expand(1, 3, 16, 8, 8)
    assert metrics.flicker(ramp).item() == pytest.approx(1 - 1 / 15, abs=1e-3)
    assert metrics.neighbour_smoothness(ramp).item() == pytest.approx(1, abs=0.003)  # levels are rounded
    blink = torch.tensor([-1.0, 1.0] * 8).view(1, 1, 16, 1, 1).expand(1, 3, 16, 8, 8)
    assert metrics.flicker(blink).item() == metrics.neighbour_smoothness(blink).item() == 0
    hold = torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(1, 1, 4, 1, 1).expand(1, 3, 4, 8, 8)
    assert metrics.neighbour_smoothness(hold).item() == 0.5  # one odd frame has both neighbours; the last has not


def test_consistency_is_the_formula_of_both_neighbours() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    found = metrics.consistency(torch.stack([torch.stack([a, b, b]), torch.stack([a, b, a]), torch.stack([a, -a, a])]))
    # before, first: (0,0) (1,0); (0,0) (0,1); negative cosines count as 0: (0,0) (0,1)
    assert found.tolist() == [0.25, 0.25, 0.25]
    assert metrics.consistency(torch.stack([torch.stack([a, a, b])])).item() == 0.5


def test_background_is_the_border_alone() -> None:
    x = frozen(noise(1, 3, 8, 32, 32)).clone()
    inside, outside = x.clone(), x.clone()
    inside[..., 8:24, 8:24] = noise(1, 3, 8, 16, 16, seed=1)
    outside[..., :4, :] = noise(1, 3, 8, 4, 32, seed=1)
    still, subject, ground = (metrics.background_consistency(part, pooled).item() for part in (x, inside, outside))
    assert subject == pytest.approx(still, abs=1e-6) and ground < 0.99
    assert metrics.subject_consistency(inside, pooled).item() < 0.99


def test_motion_is_measured_in_pixels(moving: shapes.Drawn) -> None:
    x, speed = moving.x[:12, :, :5], moving.velocity[:12].norm(dim=1)
    found = metrics.displacement(x)
    assert found.shape == (12, 4)
    torch.testing.assert_close(found.mean(1), speed, rtol=0.35, atol=0)
    large = F.interpolate(x.flatten(1, 2), scale_factor=4).view(12, 3, 5, 128, 128)
    torch.testing.assert_close(metrics.displacement(large).mean(1), 4 * speed, rtol=0.35, atol=0)
    assert metrics.dynamic_degree(x, RATE.expand(12)) == 1, "and a frozen copy does not move"
    assert metrics.dynamic_degree(frozen(x), RATE.expand(12)) == 0
    assert torch.equal(found, metrics.displacement(x))


def test_pairs_of_two_clips_are_never_compared() -> None:
    one, two = noise(1, 3, 4, 32, 32), noise(1, 3, 4, 32, 32, seed=1)
    assert metrics.displacement(torch.cat([frozen(one), frozen(two)])).max() == 0


def test_the_rule_of_the_dynamic_degree() -> None:
    fast, slow = torch.full((1, 15), 0.51), torch.full((1, 15), 0.49)  # 6/256 * 32 * 8/12 = .5
    assert metrics.moving(fast, RATE, 32).all() and not metrics.moving(slow, RATE, 32).any()
    assert not metrics.moving(fast, RATE / 2, 32).any(), "at half the rate the same step is half the speed"
    assert not metrics.moving(fast, RATE, 64).any(), "the threshold grows with the picture"
    some = torch.zeros(2, 15)
    some[0, :4], some[1, :3] = 1, 1
    assert metrics.moving(some, RATE.expand(2), 32).tolist() == [True, False]


def test_without_opencv_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BadInput, match=r"limbeck\[video\]"):
        metrics.displacement(noise(1, 3, 2, 8, 8))


def test_velocities_of_shapes_in_noise(moving: shapes.Drawn) -> None:
    torch.testing.assert_close(metrics.velocities(moving.x), moving.velocity, atol=0.05, rtol=0)
    rough = moving.x + 0.2 * noise(*moving.x.shape)
    torch.testing.assert_close(metrics.velocities(rough), moving.velocity, atol=0.1, rtol=0)


def test_direction_accuracy_and_who_fails_it(moving: shapes.Drawn) -> None:
    x, prompts = moving.x, moving.prompts
    assert metrics.direction_accuracy(x, prompts) == 1
    assert metrics.direction_accuracy(x.flip(2), prompts) == 0, "played backwards"
    assert metrics.direction_accuracy(frozen(x), prompts) == 0, "at rest"
    assert metrics.direction_accuracy(x.transpose(-1, -2), prompts) == 0, "axes swapped"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert metrics.direction_accuracy(x[order], prompts) < 0.5, "prompts of others"


def test_sharpness() -> None:
    edge = torch.ones(1, 3, 2, 8, 8)
    edge[..., :4] = -1
    assert metrics.sharpness(edge).item() == pytest.approx(2 / 7)
    x = noise(2, 3, 4, 16, 16)
    soft = F.avg_pool3d(x, (1, 3, 3), 1, (0, 1, 1))
    assert (metrics.sharpness(soft) < 0.5 * metrics.sharpness(x)).all()


def test_changes_tell_what_the_frames_alone_do_not() -> None:
    """Frames in another order are the same pictures: only the differences between them tell."""
    made = shapes.ShapeData(Shapes())
    real, other = (made.draw(96, torch.Generator().manual_seed(seed)).x for seed in (1, 2))
    torn = other[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(3))]

    def apart(x: torch.Tensor, reference: torch.Tensor) -> float:
        return frechet_distance(pooled(metrics.frames(x)), pooled(metrics.frames(reference)))

    near, far = (apart(x, real) for x in (other, torn))
    assert far == pytest.approx(near, rel=1e-3)
    floor, found, still = (apart(metrics.changes(x), metrics.changes(real)) for x in (other, torn, frozen(other)))
    assert found > 20 * floor and still > 5 * floor


def test_measures_that_need_more_frames_say_so() -> None:
    one = noise(1, 3, 1, 8, 8)
    for measure in (metrics.flicker, metrics.neighbour_smoothness, metrics.displacement, metrics.velocities):
        with pytest.raises(BadInput, match="frames or more, not 1"):
            measure(one)
