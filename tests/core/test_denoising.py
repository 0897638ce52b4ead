"""Denoising regression: its targets, weights and law, and the objective that trains a denoiser on data."""

import pytest
import torch
from torch import nn

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Denoiser, FewStep, Model, Preconditioned, Prediction
from limbeck.core.diffusion.discrete import MaskProcess
from limbeck.core.diffusion.mixture import GaussianMixture, TokenTable
from limbeck.core.diffusion.process import EDM, VP, Flow
from limbeck.core.distillation import denoising
from limbeck.core.distillation.config import Denoising
from limbeck.core.distillation.critic import FlatNet
from limbeck.core.distillation.denoising import Regression, errors, noised, token_errors, truth
from limbeck.core.distillation.toy import MODES, STD, WEIGHTS, Ring4Set
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.core.run.rng import Draws
from limbeck.core.run.trainer import Trainer

torch.set_num_threads(1)
CPU = torch.device("cpu")
PROCESSES = [VP("cosine"), VP("scaled_linear"), EDM(), Flow()]


def ctx(step=0, batch=64):
    return Context(step, "s", Draws(0, step, batch), 1, 0, CPU)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{type(p).__name__}")
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow", "score"])
def test_a_perfect_net_of_any_kind_has_no_loss_in_any_space(process, kind):
    x0, eps, t = randn(8, 3).double(), randn(8, 3, seed=1).double(), torch.linspace(0.2, 0.6, 8).double()
    x_t = process.add_noise(x0, eps, t)
    raw = -eps / process.coefficients(t, x0)[1] if kind == "score" else truth(kind, x0, eps, t, process)
    for space in ("x0", "eps", "v", "flow", None):
        pred = Prediction(raw, x_t, t, process, kind)
        assert errors(pred, x0, eps, Denoising(space=space)).mean() < 1e-9


def test_wrong_targets_are_caught():
    process, x0, eps = Flow(), randn(8, 3), randn(8, 3, seed=1)
    t = torch.full((8,), 0.5)
    x_t = process.add_noise(x0, eps, t)
    for raw in (x0 - eps, eps, x0):  # flipped flow, noise, data
        assert errors(Prediction(raw, x_t, t, process, "flow"), x0, eps, Denoising()).mean() > 0.1


def test_weights_multiply_the_per_sample_error():
    process, x0, eps, t = VP("cosine"), randn(8, 3), randn(8, 3, seed=1), torch.linspace(0.1, 0.9, 8)
    pred = Prediction(torch.zeros_like(x0), process.add_noise(x0, eps, t), t, process, "eps")
    error = eps.square().mean(1)
    alpha, sigma = process.alpha(t).float(), process.sigma(t).float()
    snr = (alpha / sigma) ** 2
    expected = {"one": 1 + 0 * t, "sigma2": sigma**2, "alpha": alpha, "alpha2": alpha**2, "edm": snr + 1 / 1.6**2}
    expected["snr_trunc"] = snr.clamp(min=1)
    for name, w in expected.items():
        found = errors(pred, x0, eps, Denoising(weighting=name, sigma_data=1.6)).mean()
        assert torch.allclose(found, (w * error).mean(), rtol=1e-5), name


def test_noise_has_its_own_stream_and_keeps_the_graph():
    context, x = ctx(), randn(64, 2).requires_grad_(True)
    from limbeck.core.diffusion.time import law

    x_t, t, eps = noised(context, "a", x, law(Denoising().time), Flow())
    assert torch.allclose(x_t, (1 - t)[:, None] * x + t[:, None] * eps) and x_t.requires_grad
    assert len(t.unique()) == 64 and not torch.equal(eps, noised(context, "b", x, law(Denoising().time), Flow())[2])
    with pytest.raises(ValueError, match="already drawn"):
        noised(context, "a", x, law(Denoising().time), Flow())


def test_regression_finds_the_exact_denoiser():
    """On N(1, .5^2) the best x0 answer is affine; the trained net agrees with the closed form."""

    class Affine(Denoiser):
        def __init__(self):
            super().__init__(Flow(), "x0")
            self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

        def forward(self, x_t, t, cond, features=False):
            return self.a * x_t + self.b

    net = Affine()
    at_half = Denoising(time={"kind": "uniform", "lo": 0.5, "hi": 0.5})
    one, optim = Regression(net, at_half, {}), torch.optim.Adam(net.parameters(), lr=0.05)
    for step in range(300):
        optim.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        loss = one.loss(ctx(step, 512), "d", 1 + 0.5 * randn(512, 1, seed=step), {})
        optim.zero_grad()
        loss.backward()
        optim.step()
    exact = GaussianMixture(torch.ones(1, 1), 0.5, Flow())
    x_t, t = torch.linspace(-0.5, 1.5, 9)[:, None], torch.full((9,), 0.5)
    assert (net(x_t, t, {}) - exact(x_t, t, {})).abs().max() < 0.03


