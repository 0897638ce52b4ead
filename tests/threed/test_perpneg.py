"""Perp-Neg by the views: what a camera asks of which prompt, one forward for all, and a run that resumes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded, Output
from limbeck.core.run.build import Build
from limbeck.core.run.distributed import Team
from limbeck.core.run.recipe import Recipe, load
from limbeck.core.run.trainer import Trainer
from limbeck.domains.threed import law
from limbeck.domains.threed.cameras import orbit
from limbeck.domains.threed.config import PerpNeg


def leaning(*azimuths: float, elevation: float = 10.0) -> dict[str, Tensor]:
    azimuth = torch.tensor(azimuths).deg2rad()
    one = torch.ones_like(azimuth)
    return law.leaning(orbit(azimuth, one * elevation * torch.pi / 180, 3 * one, one, 8, 8), PerpNeg())


def test_views_are_blended_by_azimuth() -> None:
    shares = leaning(0, 45, -45, 90, -135, 180)["shares"]
    wanted = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]])
    torch.testing.assert_close(shares[:, :3], wanted, atol=1e-5, rtol=0)
    assert not shares[:, 3].any()
    above = leaning(0, 120, elevation=70)
    assert above["shares"].tolist() == [[0, 0, 0, 1]] * 2 and not above["against"].any()


def test_negatives_fade_towards_their_own_view() -> None:
    """The front is no negative of itself and the worst one of the back; the same for the side."""
    found = leaning(0, 30, 60, 89.999, 90.001, 120, 150, 180)
    front, side = found["against"].T
    assert found["others"].tolist() == [[law.VIEWS.index("front"), law.VIEWS.index("side")]] * 8
    torch.testing.assert_close(front[[0, 3, 4, 7]], torch.tensor([0.0, -1.574, -1.5735, -1.967]), atol=1e-3, rtol=0)
    torch.testing.assert_close(side[[0, 3, 4, 7]], torch.tensor([-1.574, 0.0, 0.0, -0.394]), atol=1e-3, rtol=0)
    assert (front.diff() < 1e-3).all() and (side[:4].diff() > 0).all() and (side[4:].diff() < 0).all()


def recipe(pipeline: Path, *more: str) -> Recipe:
    sets = [f"teacher={{kind: image.teacher, model: {pipeline}}}", "data.prompt=a cat", "data.words=perp_neg"]
    small = ["data.size=16", "student.field.size=8", "steps=2", "checkpoint.every=1", "eval=[]"]
    return load("threed/sds-nerf", [*sets, *small, "stages.0.losses.0.guidance=5.0", *more])


@pytest.mark.parametrize(("operator", "branches"), [("sds", 4), ("asd", 5), ("csd", 2)])
def test_all_branches_are_one_forward(
    operator: str, branches: int, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = recipe(pipeline, f"stages.0.losses.0.operator={operator}"), []
    build = Build(made)
    denoiser = build.piece("teacher").denoiser
    forward = denoiser.forward

    def counted(x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        calls.append((len(x_t), sorted(cond)))
        return forward(x_t, t, cond, features)

    monkeypatch.setattr(denoiser, "forward", counted)
    Trainer(build.objective(made.stages[0]), Team("cpu"), 0, "make", 1, 4).run()
    assert [rows for rows, _ in calls] == [4 * branches]
    assert not [key for key in calls[0][1] if key.startswith("against")]


def test_a_run_resumes(pipeline: Path, resumed: Callable[[Recipe], tuple[bytes, bytes]]) -> None:
    whole, again = resumed(recipe(pipeline))
    assert whole == again
