"""MCM: what its maps and its judge see, the order of a step, resuming; planted faults are caught."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from limbeck.core.check import Check
from limbeck.core.diffusion.process import VP
from limbeck.core.distillation.consistency import Leg
from limbeck.core.run.build import Batch, Build
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.core.run.trainer import Trainer
from limbeck.domains.video import config as settings
from limbeck.domains.video import mcm_checks, motion
from limbeck.domains.video.mcm import Judge, Look, Mcm, augmented, picked

TINY = [
    "teacher={kind: video.fresh, channels: [16, 16]}", "batch=2", "steps=3",
    "student.of.times=[1.0, 0.5]", "stages.0.losses.0.intervals=4",
    "stages.0.losses.0.adversary={start: 1, size: 32, width: 8, images: {kind: video.shapes, frames: 8}}",
]  # fmt: skip


def caught(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**other: object) -> tuple[Mcm, Tensor]:
    given = {"intervals": 4, "motion": settings.PlainMap(), "adversary": settings.FrameAdversary(size=32, width=8)}
    objective, sharp, _ = mcm_checks.toy(settings.Mcm(**given | other), clips=2)
    return objective, sharp


def test_what_is_checked_holds() -> None:
    for check in (mcm_checks.appearance, mcm_checks.frequencies, mcm_checks.layout, mcm_checks.head):
        assert caught(check()) == set()


def test_differences_along_another_axis_are_not_blind() -> None:
    wrong = mcm_checks.maps() | {"diff": lambda x: x.diff(dim=3)}
    assert caught(mcm_checks.appearance(wrong)) == {"a still picture in diff"}


def test_a_spectrum_that_is_not_shifted_is_caught() -> None:
    def unshifted(x: Tensor, cutoff: float, order: int) -> Tensor:
        distance = torch.fft.fftshift(motion.radius2(tuple(x.shape[2:]), x.device))  # the mask of a shifted spectrum
        mask = 1 / (1 + (distance / cutoff**2) ** order)
        return torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 3, 4)) * mask, dim=(2, 3, 4)).real

    def space_alone(x: Tensor, cutoff: float, order: int) -> Tensor:
        return motion.low(x.flatten(0, 2)[:, None, None], cutoff, order).view_as(x)

    for wrong in (unshifted, space_alone):
        assert "gains of waves along three axes" in caught(mcm_checks.frequencies(wrong))


def with_gradient(objective: Mcm) -> None:
    rule = objective.rule

    def goal(leg: Leg) -> Tensor:
        return rule.motion(rule.student.denoise(leg.x_next, leg.s, leg.cond).x0)

    rule.goal = goal  # type: ignore[method-assign]


def without_average(objective: Mcm) -> None:
    objective.rule.target = nullcontext


@pytest.mark.parametrize("fault", [with_gradient, without_average])
def test_a_target_head_that_learns_by_itself_is_caught(fault: Callable[[Mcm], None]) -> None:
    assert caught(mcm_checks.head(fault)) == {"the head's gradient, from one apart"}


def mixed_with_batch(x: Tensor, place: Tensor) -> Tensor:
    """Channels taken for frames: [b,C,F,H,W] read as [b,F,C,H,W]."""
    return picked(x.reshape(len(x), x.shape[2], x.shape[1], *x.shape[3:]).transpose(1, 2), place)


class Twice(Judge):
    """Draws its frames anew for each side of a loss."""

    def shown(self, x: Tensor, look: Look) -> Tensor:
        place = torch.rand(look.place.shape, generator=torch.Generator().manual_seed(int(self.seen)))
        self.seen += 1
        return super().shown(x, Look(place, look.change))

    seen = 0


def test_frames_of_a_wrong_layout_and_frames_drawn_twice_are_caught() -> None:
    assert caught(mcm_checks.layout(mixed_with_batch)) == {"frames of a batch, from where they belong"}
    assert caught(mcm_checks.layout(kind=Twice)) == {"logits of clips against themselves"}


def test_each_part_of_a_clip_gives_any_of_its_frames() -> None:
    x = torch.arange(7.0).view(1, 1, 7, 1, 1).expand(4000, -1, -1, -1, -1)
    first, second = picked(x, torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))).flatten(1).T
    assert set(first.tolist()) == {0, 1, 2, 3} and set(second.tolist()) == {3, 4, 5, 6}
    whole = x[:1, :, :1]
    assert torch.equal(picked(whole, torch.tensor([[0.9]])), whole), "a picture is a clip of one frame"


def test_local_and_global_correlation_agree() -> None:
    x = noise(2, 4, 3, 5, 6)
    found, whole = motion.lcor(x, 1), motion.gcor(x)
    assert found.shape == (2, 2, 9, 30) and whole.shape == (2, 2, 30, 30)
    p, q = 2 * 6 + 3, 3 * 6 + 2  # one down and one to the left
    torch.testing.assert_close(found[:, :, 6, p], whole[:, :, p, q])
    torch.testing.assert_close(whole[1, 1, p, q], (x[1, :, 1, 2, 3] * x[1, :, 2, 3, 2]).sum() / 2)
    assert (found[:, :, 0, 0] == 0).all(), "outside of the frame"
    torch.testing.assert_close(motion.sgcor(x), whole * 5**0.5)


def test_augmentation() -> None:
    x = noise(2, 3, 16, 24)
    still = torch.tensor([0.5] * 5 + [2.0, 2.0]).expand(2, -1)  # the hole is far outside
    torch.testing.assert_close(augmented(x, still), x)
    moved = still.clone()
    moved[:, 3], moved[:, 4] = 1.0, 0.0
    out = augmented(x, moved)
    torch.testing.assert_close(out[:, :, 2:, :-3], x[:, :, :-2, 3:], atol=1e-5, rtol=1e-5)
    assert (out[:, :, :2] == 0).all() and (out[..., -3:] == 0).all()
    hollow = augmented(x, torch.tensor([0.5] * 7).expand(2, -1))
    assert (hollow[:, :, 4:12, 6:18] == 0).all() and torch.equal(hollow[:, :, :4] != 0, x[:, :, :4] != 0)
    grey = still.clone()
    grey[:, 0], grey[:, 1] = 0.75, 0.0
    torch.testing.assert_close(augmented(x, grey), (x.mean(1, keepdim=True) + 0.25).expand_as(x), atol=1e-5, rtol=1e-5)


def test_the_first_time_of_the_grid_is_pure_noise() -> None:
    objective, _ = small()
    process = VP("linear")
    objective.rule.teacher.process = process
    x0, seen = torch.full((64, 3, 2, 4, 4), 50.0), {}
    objective.rule.advanced = lambda *given: seen.update(leg=given)  # type: ignore[assignment,method-assign]
    objective.leg(mcm_checks.context(64), x0, {}, 1.0)
    x, t = seen["leg"][:2]
    alpha = process.levels(t)[0]
    first = t == 1
    assert 0 < first.sum() < 64
    assert x[first].mean().abs() < 0.1, "with the data's mean it would be .3"
    torch.testing.assert_close(x[~first].mean((1, 2, 3, 4)), (50 * alpha[~first]).float(), atol=1.0, rtol=0)


def test_mixed_trajectories_start_with_the_judge() -> None:
    objective, _ = small(mixed=1.0, adversary=settings.FrameAdversary(size=32, start=1))
    ctx = mcm_checks.context(2)
    x0, cond = objective.source.real(ctx)
    assert objective.mixed(ctx, x0, cond) is x0
    ctx.step = 1
    ctx.draws._used.clear()
    torch.testing.assert_close(objective.mixed(ctx, x0, cond), x0)  # the student is the exact teacher at first
    with torch.no_grad():
        objective.rule.student.denoiser.net[2].bias.fill_(0.3)  # type: ignore[union-attr,index,operator]
    ctx.draws._used.clear()
    torch.testing.assert_close(objective.mixed(ctx, x0, cond), x0 + 0.3, atol=1e-5, rtol=1e-5)
    objective.config = settings.Mcm(mixed=0.0)
    ctx.draws._used.clear()
    assert objective.mixed(ctx, x0, cond) is x0


@pytest.fixture(scope="module")
def build() -> Build:
    return Build(load("video/mcm", TINY))


def fresh(build: Build) -> Trainer:
    build.forget()
    return Trainer(build.objective("distil"), Team("cpu"), 0, "distil", 3, 2)


def test_a_run_trains_student_map_and_judge_in_this_order_and_resumes(build: Build) -> None:
    trainer = fresh(build)
    trainer.one_step()
    assert isinstance(trainer.objective, Mcm) and list(trainer.objective.players) == ["student", "motion", "judge"]
    assert "judge/hinge" not in trainer.pending and "student/gan" not in trainer.pending, "not before its start"
    kept = {key: value.clone() for key, value in trainer.state().items()}
    trainer.one_step()
    assert {"student/consistency", "student/gan", "judge/hinge"} <= set(trainer.pending)
    known = trainer.state()
    for name in ("student", "motion", "judge"):
        assert any((known[key] != kept[key]).any() for key in kept if key.startswith(f"player/{name}/param/")), name
    again = fresh(build)
    again.load(kept, 1, {})
    again.one_step()
    found = again.state()
    assert found.keys() == known.keys() and all(torch.equal(found[key], known[key]) for key in known)


def test_gradients_repeat_with_two_threads() -> None:
    objective, sharp = small(motion=settings.LocalMap(kind="lcor", radius=3))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(2):
            x, ctx = sharp.clone().requires_grad_(), mcm_checks.context(2)
            assert objective.judge is not None
            loss = (
                objective.judge.fool(ctx, x) + objective.rule.motion(x).square().mean() + motion.low(x, 0.25, 4).std()
            )
            found.append(torch.autograd.grad(loss, x)[0])
        assert torch.equal(*found) and (found[0] != 0).any()
    finally:
        torch.set_num_threads(before)


class Words(mcm_checks.Pictures):
    """Prompts alone."""

    def batch(self, n: int, gen: torch.Generator, rows: slice) -> Batch:
        return Batch(None, [""] * n)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(BadInput, match="boundary condition"):
        Build(load("video/mcm", [*TINY[:-3], "student={kind: few_step, times: [1.0]}"])).objective("distil")
    with pytest.raises(BadInput, match="two frames or more"):
        motion.build(settings.PlainMap(), (3, 32, 32))
    with pytest.raises(BadInput, match="no data"):
        load("video/mcm", ["stages.0.losses.0.adversary.images={kind: video.nothing}"])
    objective, _ = small()
    objective.images = Words()
    assert objective.judge is not None
    with pytest.raises(BadInput, match="no pictures"):
        objective.real(mcm_checks.context(2), objective.judge)
