"""Masked and uniform processes: corruption, steps, densities, KL, soft rows, exact draws."""

import itertools
import math

import pytest
import torch

from limbeck.core.diffusion import checks
from limbeck.core.diffusion.checks import toy_table
from limbeck.core.diffusion.discrete import (
    DiscretePrediction,
    MaskProcess,
    TokenKernel,
    TokenNetwork,
    UniformProcess,
    argmax_rows,
    categorical,
    first_hitting,
    hitting_time,
    mask,
    posterior,
    soft_rows,
    uniform,
)
from limbeck.core.diffusion.mixture import TokenTable
from limbeck.core.diffusion.sampling import ddim, trajectory
from limbeck.core.distillation.denoising import token_errors

torch.set_num_threads(1)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def times(n, *values):
    return [torch.full((n,), value, dtype=torch.float64) for value in values]


def p_value(counts, probs):
    """Of a chi-squared test over the cells that have probability; mass elsewhere is impossible."""
    assert int(counts[probs == 0].sum()) == 0
    expected = probs[probs > 0] * counts.sum()
    chi2 = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), (chi2 / 2).float()))


def test_steps_equal_enumeration():
    assert all(check.passed for check in checks.tokens())


def test_a_factorised_sampler_is_seen_by_the_total_variation():
    assert checks.one_token_tv(mask()) > 0.03


@pytest.mark.parametrize("process", [MaskProcess(3), UniformProcess(3)], ids=["mask", "uniform"])
def test_corruption_has_the_marginal_of_the_process(process):
    n = 100_000
    x0, u = torch.ones(n, 2, dtype=torch.long), torch.rand(n, 2, generator=gen(), dtype=torch.float64)
    x = process.add_noise(x0, u, torch.full((n,), 0.35, dtype=torch.float64))
    assert p_value(torch.bincount(x.flatten(), minlength=4).double(), checks.forward_matrix(process, 0.35)[1]) > 1e-4


@pytest.mark.parametrize(
    "process,kernel", [(MaskProcess(3), mask()), (UniformProcess(3), uniform())], ids=["mask", "uniform"]
)
def test_draws_follow_the_enumerated_table(process, kernel):
    n, table = 60_000, toy_table(2).double()
    start = [3, 3] if isinstance(process, MaskProcess) else [0, 2]
    x, (t, s) = torch.tensor([start]).expand(n, 2), times(n, 0.7, 0.3)
    pred = TokenTable(table, process).predict(x, t, {})
    x_s = kernel.propose(pred, x, t, s, gen())
    rows = checks.enumerated_step(process, table, x[0], 0.7, 0.3)
    for i in range(2):
        assert p_value(torch.bincount(x_s[:, i], minlength=4).double(), rows[i]) > 1e-4


def test_rows_may_have_their_own_times():
    table, process = toy_table(2).double(), MaskProcess(3)
    x = torch.full((2, 2), 3)
    t, s = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.3, 0.4], dtype=torch.float64)
    pred = TokenTable(table, process).predict(x, t, {})
    rows = posterior(process, pred.logp_x0.exp(), x, t, s)
    assert rows[:, 0, -1].tolist() == pytest.approx([0.3 / 0.9, 0.4 / 0.5])


def first_two(kernel, process, seed):
    """A step on toy D of length 2 with everything a density needs."""
    table = toy_table(2).double()
    n = 500
    x = process.add_noise(
        TokenTable(table, process).sample(n, gen(seed)),
        torch.rand(n, 2, generator=gen(seed + 1)),
        torch.full((n,), 0.7),
    )
    t, s = times(n, 0.7, 0.3)
    pred = TokenTable(table, process).predict(x, t, {})
    return table, x, t, s, pred, kernel.propose(pred, x, t, s, gen(seed + 2))


