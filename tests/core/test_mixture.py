"""Closed-form teachers against autograd, limits, enumeration and their own samples."""

import itertools

import pytest
import torch

from limbeck.core.diffusion import checks
from limbeck.core.diffusion.checks import gm1d, score_error, toy_table, two_classes
from limbeck.core.diffusion.discrete import MaskProcess, UniformProcess
from limbeck.core.diffusion.mixture import DataSet, GaussianMixture, TokenTable, cdf, cdf_map
from limbeck.core.diffusion.process import EDM, VP, Flow

torch.set_num_threads(1)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_scores_are_gradients_of_the_log_density():
    assert all(check.passed for check in checks.teachers())


def test_a_wrong_component_variance_is_caught():
    class Wrong(GaussianMixture):
        def forward(self, x_t, t, cond, features=False):
            return super().forward(x_t, t, cond) * 1.001

    assert score_error(Wrong(torch.tensor([[-1.0] * 4, [1.0] * 4]), 0.5, VP("cosine"), classes=[0, 1])) > 1e-6


def test_unequal_components_in_picture_shape():
    means = torch.randn(5, 2, 3, 3, generator=gen())
    teacher = GaussianMixture(means, torch.tensor([0.2, 0.5, 1.0, 0.3, 0.7]), Flow(), [1, 2, 3, 4, 5], [0, 0, 1, 1, 1])
    assert score_error(teacher) < 1e-9
    assert teacher.sample(7, gen()).shape == (7, 2, 3, 3)


def test_density_integrates_to_one_and_conditions_are_normalised():
    teacher = gm1d()
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    mass = teacher.log_prob(x, torch.full((4001,), 0.4), {}).exp().sum() * 16 / 4000
    assert float(mass) == pytest.approx(1, abs=1e-9)
    labelled = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.4, VP("cosine"), [0.3, 0.7], [0, 1])
    mass = labelled.log_prob(x, torch.full((4001,), 0.4), {"label": torch.tensor([0])}).exp().sum() * 16 / 4000
    assert float(mass) == pytest.approx(1, abs=1e-9)


