"""Alignment on words and on a line with known answers; the known faults of published code, planted and seen caught."""

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.alignment import checks, losses
from limbeck.core.alignment.rollout import Rollout, roll
from limbeck.core.diffusion.sampling import ddim, mask
from limbeck.core.rewards.toy import Shifted, Words, Writer
from limbeck.core.run.rng import generator

LOG2 = math.log(2)


@pytest.mark.parametrize("check", [checks.policy_line, checks.draft_truncation, checks.dpo_identities])
def test_checks_pass(check) -> None:
    assert [c for c in check() if not c.passed] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("check", [checks.reinforce_words, checks.prdp_words])
def test_words_come_to_the_tilt(check) -> None:
    assert [c for c in check() if not c.passed] == []


def test_fault_a_stored_state_with_its_graph_has_no_gradient() -> None:
    """With x_s reparameterised and not detached, log p does not depend on theta: the forgotten detach."""
    model, gen = Shifted(), generator(0, "graph", 0)
    kernel = ddim(1.0, floor=0.01)
    x = torch.randn(64, 1, generator=gen, dtype=torch.float64)
    t, s = torch.full((64,), 0.8), torch.full((64,), 0.6)
    pred = model.predict(x, t, {})
    x_s = kernel.propose(pred, x, t, s, gen)
    (wrong,) = torch.autograd.grad(kernel.log_prob(pred, x, x_s, t, s).sum(), model.theta, retain_graph=True)
    (right,) = torch.autograd.grad(kernel.log_prob(pred, x, x_s.detach(), t, s).sum(), model.theta)
    assert float(wrong) == 0.0 and abs(float(right)) > 0.1


def test_a_rollout_says_what_the_sampler_said_and_its_ratio_starts_at_one() -> None:
    model, rollout, logp = checks.line_rollout(0.3, 16)
    assert not rollout.states.requires_grad and len(rollout.usable) == 20
    assert torch.allclose(rollout.log_prob(model), logp, atol=1e-12)
    assert torch.equal(rollout.rows(torch.tensor([3, 1])).x, rollout.x[[3, 1]])
    assert torch.allclose(rollout.last(5).log_prob(model), logp[-5:])
    one, many = rollout.log_prob(model), Rollout(**{**rollout.__dict__, "together": 7}).log_prob(model)
    assert torch.allclose(one, many, atol=1e-12)
    a, b = (torch.autograd.grad(v.sum(), model.theta)[0] for v in (one, many))
    assert torch.allclose(a, b)


def test_conditions_follow_their_rows() -> None:
    words, gen = Words(), generator(0, "rows", 0)
    cond, times = {"k": torch.arange(6)}, torch.linspace(1, 0, 5)
    rollout, _ = roll(words.teacher(), mask(), torch.full((6, 4), 3), times, cond, gen)
    assert rollout.rows(torch.tensor([4, 4])).cond["k"].tolist() == [4, 4]


def test_a_deterministic_sampler_is_refused_and_its_last_step_left_out() -> None:
    model, x, gen = Shifted(), torch.zeros(2, 1, dtype=torch.float64), generator(0, "x", 0)
    with pytest.raises(ValueError, match="use eta > 0"):
        roll(model, ddim(0.0), x, checks.LINE, None, gen)
    assert roll(model, ddim(1.0), x, checks.LINE, None, gen)[0].usable == tuple(range(19))


def test_kl_of_a_policy_from_its_reference_is_an_upper_bound_and_zero_at_the_start() -> None:
    """On a line the path KL of a shift by theta is at least that of the samples, theta^2/2."""
    model, rollout, _ = checks.line_rollout(0.5, 4096)
    kl = rollout.kl(model, Shifted(0.0)).sum(0).mean()
    assert 0.125 <= float(kl.detach()) < 0.5
    assert float(rollout.kl(model, Shifted(0.5)).detach().abs().max()) == 0.0
    assert torch.autograd.grad(kl, model.theta)[0] > 0