def test_mask_log_prob_is_the_cards_formula():
    table, x, t, s, pred, x_s = first_two(mask(), MaskProcess(3), 0)
    logp, got = pred.logp_x0, mask().log_prob(pred, x, x_s, t, s)
    expected = torch.zeros(len(x), dtype=torch.float64)
    for i in range(2):
        opened, stayed = (x[:, i] == 3) & (x_s[:, i] != 3), x_s[:, i] == 3
        token = logp[:, i].gather(1, x_s[:, i : i + 1].clamp(max=2))[:, 0]
        expected += torch.where(opened, torch.log((t - s) / t) + token, 0.0) + torch.where(
            stayed, torch.log(s / t), 0.0
        )
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(mask().log_prob(pred, x, x_s, t, s, "mean"), got / 2)


@pytest.mark.parametrize(
    "process,kernel",
    [
        (MaskProcess(3), mask()),
        (MaskProcess(3, "cosine"), mask()),
        (UniformProcess(3), uniform()),
        (MaskProcess(3), first_hitting()),
    ],
    ids=["mask", "cosine", "uniform", "first"],
)
def test_probabilities_of_all_next_states_sum_to_one(process, kernel):
    table = toy_table(2).double()
    start = [[3, 3], [3, 1]] if isinstance(process, MaskProcess) else [[0, 2], [1, 1]]
    states = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    for state in start:
        x, (t, s) = torch.tensor([state]).expand(16, 2), times(16, 0.7, 0.3)
        pred = TokenTable(table, process).predict(x, t, {})
        one_new = (states != x).sum(1) == 1 if kernel == first_hitting() else torch.ones(16, dtype=torch.bool)
        legal = ~((states != x) & (x != 3)).any(1) & (~((states == 3) & (x != 3))).all(1)
        keep = one_new & legal if kernel == first_hitting() else torch.ones(16, dtype=torch.bool)
        total = kernel.log_prob(pred, x, states, t, s).exp()[keep].sum()
        assert float(total) == pytest.approx(1, abs=1e-9)


def other(table, process, x, t):
    return TokenTable(table.flip(0), process).predict(x, t, {})


@pytest.mark.parametrize(
    "process,kernel",
    [
        (MaskProcess(3), mask()),
        (MaskProcess(3, "cosine"), mask()),
        (UniformProcess(3), uniform()),
        (MaskProcess(3), first_hitting()),
    ],
    ids=["mask", "cosine", "uniform", "first"],
)
def test_kl_is_the_finite_sum(process, kernel):
    table = toy_table(2).double()
    states = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    x, (t, s) = (
        torch.tensor([[3, 3] if isinstance(process, MaskProcess) else [0, 2]]).expand(16, 2),
        times(16, 0.7, 0.3),
    )
    a, b = TokenTable(table, process).predict(x, t, {}), other(table, process, x, t)
    keep = ((states != x).sum(1) == 1) if kernel == first_hitting() else torch.ones(16, dtype=torch.bool)
    log_a, log_b = (kernel.log_prob(p, x, states, t, s)[keep] for p in (a, b))
    direct = (log_a.exp() * (log_a - log_b)).sum()
    assert float(kernel.kl(a, b, x, t, s)[0]) == pytest.approx(float(direct), abs=1e-8)
    assert float(kernel.kl(a, a, x, t, s).abs().max()) == 0


def test_path_kl_needs_its_time_step():
    """Card drakes, check 1: L=1, V=4, E KL_path = 1.18 for T = 16; the form without dt gives T times more."""
    p = torch.softmax(1.2 * torch.randn(4, generator=gen(5), dtype=torch.float64), 0)
    q = torch.softmax(1.2 * torch.randn(4, generator=gen(6), dtype=torch.float64), 0)
    process, steps, n = MaskProcess(4), 16, 20_000
    total, wrong = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    reference = TokenTable(q, process)
    for step in trajectory(TokenTable(p, process), mask(), process.initial(n, 1), grid, gen=gen(7)):
        other_pred = reference.predict(step.x, step.t, {})
        kl = mask().kl(step.pred, other_pred, step.x, step.t, step.s)
        total, wrong = total + kl, wrong + kl * step.t / (step.t - step.s)
    exact = float((p * (p / q).log()).sum())
    assert float(total.mean()) == pytest.approx(exact, rel=0.05)
    assert float(wrong.mean()) > 3 * exact


