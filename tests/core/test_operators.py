"""Operators against closed forms, and the wrong variants that the method cards name, each seen caught."""

import inspect

import pytest
import torch

from limbeck.core.diffusion.denoiser import Prediction
from limbeck.core.diffusion.guidance import combine
from limbeck.core.diffusion.process import VP
from limbeck.core.distillation import checks
from limbeck.core.distillation.operators import (
    BRANCHES,
    DIVERGENCES,
    OPERATORS,
    asd,
    auto_bsd,
    bsd,
    dmd,
    dot,
    f_distill,
    min_norm,
    nfsd,
    operator,
    rows,
    sds,
    surrogate,
    vsd,
)

torch.set_num_threads(1)

CLOSED_FORM = [
    checks.sds_csd_identity,
    checks.fixed_points,
    checks.swiftbrush_guidance,
    checks.divergence_weights,
    checks.sim_identity,
    checks.asd_shift,
    checks.bsd_minimum,
    checks.dmd_normaliser,
]


def passes(found):
    return all(check.passed for check in found)


def prediction(eps, t=0.4, kind="eps"):
    process, time = VP("cosine"), torch.full((len(eps),), t, dtype=torch.float64)
    gen = torch.Generator().manual_seed(5)
    x_t = torch.randn(eps.shape, generator=gen, dtype=eps.dtype)
    return Prediction(eps, x_t, time, process, kind)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("check", CLOSED_FORM, ids=lambda f: f.__name__)
def test_closed_form_check_passes(check):
    for found in check():
        assert found.passed, f"{found.name}: {found.measured} against {found.bound}"


def test_sim_identity_holds_for_other_distances():
    assert passes(checks.sim_identity(c=1.0)) and passes(checks.sim_identity(c=2.0))


# --- planted faults -------------------------------------------------------------------------------------------------


def test_guidance_off_by_one_is_caught():
    assert not passes(checks.sds_csd_identity(lambda c, u, g: combine(c, u, g + 1 if g != 1 else g)))


@pytest.mark.parametrize(
    "wrong",
    [lambda b: -vsd.on(b), lambda b: sds.on(b), lambda b: b["teacher"].eps, lambda b: vsd.on(b) / 1 + 0.1 * sds.on(b)],
    ids=["sign", "no critic, noise instead", "no critic, nothing instead", "some noise left"],
)
def test_wrong_vsd_is_caught(wrong):
    assert not passes(checks.fixed_points(wrong)[:2])


def test_critic_with_guidance_is_caught():
    assert not passes(checks.fixed_points(critic_guidance=7.5)[:2])


def test_frozen_critic_is_caught():
    line, first = checks.Line(), checks.Line()
    frozen = lambda b: b["teacher"].eps - first.branches(b["x"])["critic"].eps  # noqa: E731
    mean, std = line.descend(frozen)
    assert abs(mean - 1) > 0.1 or abs(std - 0.5) > 0.1


def test_swiftbrush_with_plain_critic_is_caught():
    found = checks.swiftbrush_guidance(critic_guidance=1.0)
    assert not any(check.passed for check in found)
    line = checks.Line(mu=1.0, s=0.5)
    size = (line.w[:, None] * 0.36 * vsd.on(line.branches(line.sample().detach(), 4.5, 1.0)).abs()).sum()
    assert size > 0.2  # the card's mean |grad|; exactly 0 with the same guidance


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "rkl"])
def test_inverted_ratio_is_caught(name):
    assert checks.divergence_error(name, lambda r: DIVERGENCES[name].h(1 / r)) > 0.05


def test_one_divergence_for_another_is_caught():
    assert checks.divergence_error("js", DIVERGENCES["kl"].h) > 0.05


@pytest.mark.parametrize("fault", [{"detach_x_t": True}, {"detach_nets": True}], ids=["x_t", "the nets' inputs"])
def test_detached_sim_is_caught(fault):
    assert checks.sim_identity(**fault)[0].measured > 0.05


def test_asd_with_its_own_noise_is_caught():
    assert not checks.asd_shift(shared=False)[0].passed


def test_asd_with_smaller_t_is_caught():
    coefficient, pull, _ = checks.asd_shift(shift=-0.1)
    assert not coefficient.passed and not pull.passed


def test_asd_without_shift_learns_nothing():
    assert not checks.asd_shift(shift=0.0)[0].passed


def test_swapped_bsd_is_caught():
    def swapped(g1, g2):
        gap = dot(g1 - g2, g1 - g2)
        a = (dot(g2 - g1, g2) / gap.clamp_min(1e-300)).clamp(0, 1)
        return rows(1 - a, g1) * g1 + rows(a, g1) * g2

    assert not checks.bsd_minimum(swapped)[0].passed


def test_bsd_with_one_share_for_the_batch_is_caught():
    def shared(g1, g2):
        a = (((g2 - g1) * g2).sum() / (g1 - g2).square().sum().clamp_min(1e-300)).clamp(0, 1)
        return a * g1 + (1 - a) * g2

    assert not checks.bsd_minimum(shared)[0].passed