def test_samples_follow_weights_means_and_labels():
    teacher = gm1d()
    x = teacher.sample(40_000, gen())
    assert float(x.mean()) == pytest.approx(0.4, abs=0.03) and float(x.std()) == pytest.approx(1.0, abs=0.03)
    only = two_classes().sample(4000, gen(), {"label": torch.tensor([1])})
    assert float(only.mean()) == pytest.approx(1, abs=0.03) and float(only.std()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(teacher.sample(5, gen(3)), teacher.sample(5, gen(3)))
    with pytest.raises(ValueError, match="names no component"):
        two_classes().sample(3, gen(), {"label": torch.tensor([7])})


def test_float32_inputs_stay_accurate_at_small_and_large_noise():
    points = torch.randn(50, 3 * 8 * 8, generator=gen()).reshape(50, 3, 8, 8)
    teacher = DataSet(points, EDM(), 0.01)
    for level in (0.002, 0.5, 80.0):
        t = EDM().t_of_ratio(torch.full((20,), level, dtype=torch.float64))
        x = EDM().add_noise(points[:20], torch.randn(20, 3, 8, 8, generator=gen(1)), t.float())
        single, double = teacher.predict(x, t.float(), {}).x0, teacher.predict(x.double(), t.float(), {}).x0
        assert single.dtype == torch.float32
        assert float((single - double).abs().max()) < 1e-5


def test_data_set_returns_the_nearest_point_without_noise_and_the_mean_under_much():
    points, process = torch.randn(6, 4, generator=gen()), EDM()
    teacher = DataSet(points, process, labels=[0, 0, 0, 1, 1, 1])
    low, high = process.t_of_ratio(torch.tensor([0.01, 79.0]))
    near = teacher.predict(points + 0.001, low.expand(6), {}).x0
    torch.testing.assert_close(near, points, atol=1e-5, rtol=0)
    far = teacher.predict(torch.zeros(1, 4), high.expand(1), {"label": torch.tensor([1])}).x0
    torch.testing.assert_close(far, points[3:].mean(0, keepdim=True), atol=2e-3, rtol=0)


def test_times_per_frame_are_refused():
    with pytest.raises(ValueError, match="one t per sample"):
        two_classes().predict(torch.zeros(2, 4), torch.rand(2, 4), {})


def test_cdf_map_is_the_identity_at_equal_times_and_monotone():
    teacher = gm1d()
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    t, s = torch.full_like(x, 0.6), torch.full_like(x, 0.2)
    assert float((cdf_map(teacher, x, t, t) - x).abs().max()) < 1e-12
    y = cdf_map(teacher, x, t, s)
    assert bool((y.diff() > 0).all())
    assert float((cdf(teacher, y, s) - cdf(teacher, x, t)).abs().max()) < 1e-12
    # a single Gaussian has the map in closed form: alpha_s m + (x - alpha_t m) sqrt(v_s/v_t)
    one = GaussianMixture(torch.tensor([[0.3]], dtype=torch.float64), 0.7, VP("cosine"))
    a_t, a_s = one.process.alpha(t), one.process.alpha(s)
    v_t, v_s = 0.49 * a_t**2 + one.process.sigma(t) ** 2, 0.49 * a_s**2 + one.process.sigma(s) ** 2
    closed = a_s * 0.3 + (x - a_t * 0.3) * (v_s / v_t).sqrt()
    assert float((cdf_map(one, x, t, s) - closed).abs().max()) < 1e-12


def brute_posterior(table, x, process, t):
    """p(x0_i = v | x_t) by the definition of the process, one state at a time."""
    vocab, length = process.vocab, table.ndim
    matrix, rows = checks.forward_matrix(process, t), torch.zeros(table.ndim, process.vocab, dtype=torch.float64)
    for x0 in itertools.product(range(vocab), repeat=length):
        weight = table[x0] * torch.stack([matrix[x0[i], x[i]] for i in range(length)]).prod()
        for i in range(length):
            rows[i, x0[i]] += weight
    return rows / rows.sum(1, keepdim=True)


@pytest.mark.parametrize("process", [MaskProcess(3), UniformProcess(3)], ids=["mask", "uniform"])
def test_token_table_posterior_is_the_enumerated_one(process):
    table = toy_table().double()
    masked = [[3, 3, 3, 3], [0, 3, 3, 2], [1, 1, 2, 3]]
    states = torch.tensor(masked if isinstance(process, MaskProcess) else [[0, 0, 0, 0], [2, 1, 0, 2], [1, 1, 2, 0]])
    pred = TokenTable(table, process).predict(states, torch.full((3,), 0.6, dtype=torch.float64), {})
    for row, state in zip(pred.logp_x0.exp(), states, strict=True):
        torch.testing.assert_close(row, brute_posterior(table, state, process, 0.6), atol=1e-12, rtol=0)


def test_token_table_conditions_and_samples():
    tables = torch.stack([toy_table(2), toy_table(2).flip(0)])
    teacher = TokenTable(tables, MaskProcess(3), conditional=True)
    hidden = torch.full((3, 2), 3)
    p = teacher.predict(hidden, torch.ones(3), {"label": torch.tensor([0, 1, -1])}).logp_x0.exp()
    for i, table in enumerate((tables[0], tables[1], tables.mean(0))):
        torch.testing.assert_close(p[i, 0], table.double().sum(1) / table.double().sum(), atol=1e-7, rtol=0)
    x = teacher.sample(50_000, gen(), {"label": torch.tensor([0])})
    counts = torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9) / 50_000
    assert float((counts - tables[0].flatten()).abs().sum() / 2) < 0.01
    with pytest.raises(ValueError, match="vocabulary of 4"):
        TokenTable(toy_table(2), MaskProcess(4))
