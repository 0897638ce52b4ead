"""The objectives that recipes use, on a line where every answer is known."""

import copy

import pytest
import torch
from torch import Tensor

from limbeck.core.alignment import backprop, config, policy
from limbeck.core.alignment.tuning import Tuning
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import FewStep, Model
from limbeck.core.distillation.source import Source
from limbeck.core.rewards.base import Reward
from limbeck.core.rewards.config import Judging
from limbeck.core.rewards.panel import Judge, Panel
from limbeck.core.rewards.toy import Shifted
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player
from limbeck.core.run.rng import Draws
from limbeck.core.run.trainer import Trainer

CPU = torch.device("cpu")
WALK = config.Walk(steps=20, guidance=1.0, floor=0.01)  # the card's line
OPTIM = OptimConfig(kind="adam", lr=0.05, clip=None)


class Line(Model):
    """Twenty steps that start where the noise is not quite all."""

    def grid(self, steps: int) -> Tensor:
        return torch.linspace(0.995, 0, steps + 1, dtype=torch.float64)


def quadratic(x: Tensor, cond: object, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
    return -((x[:, 0] - 1) ** 2) / 2


def tuning(differentiable: bool = True) -> Tuning:
    model = Line(Shifted().requires_grad_(False), (1,), Identity(), lambda prompts: {}, "line")
    student = FewStep(copy.deepcopy(model.denoiser).requires_grad_(True), (0.995,))
    panel = Panel(((Reward(quadratic, "quadratic", differentiable=differentiable), 1.0),), Identity())
    source = Source(model, student, None, {})
    return Tuning(source, panel, Judge(Judging(), panel), Player("student", student, OPTIM, 100))


def train(objective, steps: int, batch: int = 256) -> float:
    Trainer(objective, Team("cpu"), 0, "s", steps, batch).run()
    return float(objective.tuning.student.theta.detach())


def context(step: int = 0, batch: int = 64) -> Context:
    return Context(step, "s", Draws(0, step, batch), 1, 0, CPU)


@pytest.mark.parametrize(
    "settings",
    [
        config.Draft(walk=WALK, last=20),
        config.Draft(walk=WALK, last=5),
        config.AlignProp(walk=WALK),
        config.Refl(walk=WALK, lo=0.5, hi=0.75),
        config.Draft(walk=WALK, last=1, noises=4),
    ],
    ids=["draft-20", "draft-5", "alignprop", "refl", "draft-lv"],
)
def test_every_truncation_climbs(settings: backprop.Gradient) -> None:
    made = tuning()
    theta = train(backprop.Ascent(made, lambda ctx: backprop.backpropagate(made, settings, ctx)), 40)
    assert theta > (0.05 if getattr(settings, "last", 2) == 1 else 0.4)


def test_a_kl_term_holds_the_student_back_and_is_logged() -> None:
    ends = []
    for weight in (0.0, 10.0):
        made, settings = tuning(), config.Draft(walk=WALK, last=20, kl=weight)
        ends.append(train(backprop.Ascent(made, lambda ctx: backprop.backpropagate(made, settings, ctx)), 60))  # noqa: B023
    assert 0.0 < ends[1] < 0.5 * ends[0]


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="draft follows the gradient of its reward and quadratic has none; use ddpo"):
        tuning(differentiable=False).trained.needed_differentiable("draft")


def objective(kind: str, **more: object):
    made = tuning(differentiable=False)
    settings = getattr(config, kind.capitalize())(walk=WALK, optim=OPTIM, **more)
    build = type("Plain", (), {"device": CPU})()
    original = Tuning.of
    Tuning.of = classmethod(lambda cls, *args: made)  # type: ignore[method-assign,assignment]
    try:
        return getattr(policy, f"build_{kind}")(settings, build)
    finally:
        Tuning.of = original  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "more", "low", "high"),
    [
        ("ddpo", {"clip": 0.1, "inner": 2}, 0.8, 1.2),
        ("reinforce", {"beta": 1.0}, 0.2, 0.8),
        ("prdp", {"beta": 1.0}, 0.2, 0.8),
        ("prdp", {"beta": 1.0, "clip": 0.5, "inner": 2}, 0.2, 0.8),
        ("d3po", {"beta": 1.0, "clip": 0.1}, 0.2, 2.0),
        ("rwr", {"temperature": 1.0}, 0.1, 1.2),
    ],
)
def test_every_policy_method_climbs(kind: str, more: dict[str, object], low: float, high: float) -> None:
    """With a KL price of 1 the best shift of the mean is about 1/2; without one it is 1."""
    assert low < train(objective(kind, **more), 50) < high


def test_the_first_ratio_is_one_and_the_reference_is_what_the_student_was() -> None:
    made = objective("ddpo")
    found = made.collect(context())
    assert torch.allclose(made.log_prob(context(), found), found.old, atol=1e-10)
    assert torch.allclose(found.old, found.reference, atol=1e-10) and not found.old.requires_grad


def test_the_last_step_is_left_out_unless_it_has_a_floor() -> None:
    made = objective("ddpo")
    assert len(made.collect(context()).old) == 20
    made.config = made.config.model_copy(update={"walk": config.Walk(steps=20, guidance=1.0)})
    assert made.collect(context(1)).rollout.usable == tuple(range(19))


def test_pairs_rank_neighbours_and_drop_ties() -> None:
    reward = torch.tensor([1.0, 2.0, 5.0, 5.0, 4.0, 3.0])
    found = policy.Trajectories(None, reward, reward, reward, [])  # type: ignore[arg-type]
    winner, loser = found.pairs()
    assert winner.tolist() == [4, 1] and loser.tolist() == [5, 0]


def test_advantages_use_a_prompts_own_past_once_it_is_long_enough() -> None:
    stats = policy.PromptStats(buffer=4, fewest=3)
    first = stats.advantages(["a", "a", "b", "b"], torch.tensor([0.0, 2.0, 10.0, 12.0]))
    assert first.mean().abs() < 1e-6 and first[0] < first[1] < 0 < first[2] < first[3]
    second = stats.advantages(["a", "b"], torch.tensor([4.0, 8.0]))
    assert second.tolist() == pytest.approx([(4 - 2) / 1.632993, (8 - 10) / 1.632993], rel=1e-4)
    again = policy.PromptStats(buffer=4, fewest=3)
    again.load(stats.state())
    assert again.known == stats.known
    for _ in range(5):
        again.advantages(["a"], torch.tensor([7.0]))
    assert next(iter(again.known.values())) == [7.0] * 4


def test_odd_groups_make_no_pairs() -> None:
    for kind in ("prdp", "d3po"):
        with pytest.raises(BadInput, match="per_prompt: 3 makes no pairs"):
            objective(kind, per_prompt=3)


def test_r0_ignores_the_scale_of_a_reward() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.003, 0.004]])
    assert torch.allclose(backprop.unit(gradient), torch.tensor([[0.6, 0.8], [0.6, 0.8]]))