def test_bsd_with_the_noise_subtracted_is_caught():
    cond, uncond = prediction(randn(8, 5)), prediction(randn(8, 5, seed=1))
    right = min_norm(18 * (cond.eps - uncond.eps), uncond.eps)
    wrong = min_norm(18 * (cond.eps - uncond.eps), uncond.eps - randn(8, 5, seed=2))
    assert torch.equal(bsd(cond, uncond), right) and not torch.allclose(right, wrong)


def test_batch_mean_normaliser_is_caught():
    def batch_mean(x, teacher, critic):
        return (critic.x0 - teacher.x0) / (x - teacher.x0).abs().mean()

    scaling, alone = checks.dmd_normaliser(batch_mean)
    assert scaling.passed and not alone.passed


def test_no_normaliser_is_caught():
    scaling, _ = checks.dmd_normaliser(lambda x, teacher, critic: critic.x0 - teacher.x0)
    assert not scaling.passed


# --- each operator --------------------------------------------------------------------------------------------------


def test_every_operator_is_short_and_states_what_it_reads():
    for name, one in OPERATORS.items():
        assert len(inspect.getsource(one.residual).splitlines()) <= 15, name
        assert set(one.reads) <= set(BRANCHES) and one.space in ("eps", "x0"), name
        assert "space" in inspect.getdoc(one.residual), name


def test_weight_laws_are_those_of_the_cards():
    laws = {name: one.weight for name, one in OPERATORS.items()}
    assert {laws[name] for name in ("sds", "csd", "nfsd", "vsd", "asd")} == {"sigma2"}
    assert laws["bsd"] == "alpha" and {laws[name] for name in ("auto_bsd", "dmd", "f_distill")} == {"one"}


def test_nfsd_uses_the_negative_only_at_large_t():
    cond, uncond, negative = (prediction(randn(4, 3, seed=i), t=0.1) for i in range(3))
    expected = uncond.eps + 7.5 * (cond.eps - uncond.eps)
    assert torch.allclose(nfsd(cond, uncond, negative), expected)
    cond, uncond, negative = (prediction(randn(4, 3, seed=i), t=0.5) for i in range(3))
    expected = uncond.eps - negative.eps + 2 * (cond.eps - uncond.eps)
    assert torch.allclose(nfsd(cond, uncond, negative, scale=2.0), expected)


def test_auto_bsd_scale_is_per_sample():
    cond, uncond, eps = prediction(randn(8, 3, 2)), prediction(randn(8, 3, 2, seed=1)), randn(8, 3, 2, seed=2)
    whole = auto_bsd(cond, uncond, eps)
    one = auto_bsd(prediction(cond.eps[2:3]), prediction(uncond.eps[2:3]), eps[2:3])
    assert torch.allclose(whole[2:3], one)
    noise, sigma = uncond.eps - eps, uncond.process.sigma(uncond.t).view(-1, 1, 1)
    size = noise.flatten(1).norm(dim=1).view(-1, 1, 1) * sigma / 50
    assert torch.allclose(whole, size * min_norm(cond.eps - uncond.eps, 1.25 * noise))


def test_f_distill_is_dmd_times_h():
    x, teacher, critic = randn(6, 2), prediction(randn(6, 2, seed=1)), prediction(randn(6, 2, seed=2))
    h = torch.rand(6, dtype=torch.float64)
    assert torch.equal(f_distill(x, teacher, critic, h), h[:, None] * dmd(x, teacher, critic))
    assert torch.equal(f_distill(x, teacher, critic, torch.ones(6)), dmd(x, teacher, critic))


def test_dmd_is_finite_when_the_teacher_is_exact():
    x = randn(4, 1)
    teacher = Prediction(x, x, torch.full((4,), 0.4), VP("cosine"), "x0")
    assert torch.isfinite(dmd(x, teacher, teacher)).all()


def test_asd_is_read_from_two_times():
    assert asd.reads == ("teacher", "later") and "critic" not in asd.reads


def test_an_operator_that_reads_something_unknown_is_refused():
    with pytest.raises(ValueError, match="cannot read teachr"):

        @operator("eps", "one")
        def wrong(teachr):
            return teachr


# --- surrogate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b_global", [None, 32])
@pytest.mark.parametrize("weight", [1.0, 0.25, "tensor"])
def test_surrogate_gradient_is_exactly_w_r_over_b(weight, b_global):
    x, r = randn(8, 3, 4).requires_grad_(True), randn(8, 3, 4, seed=1)
    w = torch.rand(8, dtype=torch.float64) if weight == "tensor" else weight
    (gradient,) = torch.autograd.grad(surrogate(x, r, w, b_global), x)
    expected = (rows(w, r) if weight == "tensor" else w) * r / (b_global or 8)
    assert torch.equal(gradient, expected)


def test_a_weight_per_frame_multiplies_its_frame():
    x = torch.zeros(2, 3, 4, 1, 1, requires_grad=True)
    w = torch.arange(8.0).reshape(2, 1, 4, 1, 1)
    (gradient,) = torch.autograd.grad(surrogate(x, torch.ones_like(x), w), x)
    assert torch.equal(gradient, (w / 2).expand_as(x))


def test_surrogate_gives_nothing_to_r_or_w():
    x, r, w = (randn(4, 2, seed=i).requires_grad_(True) for i in range(3))
    surrogate(x, r, w[:, 0]).backward()
    assert r.grad is None and w.grad is None and x.grad is not None