def test_first_hitting_opens_exactly_one_position_uniformly():
    process, table = MaskProcess(3), toy_table()
    x, (t, s) = torch.tensor([[3, 1, 3, 3]]).repeat(30_000, 1), times(30_000, 1.0, 0.5)
    x[0] = torch.tensor([0, 1, 2, 0])
    x_s = first_hitting().propose(TokenTable(table, process).predict(x, t, {}), x, t, s, gen())
    changed = x_s != x
    assert not changed[0].any() and (changed[1:].sum(1) == 1).all()
    counts = changed[1:].sum(0).double()
    assert p_value(counts, torch.tensor([1, 0, 1, 1], dtype=torch.float64) / 3) > 1e-4


def test_hitting_gridare_those_of_the_first_of_n():
    x = torch.full((50_000, 4), 3)
    x[:, 0] = 0
    u = (hitting_time(MaskProcess(3), x, torch.full((50_000,), 0.8), gen()) / 0.8) ** 3
    assert float(u.mean()) == pytest.approx(0.5, abs=0.01) and float(u.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert float(hitting_time(MaskProcess(3), x * 0, torch.full((50_000,), 0.8), gen()).max()) == 0


SCHEDULES = ("linear", "cosine")
STATES = torch.cartesian_prod(torch.arange(4), torch.arange(4))  # of two letters of three, or masks
LEVEL = {"linear": lambda t: t, "cosine": lambda t: 1 - math.cos(math.pi * t / 2)}


def forward_law(level):
    """q(x_t) [16] over STATES when a token is masked with chance `level`, by enumeration of x0."""
    step, table = checks.forward_matrix(MaskProcess(3), level)[:3], toy_table(2).double()
    return torch.einsum("ab,ai,bj->ij", table, step, step).flatten()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_one_function_with_its_slope_and_inverse(schedule):
    process, grid = MaskProcess(3, schedule), [i / 200 for i in range(201)]
    t = torch.tensor(grid, dtype=torch.float64, requires_grad=True)
    sigma = process.sigma(t)
    torch.testing.assert_close(sigma.detach(), torch.tensor([LEVEL[schedule](v) for v in grid], dtype=torch.float64))
    torch.testing.assert_close(process.alpha(t) + sigma, torch.ones_like(t))
    for level, slope in ((process.alpha(t), process.d_alpha(t)), (sigma, process.d_sigma(t))):
        torch.testing.assert_close(torch.autograd.grad(level.sum(), t)[0], slope)
    torch.testing.assert_close(process.t_of_sigma(sigma.detach()), t.detach(), atol=1e-7, rtol=0)
    torch.testing.assert_close(process.t_of_ratio(process.ratio(t[:-1].detach())), t[:-1].detach(), atol=1e-7, rtol=0)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="use linear or cosine"):
        MaskProcess(3, "square")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_cosine_masks_fewer_tokens_as_it_says(schedule):
    n, process = 100_000, MaskProcess(3, schedule)
    x0, u = torch.ones(n, 2, dtype=torch.long), torch.rand(n, 2, generator=gen(), dtype=torch.float64)
    counts = torch.bincount(process.add_noise(x0, u, torch.full((n,), 0.35)).flatten(), minlength=4).double()
    laws = {name: checks.forward_matrix(MaskProcess(3), LEVEL[name](0.35))[1] for name in SCHEDULES}
    assert p_value(counts, laws.pop(schedule)) > 1e-4
    assert p_value(counts, next(iter(laws.values()))) < 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_mask_step_from_the_forward_marginal_ends_at_the_forward_marginal(schedule):
    """Of each letter, summed over all 16 states; the other schedule's level is far from it."""
    process, teacher = MaskProcess(3, schedule), TokenTable(toy_table(2), MaskProcess(3, schedule))
    for now, then in ((0.9, 0.4), (0.5, 0.1), (1.0, 0.0)):
        t, s = times(16, now, then)
        rows = posterior(process, teacher.predict(STATES, t, {}).logp_x0.exp(), STATES, t, s)
        after = torch.einsum("n,nlv->lv", forward_law(LEVEL[schedule](now)), rows)
        want = forward_law(LEVEL[schedule](then)).view(4, 4)
        torch.testing.assert_close(after, torch.stack([want.sum(1), want.sum(0)]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_first_hitting_passes_through_the_forward_law(schedule):
    """Opening letters at their hitting times until s leaves the joint law of x_s, not only its marginals."""
    n, process, stop = 40_000, MaskProcess(3, schedule), 0.6
    teacher, draws = TokenTable(toy_table(2), process), gen(3)
    x, t = process.initial(n, 2), torch.ones(n, dtype=torch.float64)
    for _ in range(2):
        t = hitting_time(process, x, t, draws)
        opened = first_hitting().propose(teacher.predict(x, t, {}), x, t, t, draws)
        x = torch.where((t > stop)[:, None], opened, x)
    counts = torch.bincount(x[:, 0] * 4 + x[:, 1], minlength=16).double()
    assert p_value(counts, forward_law(LEVEL[schedule](stop))) > 1e-4


def bound(process):
    """The denoising loss of the exact denoiser, in nats a word: all x0 and masks, Gauss's rule of 40 times."""
    table = toy_table(2).double()
    teacher, total = TokenTable(table, process), 0.0
    k = torch.arange(1, 40, dtype=torch.float64)
    beside = torch.diag(k / (4 * k**2 - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(beside + beside.T)  # Golub and Welsch
    t, weights = (nodes + 1) / 2, vectors[0] ** 2
    sigma = process.sigma(t)
    for word, gone in itertools.product(itertools.product(range(3), repeat=2), itertools.product((0, 1), repeat=2)):
        hidden = torch.tensor(gone).bool()
        x0, share = torch.tensor(word).expand(40, 2), sigma ** sum(gone) * (1 - sigma) ** (2 - sum(gone))
        errors = token_errors(teacher.predict(torch.where(hidden, 3, x0), t, {}), x0)
        total += float(table[word] * (weights * share * errors * 2).sum())
    return total


def test_the_bound_of_the_exact_denoiser_is_the_entropy_under_both_schedules(monkeypatch):
    """Letters in random order: the chain rule. The linear schedule's weight 1/t on the cosine gives another number."""
    table = toy_table(2).double()
    entropy = float(-(table * table.log()).sum())
    assert [bound(MaskProcess(3, schedule)) for schedule in SCHEDULES] == pytest.approx([entropy] * 2, abs=1e-6)
    monkeypatch.setattr(MaskProcess, "d_alpha", lambda self, t: -self.sigma(t) / t)
    assert bound(MaskProcess(3)) == pytest.approx(entropy, abs=1e-6)
    assert abs(bound(MaskProcess(3, "cosine")) - entropy) > 0.1


def test_exact_draws_reach_rare_tokens_and_float32_gumbel_draws_do_not():
    """A heavy state against 4096 tokens of 6e-8 each, as when a mask stays in a fine grid.

    Only rare draws with u within 2^-12 of 1 can win, so both are simulated given that, at their true rates: float32
    uniforms are multiples of 2^-24 there, and the largest Gumbel is 16.6.
    """
    rare, draws, top = 6e-8, 2_000_000, 4096
    expected = draws * top * rare  # of wins, given the top slice
    u32 = 1 - torch.randint(1, top + 1, (draws,), generator=gen()).float() * 2**-24
    u64 = 1 - torch.rand(draws, generator=gen(1), dtype=torch.float64) * 2**-12
    heavy = -(-torch.rand(draws, generator=gen(2), dtype=torch.float64).log()).log()
    shift = torch.tensor(rare, dtype=torch.float64).log()
    wins32 = int((-(-u32.log()).log() + shift > heavy).sum())
    wins64 = int((-(-u64.log()).log() + shift > heavy).sum())
    chances = torch.tensor([expected / draws, 1 - expected / draws], dtype=torch.float64)
    exact, biased = (torch.tensor([wins, draws - wins], dtype=torch.float64) for wins in (wins64, wins32))
    assert p_value(exact, chances) > 1e-4
    assert p_value(biased, chances) < 1e-6 and wins32 < expected
    probs = torch.cat([torch.full((64,), rare * 64, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    hits = int((categorical(probs.expand(100_000, 65), gen(3)) < 64).sum())
    target = 100_000 * 64 * 64 * rare
    assert abs(hits - target) < 5 * target**0.5


def test_zero_probability_is_never_drawn():
    probs = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    counts = torch.bincount(categorical(probs.expand(90_000, 5), gen()), minlength=5).double()
    assert p_value(counts, probs / 3) > 1e-4


def test_soft_rows_of_ids_are_the_ids():
    """One-hot rows and ids give the same predictions, steps, densities and divergences."""
    for process, kernel, start in (
        (MaskProcess(3), mask(), [[3, 1], [3, 3]]),
        (UniformProcess(3), uniform(), [[0, 1], [2, 2]]),
    ):
        x, (t, s) = torch.tensor(start), times(2, 0.7, 0.3)
        rows, table = soft_rows(x, 3), toy_table(2).double()
        hard, soft = (TokenTable(table, process).predict(form, t, {}) for form in (x, rows))
        torch.testing.assert_close(hard.logp_x0.exp(), soft.logp_x0.exp())
        torch.testing.assert_close(
            posterior(process, hard.logp_x0.exp(), x, t, s), posterior(process, soft.logp_x0.exp(), rows, t, s)
        )
        x_s = kernel.propose(hard, x, t, s, gen())
        assert torch.equal(x_s, kernel.propose(soft, rows, t, s, gen()))
        torch.testing.assert_close(
            kernel.log_prob(hard, x, x_s, t, s), kernel.log_prob(soft, rows, soft_rows(x_s, 3), t, s)
        )
        b = other(table, process, x, t)
        torch.testing.assert_close(kernel.kl(hard, b, x, t, s), kernel.kl(soft, b, rows, t, s))


@pytest.mark.parametrize("process", [MaskProcess(3), UniformProcess(3)], ids=["mask", "uniform"])
def test_noise_on_soft_rows_is_noise_on_ids_and_keeps_the_gradient(process):
    """A student's soft tokens are noised like ids; what is left of them carries gradient."""
    ids, t = torch.randint(3, (40, 5), generator=gen()), torch.linspace(0.1, 0.9, 40, dtype=torch.float64)
    eps = torch.rand(40, 5, generator=gen(1), dtype=torch.float64)
    rows = soft_rows(ids, 3).requires_grad_()
    noised = process.add_noise(rows, eps, t)
    assert torch.equal(noised, soft_rows(process.add_noise(ids, eps, t), 3))
    (grad,) = torch.autograd.grad(noised.sum(), rows)
    assert torch.equal(grad[..., 0], (eps >= t[:, None]).double())


@pytest.mark.parametrize(
    "process,kernel", [(MaskProcess(3), mask()), (UniformProcess(3), uniform())], ids=["mask", "uniform"]
)
def test_relaxed_trajectories_stay_on_the_simplex_and_carry_gradient(process, kernel):
    """Soft states go back into the network (DRAKES); hard limits are one-hot; the table's logits receive gradient."""
    logits = torch.randn(2, 3, generator=gen(), dtype=torch.float64).requires_grad_()

    class Free(TokenTable):
        def forward(self, x_t, t, cond, features=False):
            return logits.expand(len(x_t), 2, 3)

    teacher, x = Free(toy_table(2), process), soft_rows(process.initial(400, 2, gen(2)), 3)
    grid = torch.linspace(1, 0, 6, dtype=torch.float64)
    for step in trajectory(teacher, kernel.relax(0.5), x, grid, gen=gen(3), grad_last=5):
        assert float((step.x_next.detach().sum(-1) - 1).abs().max()) < 1e-9 and float(step.x_next.detach().min()) >= 0
    (grad,) = torch.autograd.grad(step.x_next[..., 0].sum(), logits)
    assert bool((grad[:, 0] > 0).all()) and bool((grad[:, 1:].sum(1) < 0).all())
    cold = kernel.relax(1e-3).propose(step.pred, x, *times(400, 0.9, 0.5), gen(4))
    assert float(cold.detach().max(-1).values.quantile(0.02)) > 0.99


def test_relaxed_step_is_unbiased_in_the_hard_limit():
    process, table = MaskProcess(3), toy_table(2).double()
    x, (t, s) = torch.full((60_000, 2), 3), times(60_000, 0.7, 0.3)
    pred = TokenTable(table, process).predict(x, t, {})
    soft = TokenKernel(1e-4).propose(pred, x, t, s, gen())
    counts = torch.bincount(soft[:, 0].argmax(-1), minlength=4).double()
    assert p_value(counts, checks.enumerated_step(process, table, x[0], 0.7, 0.3)[0]) > 1e-4


def test_straight_through_rows():
    soft = torch.softmax(torch.randn(3, 5, generator=gen()), -1).requires_grad_()
    hard = argmax_rows(soft, 4)
    assert hard.detach().sum(-1).tolist() == pytest.approx([1, 1, 1]) and float(hard.detach().max()) == pytest.approx(1)
    (grad,) = torch.autograd.grad((hard * torch.arange(4.0)).sum(), soft)
    torch.testing.assert_close(grad, torch.tensor([0.0, 1, 2, 3, 0]).expand(3, 5))


def test_known_tokens_are_carried_over_and_the_mask_column_is_dropped():
    raw = torch.randn(1, 3, 4, generator=gen()).requires_grad_()
    pred = DiscretePrediction(raw, torch.tensor([[2, 3, 0]]), torch.tensor([0.5]), MaskProcess(3), "logp")
    p = pred.logp_x0.exp()
    assert p[0, 0].tolist() == [0, 0, 1] and p[0, 2].tolist() == [1, 0, 0]
    torch.testing.assert_close(p[0, 1], torch.softmax(raw[0, 1, :3], -1))
    (grad,) = torch.autograd.grad(pred.logp_x0[0, :, 0].sum(), raw)
    assert float(grad[0, 0].abs().sum()) == 0 and bool(torch.isfinite(grad).all())


def test_token_networks_take_ids_and_rows():
    emb = torch.nn.Linear(4, 3)
    net = TokenNetwork(emb, MaskProcess(3), lambda n, x, time, cond: n(soft_rows(x, 3).float()))
    ids = torch.tensor([[3, 1]])
    torch.testing.assert_close(
        net.predict(ids, torch.tensor([0.5]), {}).logp_x0,
        net.predict(soft_rows(ids, 3).float(), torch.tensor([0.5]), {}).logp_x0,
    )


def test_errors_say_what_to_do():
    process = MaskProcess(3)
    pred = TokenTable(toy_table(2), process).predict(torch.full((1, 2), 3), torch.ones(1), {})
    x, (t, s) = torch.full((1, 2), 3), times(1, 1.0, 0.5)
    with pytest.raises(ValueError, match="give it a torch.Generator"):
        mask().propose(pred, x, t, s, None)
    with pytest.raises(ValueError, match="use the mask kernel and relax"):
        first_hitting().relax(0.5)
    with pytest.raises(ValueError, match="token ids, not soft rows"):
        first_hitting().propose(pred, soft_rows(x, 3), t, s, gen())
    continuous = checks.two_classes()
    with pytest.raises(ValueError, match="use ddim or renoise"):
        mask().propose(continuous.predict(torch.zeros(1, 4), torch.ones(1) * 0.5, {}), x, t, s, gen())
    assert ddim().is_deterministic(t, s).all()
