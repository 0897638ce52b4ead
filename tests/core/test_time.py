"""Time laws against the moments and supports that define them; weights against their formulas."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from limbeck.core.diffusion.config import TimeLaw
from limbeck.core.diffusion.process import EDM, VP, Flow
from limbeck.core.diffusion.time import law, weight

torch.set_num_threads(1)
N = 20_000


def draw(config, process, step=0, seed=0, n=N, group=1):
    built = law(TypeAdapter(TimeLaw).validate_python(config), group)
    return built.sample(n, torch.Generator().manual_seed(seed), process, step)


def near(value, target, std):
    return abs(float(value) - target) < 5 * std / math.sqrt(N)


def test_uniform_and_its_schedule():
    t = draw({"kind": "uniform", "lo": 0.02, "hi": 0.98}, VP())
    assert t.dtype == torch.float32 and t.shape == (N,) and 0.02 <= t.min() and t.max() <= 0.98
    assert near(t.mean(), 0.5, 0.28)
    annealed = {"kind": "uniform", "lo": 0.02, "hi": [[0, 0.98], [100, 0.5]]}
    assert draw(annealed, VP(), 100).max() <= 0.5 < draw(annealed, VP(), 50).max() <= 0.74


def test_logit_normal():
    t = draw({"kind": "logit_normal", "mean": 0.5, "std": 1.2}, Flow()).double()
    logit = torch.logit(t)
    assert near(logit.mean(), 0.5, 1.2) and near(logit.std(), 1.2, 1.2)


def test_index_is_uniform_on_the_grid():
    t = draw({"kind": "index", "lo": 20, "hi": 981, "count": 1000}, VP()).double() * 1000 - 1
    k = t.round()
    assert float((t - k).abs().max()) < 1e-4 and k.min() == 20 and k.max() == 980
    assert near(k.mean(), 500, 277)


def test_noise_level_laws():
    process = EDM()
    ratio = process.ratio(draw({"kind": "log_uniform_sigma", "lo": 0.05, "hi": 8.0}, process))
    assert 0.0499 < ratio.min() and ratio.max() < 8.001
    assert near(ratio.log().mean(), (math.log(0.05) + math.log(8)) / 2, 1.5)
    ratio = process.ratio(draw({"kind": "log_normal_sigma", "mean": -1.2, "std": 1.2}, process))
    assert near(ratio.log().mean(), -1.2, 1.3) and near(ratio.log().std(), 1.2, 1.3)
    t = draw({"kind": "karras", "lo": 0.002, "hi": 80.0, "rho": 7.0}, process)
    low = process.t_min  # uniform in t, because EDM's sigma is t^rho
    assert near(t.mean(), (1 + low) / 2, 0.23) and t.min() >= low - 1e-6


@pytest.mark.parametrize(
    ("config", "moved"),
    [
        ({"kind": "logit_normal", "mean": [[0, -2.0], [100, 2.0]]}, {"kind": "logit_normal", "mean": 2.0}),
        ({"kind": "log_normal_sigma", "std": [[0, 1.0], [100, 0.5]]}, {"kind": "log_normal_sigma", "std": 0.5}),
        ({"kind": "log_uniform_sigma", "hi": [[0, 8.0], [100, 1.0]]}, {"kind": "log_uniform_sigma", "hi": 1.0}),
        ({"kind": "karras", "lo": [[0, 0.002], [100, 0.1]]}, {"kind": "karras", "lo": 0.1}),
    ],
)
def test_every_law_takes_schedules(config, moved):
    assert torch.equal(draw(config, EDM(), 100, n=50), draw(moved, EDM(), n=50))
    assert not torch.equal(draw(config, EDM(), 0, n=50), draw(moved, EDM(), n=50))


def test_groups_share_a_time():
    t = draw({"kind": "uniform"}, VP(), n=12, group=4).reshape(3, 4)
    assert (t == t[:, :1]).all() and len(t[:, 0].unique()) == 3
    with pytest.raises(ValueError, match="groups of 5"):
        draw({"kind": "uniform"}, VP(), n=12, group=5)


def test_draws_depend_on_the_generator_alone():
    torch.manual_seed(0)
    first = draw({"kind": "logit_normal"}, Flow(), seed=3)
    torch.manual_seed(1)
    assert torch.equal(first, draw({"kind": "logit_normal"}, Flow(), seed=3))
    assert not torch.equal(first, draw({"kind": "logit_normal"}, Flow(), seed=4))


def test_weights():
    t, process = torch.linspace(0.1, 0.9, 9), VP("cosine")
    a, s = process.alpha(t), process.sigma(t)
    expected = {
        "one": torch.ones(9),
        "sigma2": s**2,
        "alpha": a,
        "snr_trunc": (a**2 / s**2).clamp_min(1),
        "edm": ((s / a) ** 2 + 1.6**2) / (1.6 * s / a) ** 2,
    }
    for name, value in expected.items():
        got = weight(name, process, t, 1.6)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), value.double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="snr_trunc"):
        weight("snr", process, t)


def test_settings_are_strict():
    wrong = (
        {"kind": "uniform", "low": 0.1},
        {"kind": "uniform", "lo": 20, "hi": 980},  # indices, where t in [0, 1] is meant
        {"kind": "uniform", "lo": 0.9, "hi": 0.1},
        {"kind": "uniform", "hi": [[0, 0.98], [10, 1.5]]},
        {"kind": "uniform", "hi": math.nan},
        {"kind": "index", "lo": 500, "hi": 500},
        {"kind": "karras", "lo": [[0, 0.0]]},
        {"kind": "gauss"},
        {"kind": "logit_normal", "std": -1},
    )
    for bad in wrong:
        with pytest.raises(ValidationError):
            TypeAdapter(TimeLaw).validate_python(bad)
