"""R-precision, the Janus check and A-LPIPS: what true views give, and what planted faults do."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.core.rewards.base import Reward
from limbeck.core.rewards.pieces import inner
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.domains.threed import known, metrics, posed
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.objects import objects

torch.set_num_threads(1)
EASY = ["potted plant", "fire extinguisher", "cupcake", "basketball"]


@dataclass(frozen=True)
class TwoFaced(posed.Solid):
    """The front's colours on the back too."""

    def colour(self, p: Tensor) -> Tensor:
        return super().colour(torch.cat([p[..., :1].abs(), p[..., 1:]], -1))


def two_faced(solid: posed.Solid) -> TwoFaced:
    return TwoFaced(solid.shape, solid.front, solid.back, solid.patch)


@pytest.mark.parametrize("prompt", [posed.PROMPTS[i] for i in (0, 1, 6, 7)])
def test_two_faces_are_told_from_one(prompt: str) -> None:
    """Also when the pictures are as blurred and noisy as those of an asset."""
    truth = known.Known(posed.held_out(32), *posed.truth(posed.SOLIDS[prompt], posed.held_out(32)))
    wrong = posed.truth(two_faced(posed.SOLIDS[prompt]), truth.cameras)[0]
    noise = 0.2 * torch.randn(truth.image.shape, generator=torch.Generator().manual_seed(0))
    soft = torch.nn.functional.avg_pool2d(truth.image, 5, 1, 2)
    assert known.psnr(soft + noise, truth.image) < 22
    assert [metrics.janus(image, truth) for image in (truth.image, soft + noise)] == [0.0, 0.0]
    assert [metrics.janus(image, truth) for image in (wrong, wrong + noise)] == [1.0, 1.0]


def taken(index: int, direction: Tensor) -> Tensor:
    """The training view [3,32,32] of an object whose camera is nearest to a direction."""
    set_ = objects()
    away = torch.nn.functional.normalize(set_.training_pose[index, :, :, 3], dim=1) @ direction
    return set_.training[index, int(away.argmax()), :3].float() / 127.5 - 1


def test_known_objects_have_one_face() -> None:
    """True views from cameras a few degrees off, and the same from the other side for every view from behind."""
    found = []
    for index, name in enumerate(objects().names):
        truth = objects().known(name)
        assert truth is not None and len(metrics.opposites(truth.cameras)) == 6
        one, two = truth.image.clone(), truth.image.clone()
        place = torch.nn.functional.normalize(truth.cameras.position, dim=1)
        for back in (place[:, 0] < 0).nonzero()[:, 0].tolist():
            one[back] = taken(index, place[back])
            two[back] = taken(index, place[back] * torch.tensor([-1.0, -1.0, 1.0]))
        found.append([metrics.janus(image, truth) for image in (truth.image, one, two)])
    exact, near, planted = torch.tensor(found, dtype=torch.float64).T
    assert not exact.any() and near.mean() < 0.06 and planted.mean() > 0.6
    assert int(((near < 0.5) & (planted >= 0.5)).sum()) >= 28  # of 36; tables, crates and pots are as good as round


def test_a_front_that_looks_like_the_back_is_no_sign() -> None:
    cameras = ring(8, 8, offset=10)
    image = torch.linspace(-1, 1, 8 * 3 * 64).view(8, 3, 8, 8)
    same = image[:4].repeat(2, 1, 1, 1)
    assert metrics.janus(image, known.Known(cameras, same, same[:, :1])) is None


def test_opposites_stand_behind_at_one_elevation() -> None:
    cameras = ring(8, 8, offset=10)
    azimuth = torch.rad2deg(cameras.angles()[0])
    pairs = metrics.opposites(cameras)
    assert len(pairs) == 4 and all(abs(azimuth[i]) > 90 > abs(azimuth[j]) for i, j in pairs)
    assert all(float((azimuth[i] - azimuth[j]).abs()) == pytest.approx(180, abs=1e-2) for i, j in pairs)
    high = ring(8, 8, elevation=45, offset=10)
    assert not metrics.opposites(replace(cameras, pose=torch.cat([cameras.pose[:4], high.pose[4:]])))