class Fake:
    """The few attributes of a Build that the factory reads."""

    def __init__(self, teacher, student=None, data=None):
        self.pieces = {"teacher": teacher, "student": student, "data": data}
        self.recipe = type("R", (), {name: value for name, value in self.pieces.items()})()
        self.device = CPU
        self.made = []

    def piece(self, slot):
        return self.pieces[slot]

    def has(self, slot):
        return self.pieces[slot] is not None

    def player(self, name, params, config):
        from limbeck.core.run.players import Player

        self.made.append(name)
        return Player(name, params, config, 4)


def net_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Preconditioned(FlatNet((2,), 4, 64, 2), EDM(), 1.6)
    return Model(net, (2,), Identity(), lambda p: {"label": torch.tensor([float(x or -1) for x in p])}, "net")


def test_the_objective_trains_a_teacher_towards_the_closed_form():
    teacher = net_model()
    config = Denoising(optim={"lr": 3e-3, "clip": None}, weighting="edm", sigma_data=1.6, dropout=0.1,
                       time={"kind": "log_uniform_sigma", "lo": 0.05, "hi": 8.0})  # fmt: skip
    made = Fake(teacher, data=Ring4Set())
    objective = denoising.build(config, made)
    assert made.made == ["teacher"]
    exact = GaussianMixture(MODES, STD, EDM(), WEIGHTS, list(range(4)))
    gen = torch.Generator().manual_seed(0)
    label = {"label": torch.arange(512) % 4}
    t = EDM().t_of_ratio(torch.full((512,), 0.7))
    x_t = EDM().add_noise(exact.sample(512, gen, label), torch.randn(512, 2, generator=gen), t)

    def error():
        with torch.no_grad():
            return float((teacher.denoiser(x_t, t, label) - exact(x_t, t, label)).square().mean())

    before, run = error(), Trainer(objective, Team("cpu"), 0, "s", 400, 256)
    run.run()
    assert error() < 0.3 * before


def test_a_student_is_trained_instead_of_the_teacher_where_there_is_one():
    teacher, own = net_model(), net_model().denoiser
    made = Fake(teacher, FewStep(own, (0.6,)), Ring4Set())
    objective = denoising.build(Denoising(), made)
    assert made.made == ["student"] and objective.regression.denoiser is own
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())


def test_it_runs_from_a_recipe_only_with_something_to_train():
    sets = ["stages.0.losses.0.kind=denoising", "batch=8", "teacher.labels=true"]
    recipe = load("toy/ring4", sets)
    with pytest.raises(BadInput, match="no denoiser"):
        Build(recipe).objective(recipe.stages[0])  # an MLP from noise to sample has no denoiser


def test_the_masked_loss_of_the_exact_denoiser_is_the_entropy_of_its_law() -> None:
    gen = torch.Generator().manual_seed(0)
    table = torch.softmax(1.2 * torch.randn(27, generator=gen, dtype=torch.float64), 0)
    teacher = TokenTable(table.view(3, 3, 3), MaskProcess(3))
    x0 = teacher.sample(40000, gen)
    t = (torch.rand(40000, generator=gen) + torch.arange(40000) / 40000) % 1  # even in t: a small variance
    x_t = teacher.process.add_noise(x0, torch.rand(x0.shape, generator=gen), t.clamp_min(1e-3))
    pred = teacher.predict(x_t, t.clamp_min(1e-3), {})
    entropy = float(-(table * table.log()).sum())
    assert float(token_errors(pred, x0).mean()) * 3 == pytest.approx(entropy, rel=0.02)
    revealed = x_t != 3
    free = -pred.logp_x0.gather(-1, x0[..., None])[..., 0]
    assert float(free[revealed].abs().max()) == 0.0  # what is known costs nothing
    unweighted = float((free * ~revealed).mean(1).mean()) * 3
    assert abs(unweighted - entropy) > 0.2 * entropy  # the weight matters: the test would see it forgotten


def test_tokens_are_noised_by_uniform_draws() -> None:
    x = torch.zeros(64, 50, dtype=torch.int64)
    regression = Regression(TokenTable(torch.ones(3), MaskProcess(3)), Denoising(), {})
    x_t, t, eps = noised(ctx(), "s", x, regression.times, MaskProcess(3))
    assert 0 <= float(eps.min()) and float(eps.max()) < 1 and set(x_t.unique().tolist()) == {0, 3}
    assert float(((x_t == 3).double().mean(1) - t.double()).abs().mean()) < 0.08
