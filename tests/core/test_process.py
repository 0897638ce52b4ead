"""Processes: schedules, conversions, precision, broadcasting."""

import itertools

import pytest
import torch

from limbeck.core.diffusion import checks
from limbeck.core.diffusion.config import Edm, FlowConfig, Vp
from limbeck.core.diffusion.process import EDM, KINDS, VP, Flow, convert, process

torch.set_num_threads(1)
PROCESSES = list(checks.PROCESSES.values())


def test_every_conversion_round_trips_to_1e12():
    assert all(check.passed for check in checks.conversions())
    assert len(KINDS) == 5


@pytest.mark.parametrize("wrong", ["v", "flow", "score"])
def test_round_trips_and_truth_catch_a_wrong_conversion(wrong):
    def faulty(value, x_t, t, law, src, dst):
        out = convert(value, x_t, t, law, src, dst)
        return -out if dst == wrong else out

    assert any(not check.passed for check in checks.conversions(faulty))


@pytest.mark.parametrize("law", PROCESSES, ids=list(checks.PROCESSES))
def test_kinds_mean_what_the_cards_say(law):
    t = checks.usable_times(law, 0.01)
    x0, eps = torch.randn(2, len(t), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, s = law.alpha(t)[:, None], law.sigma(t)[:, None]
    x_t = law.add_noise(x0, eps, t)
    torch.testing.assert_close(x_t, a * x0 + s * eps)
    truth = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "score": -eps / s, "flow": eps - x0}
    for src, dst in itertools.product(KINDS, KINDS):
        got = convert(truth[src], x_t, t, law, src, dst)
        assert float(((got - truth[dst]).abs() / truth[dst].abs().clamp_min(1)).max()) < 1e-9, (src, dst)


@pytest.mark.parametrize("law", PROCESSES, ids=list(checks.PROCESSES))
def test_velocity_is_the_time_derivative_of_the_path(law):
    # away from the knots of the piecewise-linear schedules
    t = torch.linspace(0.1, 0.9, 33, dtype=torch.float64) + 3.7e-4
    x0, eps = torch.randn(2, 33, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = 1e-6
    slope = (law.add_noise(x0, eps, t + h) - law.add_noise(x0, eps, t - h)) / (2 * h)
    velocity = convert(x0, law.add_noise(x0, eps, t), t, law, "x0", "velocity")
    assert float(((velocity - slope).abs() / (slope.abs() + 1)).max()) < 1e-6


@pytest.mark.parametrize("law", PROCESSES, ids=list(checks.PROCESSES))
def test_ratio_inverts(law):
    t = torch.linspace(law.t_min, law.t_max, 501, dtype=torch.float64)
    torch.testing.assert_close(law.t_of_ratio(law.ratio(t)), t, atol=1e-12, rtol=1e-10)


def test_index_models_sit_on_their_indices():
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - beta, 0)
    k = torch.tensor([0, 399, 625, 800, 999])
    law = VP("scaled_linear", 1000, 0.00085, 0.012)
    alpha = law.alpha((k + 1).double() / 1000)
    torch.testing.assert_close(alpha, abar[k].sqrt(), atol=1e-13, rtol=1e-12)
    # card hyper-sd-score: alpha at 399, 625, 800, 999
    assert [round(float(a), 4) for a in alpha[1:]] == [0.6528, 0.3712, 0.1920, 0.0683]


def test_schedule_ends():
    zero, one = torch.zeros(1), torch.ones(1)
    for law in PROCESSES:
        assert float(law.alpha(zero)) == 1 and float(law.sigma(zero)) == 0
    assert float(EDM().sigma(one)) == 80 and float(Flow(3.0).sigma(one)) == 1
    assert float(Flow(3.0).sigma(torch.tensor(0.5))) == pytest.approx(0.75)
    assert float(EDM().sigma(torch.tensor(EDM().t_min))) == pytest.approx(0.002, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_is_the_floor_and_is_not_wasted(dtype):
    law, t = VP(), torch.linspace(0.01, 1, 400)
    x0, eps = torch.randn(2, 400, 16, generator=torch.Generator().manual_seed(2))
    x_t, eps = law.add_noise(x0, eps, t).to(dtype), eps.to(dtype)
    got = convert(eps, x_t, t, law, "eps", "x0")
    assert got.dtype == torch.float32
    exact = convert(eps.double(), x_t.double(), t, law, "eps", "x0")
    a, s = law.coefficients(t, exact)
    scale = (x_t.double().abs() + s * eps.double().abs()) / a
    assert float(((got - exact).abs() / scale).max()) < 3 * 2**-24 * 2  # a few roundings of the terms, no more


def test_times_broadcast_per_frame_and_per_token():
    law = Flow()
    video = torch.randn(2, 3, 5, 4, 4)
    t = torch.rand(2, 1, 5, 1, 1)
    torch.testing.assert_close(law.add_noise(video, video * 0, t), (1 - t) * video)
    tokens, t = torch.randn(2, 7, 6), torch.rand(2, 7)
    torch.testing.assert_close(law.add_noise(tokens, tokens * 0, t), (1 - t[..., None]) * tokens)
    torch.testing.assert_close(law.add_noise(tokens, tokens * 0, torch.tensor(0.25)), 0.75 * tokens)


def test_start_scales_noise_only_where_the_variance_explodes():
    z = torch.randn(3, 2)
    torch.testing.assert_close(EDM().start(z, torch.ones(3)), 80 * z)
    assert torch.equal(VP().start(z, torch.ones(3)), z)


def test_process_from_its_settings():
    assert process(Vp(schedule="cosine")) == VP("cosine")
    assert process(Edm(rho=5)) == EDM(rho=5)
    assert process(FlowConfig(shift=3)) == Flow(3)


def test_errors_name_the_choices():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="unknown prediction kind 'noise'; use one of x0, eps"):
        convert(x, x, torch.ones(1), VP(), "noise", "x0")
    with pytest.raises(ValueError, match="linear, scaled_linear or cosine"):
        VP("quadratic")