def painted(x: Tensor, cond: dict[str, Any], *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
    """A judge of plain colours: how much of the colour that the prompt names."""
    names = [prompt.split(",")[0] for prompt in cond["prompt"]]
    return torch.stack([x[i, ["red", "green", "blue"].index(name)].mean() for i, name in enumerate(names)])


def test_r_precision_counts_views() -> None:
    image = torch.full((4, 3, 2, 2), -1.0)
    image[:3, 1] = 1.0
    image[3, 0] = 1.0
    judge = Reward(painted, "painted")
    assert metrics.r_precision(judge, image, "green", ["red", "green", "blue"]) == 0.75
    assert metrics.r_precision(judge, image, "red", ["green", "blue"]) == 0.25
    assert metrics.r_precision(judge, torch.zeros(4, 3, 2, 2), "green", ["red", "blue"]) == 0  # ties are no success


def test_words_of_views_in_front_and_behind() -> None:
    cameras = ring(12, 4)

    def knows(x: Tensor, cond: dict[str, Any], *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return x.mean((1, 2, 3)) * torch.tensor([1.0 if "front" in prompt else -1.0 for prompt in cond["prompt"]])

    one_face = cameras.angles()[0].cos()[:, None, None, None].expand(12, 3, 4, 4)
    judge = Reward(knows, "knows")
    assert metrics.front_words(judge, one_face, cameras, "a cat") == (1.0, 0.0)
    assert metrics.front_words(judge, one_face.abs() + 0.1, cameras, "a cat") == (1.0, 1.0)


def build(*sets: str) -> Build:
    small = ["student.field.size=8", "data.size=16", "steps=1"]
    return Build(load("threed/sds-nerf", [*small, *sets]))


def rewards(*sets: str) -> tuple[Reward, Reward]:
    """The embedded ones, by their names."""
    made = build("eval.0.judge={kind: image.text}", "eval.0.likeness={kind: image.perceptual, least: 32}", *sets)
    config: Any = made.recipe.eval[0]
    return inner(config.judge, made), inner(config.likeness, made)


def test_true_views_of_objects_are_found_by_the_embedded_judge() -> None:
    judge, _ = rewards()
    truth = [objects().known(name) for name in EASY]
    images = [found.image[:4:2] for found in truth if found]
    right = [metrics.r_precision(judge, image, name, EASY) for image, name in zip(images, EASY, strict=True)]
    assert sum(right) / 4 > 0.7 and metrics.r_precision(judge, images[0], EASY[1], EASY) == 0  # chance is .25


def test_neighbouring_views_that_flicker_cost_more() -> None:
    _, likeness = rewards()
    views = posed.truth(posed.SOLIDS[posed.PROMPTS[1]], ring(24, 32, distance=2.6))[0][:6]
    noise = torch.randn(views.shape, generator=torch.Generator().manual_seed(0))
    plain, little, much = (metrics.between_neighbours(likeness, views + s * noise) for s in (0.0, 0.1, 0.3))
    assert 0 < plain < little < much
    one = torch.full((4, 3, 32, 32), 1.0)
    one[3] = views[0]
    each = -float(likeness(one[3:], {"image": one[:1]}))
    assert metrics.between_neighbours(likeness, one) == pytest.approx(2 * each / 4, rel=1e-4)  # the loop is closed


def test_the_table_has_them() -> None:
    sets = ["eval.0.judge={kind: image.text}", "eval.0.likeness={kind: image.perceptual, least: 32}"]
    made = build(*sets, "eval.0.views=4", "eval.0.prompts=[cupcake]", "data.prompt=potted plant", "space.size=16")
    rows = {row["what"]: row for row in made.piece("eval.0")()}
    judge = next(key for key in rows["scene"] if str(key).startswith("R-precision"))
    assert judge == "R-precision (image.text a)" and rows["scene"]["chance"] == 0.5
    assert rows["the object itself"][judge] == 1.0
    assert float(rows["scene"]["A-LPIPS (HED VGG16)"]) >= 0 and 0 <= float(rows["scene"]["Janus"]) <= 1
    assert math.isfinite(float(rows["scene"]["PSNR"])) and "Janus" not in rows["the object itself"]
    unknown = build(sets[0], "eval.0.prompts=[cupcake]", "data.prompt=a cat", "space.size=16")
    (row,) = unknown.piece("eval.0")()
    assert {'"front" in front', '"front" behind'} <= set(row) and "Janus" not in row and row["chance"] == 0.5
    with pytest.raises(BadInput, match="among others"):
        build("eval.0.judge={kind: image.text}", "eval.0.prompts=[horse]").piece("eval.0")()
