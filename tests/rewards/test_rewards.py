"""Rewards: shapes, gradients and chunks; rewards of rewards; the judge that ends a run."""

import dataclasses

import pytest
import torch
from torch import Tensor

from limbeck.core.diffusion.codec import Identity
from limbeck.core.rewards import base
from limbeck.core.rewards.base import Reward
from limbeck.core.rewards.config import Judging
from limbeck.core.rewards.panel import Judge, Panel
from limbeck.core.run import recipe
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput, LimbeckError
from limbeck.core.run.rng import Draws

CPU = torch.device("cpu")


def ctx(step: int = 0) -> Context:
    return Context(step, "s", Draws(0, step, 4), 1, 0, CPU)


def first(x: Tensor, cond: base.Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
    return x[:, 0]


def length(x: Tensor, cond: base.Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
    return torch.tensor([float(len(prompt)) for prompt in cond["prompt"]])


FIRST = Reward(first, "first", differentiable=True)
SECOND = Reward(lambda x, cond, *, t, gen: x[:, 1], "second", differentiable=True)
X = torch.tensor([[1.0, 4.0], [2.0, 3.0], [5.0, -1.0]])
COND: base.Condition = {"prompt": ["a", "bb", "ccc"]}


def test_chunks_give_the_same_as_the_whole_and_see_their_own_conditions() -> None:
    seen: list[list[str]] = []

    def score(x: Tensor, cond: base.Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        seen.append(cond["prompt"])
        return x[:, 0] * length(x, cond, t=t, gen=gen)

    assert Reward(score, "r", chunk=2)(X, COND).tolist() == [1.0, 4.0, 15.0]
    assert seen == [["a", "bb"], ["ccc"]]


def test_only_a_differentiable_reward_carries_a_gradient() -> None:
    x = X.clone().requires_grad_(True)
    assert FIRST(x, COND).requires_grad
    closed = dataclasses.replace(FIRST, differentiable=False)
    assert not closed(x, COND).requires_grad
    with pytest.raises(BadInput, match="draft follows the gradient of its reward and first has none; use ddpo"):
        closed.needed_differentiable("draft")


def test_wrong_shapes_and_noisy_samples_are_refused() -> None:
    with pytest.raises(LimbeckError, match=r"gave \[3, 2, 1\] for 3 samples"):
        Reward(lambda x, cond, *, t, gen: x[:, :, None], "r")(X, COND)
    with pytest.raises(LimbeckError, match="clean samples"):
        FIRST(X, COND, t=torch.ones(3))
    noisy = Reward(lambda x, cond, *, t, gen: t, "noisy", noise_aware=True, chunk=1)
    assert noisy(X, COND, t=torch.tensor([0.1, 0.2, 0.3])).tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_rewards_of_rewards() -> None:
    assert base.total([(FIRST, 1.0), (SECOND, -2.0)])(X, COND).tolist() == [-7.0, -4.0, 7.0]
    assert base.ensemble([FIRST, SECOND], "min")(X, COND).tolist() == [1.0, 2.0, -1.0]
    assert base.ensemble([FIRST, SECOND])(X, COND).tolist() == [2.5, 2.5, 2.0]
    assert base.ensemble([FIRST, SECOND], "lower", 2.0)(X, COND).tolist() == [-0.5, 1.5, -4.0]
    assert base.standardised(FIRST, 2.0, 0.5)(X, COND).tolist() == [-2.0, 0.0, 6.0]
    assert base.axis(Reward(lambda x, cond, *, t, gen: x, "both"), 1)(X, COND).tolist() == [4.0, 3.0, -1.0]


def test_z_scores_are_taken_within_a_prompt_and_a_lone_row_gives_nothing() -> None:
    x = torch.tensor([[1.0], [10.0], [3.0], [30.0], [7.0], [5.0], [5.0]], requires_grad=True)
    cond: base.Condition = {"prompt": ["a", "b", "a", "b", "alone", "equal", "equal"]}
    z = base.zscored(FIRST, 1e-6)(x, cond)
    assert z.tolist() == pytest.approx([-1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0], abs=1e-5)
    (slope,) = torch.autograd.grad(z.sum(), x)
    assert slope[:, 0].tolist() == pytest.approx([1.0, 0.1, 1.0, 0.1, 0.0, 0.0, 0.0], abs=1e-5)
    both = base.zscored(Reward(lambda x, cond, *, t, gen: torch.cat([x, -x], 1), "both", chunk=2))(x, cond)
    assert torch.allclose(both[:, 0], z) and torch.allclose(both[:, 1], -z)
    whole = base.zscored(FIRST)(x.detach(), {})
    assert float(whole.mean()) == pytest.approx(0.0, abs=1e-6) and float(whole.std(correction=0)) == pytest.approx(1.0)


def test_a_z_score_in_a_recipe() -> None:
    from limbeck.core.run.build import Build
    from limbeck.core.run.recipe import of

    both = {split: [{"kind": "zscored", "of": {"kind": "toy.letters"}}] for split in ("train", "held_out")}
    made = Build(of({"name": "z", "job": "sample", "steps": 1, "batch": 1, "rewards": both})).piece("rewards.train.0")
    words = torch.tensor([[0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 0, 1]])
    z = made(words, {"prompt": ["", "", "b"]})
    assert sorted(z.tolist()) == pytest.approx([-1.0, 0.0, 1.0], abs=1e-4) and float(z[2]) == 0.0


def test_a_satisfied_hinge_and_a_clip_do_not_pull() -> None:
    x = X.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(base.hinge(FIRST, 2.0)(x, COND).sum(), x)
    assert base.hinge(FIRST, 2.0)(X, COND).tolist() == [-1.0, 0.0, 0.0] and slope[:, 0].tolist() == [1.0, 0.0, 0.0]
    (slope,) = torch.autograd.grad(base.clipped(FIRST, 0.0, 3.0)(x, COND).sum(), x)
    assert slope[:, 0].tolist() == [1.0, 1.0, 0.0]


def test_spaces_that_differ_cannot_be_joined() -> None:
    pixels, tokens = (dataclasses.replace(FIRST, space=space) for space in ("pixels", "tokens"))
    with pytest.raises(BadInput, match="pixels, tokens"):
        base.total([(pixels, 1.0), (tokens, 1.0)])
    assert base.total([(pixels, 1.0), (FIRST, 1.0)]).space == "pixels"


def test_a_cache_scores_each_pair_once() -> None:
    asked: list[int] = []

    def score(x: Tensor, cond: base.Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        asked.append(len(x))
        return x[:, 0] * 10 + length(x, cond, t=t, gen=gen)

    reward = base.cached(Reward(score, "r"), limit=3)
    twice = torch.cat([X, X[:1]])
    assert reward(twice, {"prompt": ["a", "bb", "ccc", "a"]}).tolist() == [11.0, 22.0, 53.0, 11.0]
    assert reward(X[:1], {"prompt": ["a"]}).tolist() == [11.0] and asked == [3]
    assert reward(X[:1], {"prompt": ["another"]}).tolist() == [17.0] and asked == [3, 1]


def panel(*rewards: Reward) -> Panel:
    return Panel(tuple((reward, 1.0) for reward in rewards), Identity())


class Halves(Identity):
    decoded = 0

    def decode(self, z: Tensor) -> Tensor:
        Halves.decoded += 1
        return z / 2

    def read(self, z: Tensor, space: str) -> Tensor:
        return self.decode(z)


def test_each_reward_sees_its_own_space_and_pixels_are_decoded_once() -> None:
    latent, pixels = dataclasses.replace(FIRST, space="latent"), dataclasses.replace(FIRST, space="pixels")
    both = Panel(((latent, 1.0), (pixels, 10.0), (FIRST, 100.0)), Halves())
    assert both.total(ctx(), X, COND).tolist() == [1 + 5 + 50, 2 + 10 + 100, 5 + 25 + 250] and Halves.decoded == 1


def watch(trained: list[float], held: list[float], patience: int | None = 2) -> list[Context]:
    judge, seen = Judge(Judging(every=1, patience=patience), panel(FIRST)), []
    for step, (a, b) in enumerate(zip(trained, held, strict=True)):
        context = ctx(step)
        noise = torch.tensor([-1.0, 1.0, -1.0, 1.0])
        judge.observe(context, (b + noise)[:, None], {"prompt": ["p"] * 4}, a + noise)
        again = Judge(Judging(every=1, patience=patience), panel(FIRST))
        again.load(judge.state())
        judge = again  # a resume between any two steps changes nothing
        seen.append(context)
    return seen


def test_the_gap_is_in_deviations_of_the_first_samples() -> None:
    last = watch([0.0, 3.0], [5.0, 6.0])[-1].logged
    assert last["held_out"] == 6.0 and last["gap"] == pytest.approx(3.0 - 1.0, rel=1e-6)


def test_a_run_ends_when_the_held_out_side_falls_while_the_trained_one_rises() -> None:
    falling = watch([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 0.5, 0.4])
    assert [bool(c.finish) for c in falling] == [False, False, False, True]
    assert not any(c.finish for c in watch([0.0, 1.0, 0.5, 0.4], [0.0, 1.0, 0.5, 0.4]))  # both fall
    assert not any(c.finish for c in watch([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 0.5, 1.1]))  # it came back
    assert not any(c.finish for c in watch([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 0.5, 0.4], None))


def test_a_clip_without_an_end_is_refused() -> None:
    with pytest.raises(BadInput, match="give `low`, `high` or both"):
        recipe.load("sequence/drakes-dna", ["rewards.train.0.high=null"])
