"""Steering on words and hills with exact tilts; the known faults of published code, planted and seen caught."""

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.rewards.toy import Words, variation
from limbeck.core.run.checks import Check
from limbeck.core.run.rng import generator
from limbeck.core.steering import checks, noise, particles, value
from limbeck.core.steering.particles import Particles, Steering

SCHEMES = ("multinomial", "systematic", "stratified", "residual")


def assert_all(found: list[Check]) -> None:
    assert [check for check in found if not check.passed] == []


@pytest.mark.parametrize("check", [checks.fk_tilt, checks.twisted_tilt, checks.svdd_tilt, checks.simple_choices])
def test_checks_pass(check) -> None:
    assert_all(check())


def test_the_words_have_the_numbers_of_their_docstring() -> None:
    words = Words()
    tilt = words.tilt()
    assert float(words.table @ words.reward) == pytest.approx(-0.130, abs=5e-4)
    assert float(tilt @ words.reward) == pytest.approx(1.392, abs=5e-4)
    assert words.objective(tilt) == pytest.approx(0.690, abs=5e-4)
    assert variation(words.table, tilt) == pytest.approx(0.680, abs=5e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_children_are_as_many_as_the_weights_say(scheme: particles.Scheme) -> None:
    logw = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64))
    index = particles.resample(logw.repeat(4000, 1), scheme, generator(0, scheme, 0))
    counts = torch.nn.functional.one_hot(index, 4).double().sum(1).view(4000, 2, 4)
    expected = 4 * particles.normalised(logw)
    assert (counts.mean(0) - expected).abs().max() < 0.06
    spread = counts[:, 0].std(0)
    if scheme != "multinomial":  # a particle of weight 1/2 has its two children nearly for certain
        assert spread[0] < 0.65 < math.sqrt(4 * 0.5 * 0.5)
    if scheme == "residual":
        assert counts[:, 0, 0].min() >= 2 and counts[:, 0, 1].min() >= 1
    if scheme == "systematic":
        assert (counts - expected).abs().max() < 1


def test_weights_of_a_dead_group_are_even_and_huge_ones_stay_finite() -> None:
    logw = torch.tensor([[-math.inf, -math.inf], [1e5, 1e5 - math.log(3)]], dtype=torch.float64)
    assert particles.normalised(logw).tolist() == [[0.5, 0.5], pytest.approx([0.75, 0.25], rel=1e-6)]
    assert particles.effective(logw).tolist() == pytest.approx([2.0, 1.6])


def test_groups_do_not_mix_and_their_conditions_follow() -> None:
    """Two groups with opposite rewards, told apart by their condition."""
    words = Words()
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(512).double()
    gen = generator(0, "groups", 0)
    out = particles.steer(
        words.teacher(), checks.first_hitting(), checks.masked(1024), checks.TIMES, Steering(512, 0.1),
        value.plug_in(lambda x: words.score(x) * sign, 0.1, 1, gen), lambda x: words.score(x) * sign,
        {"sign": sign}, gen,
    )  # fmt: skip
    means = words.score(out.x).view(2, -1).mean(1)
    assert means[0] > 1.8 and means[1] < -1.0
    assert out.rewards.shape == (2, 512) and bool((words.score(out.x) * sign == out.rewards.flatten()).all())
    assert (words.score(out.x)[out.best()] * torch.tensor([1.0, -1.0])).tolist() == out.rewards.amax(1).tolist()


def test_the_mean_weight_is_the_evidence() -> None:
    """exp(log mean weight) estimates E exp(r/T): nothing is lost when groups are resampled."""
    words = Words()
    logw = checks.words_steered(64, total=6400)[1].log_weights
    truth = float(torch.log(words.table @ torch.exp(words.reward / words.beta)))
    assert float(torch.logsumexp(logw.flatten(), 0) - math.log(logw.numel())) == pytest.approx(truth, abs=0.1)


def test_fault_weights_dropped_when_a_group_is_not_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adaptive mode of the published code: variation .37 (exact values) where carried weights give .02."""
    plain = particles.effective

    def forgetful(log_weights: Tensor) -> Tensor:
        size = plain(log_weights)
        log_weights[size >= 0.5 * log_weights.shape[1]] = 0.0
        return size

    monkeypatch.setattr(particles, "effective", forgetful)
    assert checks.words_steered(64)[0] > 0.15


def test_fault_the_last_potential_does_not_divide_by_the_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(self: Particles, new: Tensor) -> None:
        self.__dict__["kept"] = torch.zeros_like(new)

    monkeypatch.setattr(Particles, "spent", property(lambda self: self.__dict__["kept"], put), raising=False)
    assert checks.words_steered(64, "max", exact=False)[0] > 0.12


def test_fault_children_are_weighted_but_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def stay(self: Particles, index: Tensor, chosen: Tensor, step: int) -> Tensor:
        self.log_weights = torch.zeros_like(self.log_weights)
        return torch.arange(index.numel())

    monkeypatch.setattr(Particles, "select", stay)
    assert checks.words_steered(64)[0] > 0.5


def test_fault_twisted_proposals_without_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(particles.Move, "log_ratio", lambda self, kernel, plain: torch.zeros(len(self.x)).double())
    assert checks.words_steered(64, twist=True)[0] > 0.1


def test_a_groups_fit_is_checked() -> None:
    words = Words()
    with pytest.raises(ValueError, match="10 rows are no whole groups of 4"):
        particles.steer(
            words.teacher(), checks.first_hitting(), checks.masked(10), checks.TIMES, Steering(4),
            lambda step: words.value(words.teacher(), step.x), words.score,
        )  # fmt: skip


def test_reno_keeps_the_best_reward_and_its_norm() -> None:
    assert_all(checks.reno_norm())
    z = torch.randn(3, 8, generator=generator(0, "z", 0))
    found = noise.optimise(lambda z: -z.square().sum(1), z, noise.Ascent(steps=4))
    assert torch.equal(found.reward, found.history.amax(0)) and found.history.shape == (5, 3)
    assert torch.allclose(-found.noise.square().sum(1), found.reward)
    assert not found.noise.requires_grad


@pytest.mark.parametrize(
    ("wrong", "norm"),
    [
        (lambda z: z.square().sum(1) / 2, 0.0),
        (lambda z: z.square().sum(1) / 2 - z.shape[1] * z.norm(dim=1).log(), 16.0),
    ],
)
def test_fault_renos_norm_without_its_log_or_with_d_in_place_of_d_less_one(wrong, norm: float) -> None:
    z = 3 * torch.randn(2, 256, generator=generator(0, "shell", 0), dtype=torch.float64)
    end = checks.settled(wrong, z).norm(dim=1)
    assert (end - norm).abs().max() < 1e-6 and (end - 255**0.5).abs().min() > 1e-3


def test_each_noises_gradient_is_clipped_by_itself() -> None:
    gradient = torch.tensor([[3.0, 4.0], [0.03, 0.04]])
    assert torch.allclose(noise.clipped(gradient, 0.1), torch.tensor([[0.06, 0.08], [0.03, 0.04]]))


def test_a_drawn_guess_is_a_word_and_the_mean_of_many_is_the_soft_value() -> None:
    words, gen = Words(), generator(0, "guess", 0)
    teacher, x = words.teacher(), torch.tensor([[3, 1, 2, 0]])  # one mask: guesses are exact draws
    pred = teacher.predict(x, torch.tensor([0.5]), {})
    found = value.expected(pred, words.score, words.beta, 4000, gen)
    assert float(found) == pytest.approx(float(words.value(teacher, x)), abs=0.02)
    assert float(value.expected(pred, words.score, words.beta)) in words.reward.tolist()