def test_fault_kl_of_tokens_at_revealed_positions_is_nothing() -> None:
    """The published form multiplies by the chance of being revealed: zero on hard states, whatever the policy says."""
    words, gen = Words(), generator(0, "kl", 0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        writer = Writer(words)
        torch.nn.init.normal_(writer.net[-1].weight, std=0.2)
    times, start = torch.linspace(1, 0, 17), torch.full((4000, 4), 3)
    rollout, logp = roll(writer, mask(), start, times, None, gen, 16)
    with torch.no_grad():
        path = float(rollout.kl(writer, words.teacher()).sum(0).mean())
        sampled = float((logp - rollout.log_prob(words.teacher())).sum(0).mean())
    assert path == pytest.approx(sampled, rel=0.15) and path > 0.03
    revealed = 0.0
    for i in range(16):
        x = rollout.states[i]
        a, b = (net.predict(x, times[i].expand(4000), {}).logp_x0 for net in (writer, words.teacher()))
        gap = (a.exp() * (a - b) - a.exp() + b.exp()).sum(-1)
        revealed += float((gap * (x != 3)).sum(1).mean())
    assert abs(revealed) < 1e-6


def test_fault_prdp_without_its_beta_or_with_means_over_steps_is_not_solved_by_the_optimum() -> None:
    assert checks.residual_at_optimum() < 1e-9

    def no_beta(logp: Tensor, reference: Tensor, reward: Tensor) -> Tensor:
        return checks.difference(logp, reference, reward, beta=1.0)

    def mean(logp: Tensor, reference: Tensor, reward: Tensor) -> Tensor:
        return checks.difference(logp / 4, reference / 4, reward)

    assert checks.residual_at_optimum(no_beta) > 0.1 and checks.residual_at_optimum(mean) > 0.1


def test_prdp_clips_towards_the_larger_loss() -> None:
    new, old, ref = (torch.tensor([[value], [value]]) for value in (0.5, 0.0, 0.0))
    rewards = (torch.tensor([1.0]), torch.tensor([0.0]))

    def loss(clip: float) -> float:
        return float(losses.proximal_difference((new, -new), (old, old), (ref, ref), rewards, 0.5, clip))

    assert loss(10.0) == 0.0  # 2 x (.5 + .5) is the target of 1/.5
    assert loss(0.1) == pytest.approx((0.4 - 2.0) ** 2)


@pytest.mark.parametrize(("fault", "expected"), [({"shared": False}, 1.64), ({"swapped": True}, -5.85)])
def test_fault_dpo_with_a_noise_for_each_side_or_a_swapped_pair(fault: dict[str, bool], expected: float) -> None:
    assert checks.dpo_line(4.0, **fault)[1] * 4.0 == pytest.approx(expected, abs=0.4)


def test_dpos_optimum_is_inverse_to_beta() -> None:
    assert checks.dpo_line(16.0)[1] * 16.0 == pytest.approx(5.85, abs=0.4)


def test_ppo_stops_pulling_out_of_its_clip_but_always_undoes_harm() -> None:
    old = torch.zeros(1, 2)
    advantage = torch.tensor([1.0, -1.0])

    def slope(logp: float) -> list[float]:
        new = torch.full((1, 2), logp, requires_grad=True)
        return torch.autograd.grad(losses.ppo(new, old, advantage, 0.1), new)[0][0].tolist()

    assert slope(0.0) == [-0.5, 0.5]
    assert slope(0.2)[0] == 0.0 and slope(0.2)[1] > 0  # a good sample is likely enough; a bad one still too likely
    assert slope(-0.2)[0] < 0 and slope(-0.2)[1] == 0.0


def test_pairs_at_the_reference_cost_log_two_and_a_wide_clip_moves_further() -> None:
    zero = torch.zeros(3, 5, dtype=torch.float64)
    assert float(losses.pairwise(zero, zero, 0.1, 0.1)) == pytest.approx(LOG2, abs=1e-12)
    assert float(losses.pairwise(zero, zero, 50.0)) == pytest.approx(LOG2, abs=1e-12)
    won = torch.full((1, 1), 0.5)
    assert losses.pairwise(won, -won, 1.0, 0.9) < losses.pairwise(won, -won, 1.0, 0.1)


def test_weighted_regression_is_a_mean_at_equal_rewards_and_the_best_alone_when_cold() -> None:
    errors = torch.tensor([1.0, 2.0, 6.0])
    assert float(losses.weighted_regression(errors, torch.ones(3), 1.0)) == pytest.approx(3.0)
    cold = losses.weighted_regression(errors, torch.tensor([0.0, 1.0, 0.0]), 1e-3)
    assert float(cold) == pytest.approx(2.0)
