"""Kernels against closed forms, solvers against the exact map, the trajectory's gradients, memory and steering."""

import math

import pytest
import torch
from torch import nn

from limbeck.core.diffusion import checks
from limbeck.core.diffusion.checks import Counted, gm1d, two_classes
from limbeck.core.diffusion.denoiser import FewStep, Network, Prediction
from limbeck.core.diffusion.guidance import guide
from limbeck.core.diffusion.mixture import GaussianMixture
from limbeck.core.diffusion.process import EDM, VP, Flow
from limbeck.core.diffusion.sampling import (
    ancestral,
    ddim,
    ddim_jump,
    euler,
    flow_sde,
    heun,
    jump,
    renoise,
    sample,
    substeps,
    times,
    trajectory,
    travel,
)

torch.set_num_threads(1)
STOCHASTIC = {"ddim .5": ddim(0.5), "ancestral": ancestral(), "renoise": renoise(), "jump .4": jump(0.4)}
PROCESSES = {"vp": VP("cosine"), "edm": EDM(), "flow": Flow(2.0)}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def question(process, n=6, seed=0):
    """(prediction, x, t, s) with another t and s per row."""
    t, s = torch.linspace(0.4, 0.9, n, dtype=torch.float64), torch.linspace(0.1, 0.6, n, dtype=torch.float64)
    x = process.add_noise(noise(n, 3, 2, seed=seed), noise(n, 3, 2, seed=seed + 1), t)
    return Prediction(noise(n, 3, 2, seed=seed + 2), x, t, process, "x0"), x, t, s


def test_kernels_keep_the_marginals():
    assert all(check.passed for check in checks.kernels())


def test_a_kernel_without_the_shrink_is_caught():
    """Adding tau xi to the full sigma_s eps breaks the variance (card scott)."""
    exact, process = ancestral(), VP("cosine")

    def moments(pred, x, t, s):
        return ddim(0.0).moments(pred, x, t, s)[0], exact.moments(pred, x, t, s)[1]

    assert max(checks.transition(type(exact)(moments, exact.noiseless), process, 0.7, 0.4)) > 20


def test_jump_identities():
    assert all(check.passed for check in checks.jumps())


def test_solvers_against_the_cdf_map():
    assert all(check.passed for check in checks.solvers())


def test_one_call_predicts_the_mean_only():
    # card 0.1: one denoiser call has RMSE 1.007
    assert checks.end_point_rmse(ddim(), 1) == pytest.approx(1.007, abs=0.02)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("kernel", STOCHASTIC.values(), ids=STOCHASTIC)
def test_log_prob_is_that_of_torch_distributions(kernel, process):
    pred, x, t, s = question(process)
    x_s = kernel.propose(pred, x, t, s, gen(3))
    mean, std = kernel.moments(pred, x, t, s)
    own = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x_s).flatten(1)
    torch.testing.assert_close(kernel.log_prob(pred, x, x_s, t, s), own.sum(1))
    torch.testing.assert_close(kernel.log_prob(pred, x, x_s, t, s, "mean"), own.mean(1))
    with pytest.raises(ValueError, match='"sum" or "mean"'):
        kernel.log_prob(pred, x, x_s, t, s, "max")


@pytest.mark.parametrize("kernel", [*STOCHASTIC.values(), flow_sde()], ids=[*STOCHASTIC, "flow_sde"])
def test_kl_is_that_of_torch_distributions(kernel):
    (a, x, t, s), b = question(Flow()), None
    b = Prediction(noise(6, 3, 2, seed=9), x, t, Flow(), "x0")
    normals = []
    for pred in (a, b):
        mean, std = kernel.moments(pred, x, t, s)
        normals.append(torch.distributions.Normal(mean, std.expand_as(mean)))
    own = torch.distributions.kl_divergence(*normals).flatten(1).sum(1)
    torch.testing.assert_close(kernel.kl(a, b, x, t, s), own)


@pytest.mark.parametrize("kernel", [*STOCHASTIC.values(), ddim(), jump()], ids=[*STOCHASTIC, "ddim", "jump"])
def test_rows_with_their_own_times_are_independent(kernel):
    pred, x, t, s = question(VP())
    mean, std = kernel.moments(pred, x, t, s)
    for i in range(6):
        row = Prediction(pred.raw[i : i + 1], x[i : i + 1], t[i : i + 1], VP(), "x0")
        one_mean, one_std = kernel.moments(row, x[i : i + 1], t[i : i + 1], s[i : i + 1])
        torch.testing.assert_close(mean[i : i + 1], one_mean)
        torch.testing.assert_close(std.expand_as(mean)[i : i + 1], one_std.expand_as(one_mean))


def test_stored_transitions_can_be_scored_under_another_policy():
    """The score function has mean zero under its own policy, and needs a detached end point."""
    process, n = VP("cosine"), 40_000
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    t, s = torch.full((n,), 0.6), torch.full((n,), 0.4)
    x = process.add_noise(noise(n, 1), noise(n, 1, seed=1), t)
    pred = Prediction(x * 0.5 + theta, x, t, process, "x0")
    x_s = ancestral().propose(pred, x, t, s, gen(2))
    (kept,) = torch.autograd.grad(ancestral().log_prob(pred, x, x_s.detach(), t, s).mean(), theta, retain_graph=True)
    (lost,) = torch.autograd.grad((ancestral().log_prob(pred, x, x_s, t, s) * x_s.detach()[:, 0]).mean(), theta)
    assert abs(float(kept)) < 0.1
    assert abs(float(lost)) < 1e-12  # card base, check 1: exactly zero when the stored state keeps its graph


def test_deterministic_steps():
    pred, x, t, s = question(VP())
    first, second = (ddim().propose(pred, x, t, s, None) for _ in range(2))
    assert torch.equal(first, second) and bool(ddim().is_deterministic(t, s).all())
    torch.testing.assert_close(first, ddim_jump(x, t, s, pred.x0, VP()))
    torch.testing.assert_close(first, jump().propose(pred, x, t, s, None))
    torch.testing.assert_close(ddim(0.0).propose(pred, x, t, s * 0, None), pred.x0)
    for kernel in STOCHASTIC.values():
        torch.testing.assert_close(kernel.propose(pred, x, t, s * 0, None), pred.x0)  # the last step draws nothing
        assert kernel.is_deterministic(t, s * 0).all() and not kernel.is_deterministic(t, s).any()
        with pytest.raises(ValueError, match="no density"):
            kernel.log_prob(pred, x, x, t, s * 0)
        with pytest.raises(ValueError, match="give it a torch.Generator"):
            kernel.propose(pred, x, t, s, None)


def test_jump_with_full_noise_is_renoise():
    pred, x, t, s = question(VP())
    for a, b in zip(jump(1.0).moments(pred, x, t, s), renoise().moments(pred, x, t, s), strict=True):
        torch.testing.assert_close(a, b.expand_as(a))


def test_travel_needs_its_scale():
    """Card tdm: x0 ~ N(1, .7^2), .3 to .6 in cosine VP gives mean .588; treating x_mid as x0 gives .524."""
    process, n = VP("cosine"), 100_000
    s, p = torch.full((n,), 0.3), torch.full((n,), 0.6)
    middle = process.add_noise(1 + 0.7 * noise(n, 1), noise(n, 1, seed=1), s)
    right, wrong = travel(middle, s, p, noise(n, 1, seed=2), process), process.add_noise(middle, noise(n, 1, seed=2), p)
    assert float(right.mean()) == pytest.approx(0.588, abs=0.01) and float(right.std()) == pytest.approx(
        0.908, abs=0.01
    )
    assert float(wrong.mean()) == pytest.approx(0.524, abs=0.01)


@pytest.mark.parametrize("eta,expected", [(0.0, 0.584), (0.1, 0.563), (0.3, 0.417), (0.5, 0.222), (1.0, 0.0006)])
def test_sde_steps_have_the_coupling_of_the_closed_form(eta, expected):
    """Card scott: the L2 limit G of 50 steps for N(m, .6^2); a step that ignores eta stays at .584."""
    one = GaussianMixture(torch.tensor([[0.0]]), 0.6, VP("cosine"))
    grid, gain = torch.linspace(0.999, 0, 51, dtype=torch.float64), 1.0
    x = torch.ones(1, 1, dtype=torch.float64)
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        pred = one.predict(x, t.expand(1), {})
        gain *= float(ddim(eta).moments(pred, x, t.expand(1), s.expand(1))[0])
    # conditional mean of the end point per unit of the start: the slope of the L2 limit
    assert gain == pytest.approx(expected, rel=0.02, abs=2e-4)


def test_flow_sde_converges_to_the_data():
    """First order in the step: the end distribution of N(.5, .6^2) is met as the steps grow, for any noise."""
    teacher, errors = GaussianMixture(torch.tensor([[0.5]]), 0.6, Flow()), []
    z = noise(20_000, 1)
    for n in (10, 80):
        x = sample(teacher, z, torch.linspace(1, 0, n + 1, dtype=torch.float64), flow_sde(0.7), gen(1))
        errors.append(abs(float(x.mean()) - 0.5) + abs(float(x.std()) - 0.6))
    assert errors[1] < 0.04 and errors[1] < 0.5 * errors[0]
    silent = sample(teacher, z, times(5, Flow()), flow_sde(0.0))
    torch.testing.assert_close(silent, sample(teacher, z, times(5, Flow()), euler()))
    with pytest.raises(ValueError, match="use ddim"):
        sample(two_classes(), noise(2, 4), times(2, VP("cosine")), flow_sde(), gen())


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_heun_beats_euler_in_every_process(process):
    teacher, z = two_classes(process), noise(200, 4)
    cond = {"label": torch.zeros(1, dtype=torch.long)}
    grid = times(24, process, "karras")
    exact = sample(teacher, z, times(400, process, "karras"), heun(), cond=cond)
    errors = [float((sample(teacher, z, grid, rule, cond=cond) - exact).abs().mean()) for rule in (euler(), heun())]
    assert errors[1] < 0.5 * errors[0]


def test_substeps_are_the_finer_grid():
    teacher, z = gm1d(), noise(50, 1)
    coarse, fine = torch.linspace(0.999, 0, 6, dtype=torch.float64), torch.linspace(0.999, 0, 16, dtype=torch.float64)
    torch.testing.assert_close(sample(teacher, z, coarse, substeps(ddim(), 3)), sample(teacher, z, fine, ddim()))


def test_few_step_student_is_the_renoise_trajectory():
    """FewStep with the draws that the kernel would make is the renoise sampler."""
    teacher, z, source = gm1d(), noise(30, 1), gen(5)
    fresh = [torch.randn(30, 1, generator=source, dtype=torch.float64) for _ in range(2)]
    student = FewStep(teacher, (0.999, 0.6, 0.3))
    walked = sample(teacher, z, torch.tensor([0.999, 0.6, 0.3, 0.0]), renoise(), gen(5))
    torch.testing.assert_close(student.sample(z, {}, fresh).x, walked)


def test_time_grids():
    for process in (*PROCESSES.values(), VP(), Flow()):
        for kind in ("uniform", "karras", "trailing"):
            grid = times(7, process, kind)
            assert (
                len(grid) == 8
                and float(grid[-1]) == 0
                and bool((grid.diff() < 0).all())
                and grid.dtype == torch.float32
            )
            assert float(grid[0]) == pytest.approx(process.t_max)
    i = torch.arange(40, dtype=torch.float64)  # EDM eq. 5
    sigma = (80 ** (1 / 7) + i / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(EDM().sigma(times(40, EDM(), "karras")[:-1]), sigma, rtol=1e-5, atol=1e-7)
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, timestep_spacing="trailing")
    for n in (4, 7, 30):
        scheduler.set_timesteps(n)
        assert ((times(n, VP(), "trailing")[:-1] * 1000 - 1).round().long() == scheduler.timesteps).all()
    with pytest.raises(ValueError, match="uniform, karras or trailing"):
        times(3, VP(), "leading")


def small(seed=0, width=64):
    """A float64 flow MLP in two dimensions with a label."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        ).double()
    return Network(
        net, Flow(), "flow", lambda n, x, time, cond: n(torch.cat([x, time[:, None].to(x)], 1)) + cond["c"][:, None]
    )


def gradients(model, z, grad_last, remat, kernel=None, n=5):
    model.zero_grad()
    cond = {"c": torch.zeros(len(z), dtype=torch.float64)}
    for step in trajectory(model, kernel or ddim(0.6), z, times(n, Flow()), cond, gen(4), grad_last, remat):
        x = step.x_next
    x.square().sum().backward()
    return [p.grad.clone() for p in model.parameters()], x.detach()


def by_hand(model, z, grad_last, n=5):
    """The same walk written out, cut by detach."""
    model.zero_grad()
    x, source, grid, cond = z, gen(4), times(n, Flow()), {"c": torch.zeros(len(z), dtype=torch.float64)}
    for i in range(n):
        t, s = grid[i].expand(len(z)), grid[i + 1].expand(len(z))
        x = ddim(0.6).propose(model.predict(x, t, cond), x, t, s, source)
        x = x.detach() if i < n - grad_last else x
    x.square().sum().backward()
    return [p.grad.clone() for p in model.parameters()], x.detach()


@pytest.mark.parametrize("last", [1, 3, 5])
def test_gradient_through_the_last_steps_is_full_autograd_cut_there(last):
    model, z = small(), noise(7, 2)
    (got, x), (own, y) = gradients(model, z, last, remat=False), by_hand(model, z, last)
    assert torch.equal(x, y)
    for a, b in zip(got, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if last < 5:
        assert any(not torch.allclose(a, b) for a, b in zip(got, gradients(model, z, 5, False)[0], strict=True))


@pytest.mark.parametrize("kernel", [ddim(0.6), heun(), substeps(ddim(), 2)], ids=["ddim", "heun", "substeps"])
def test_rematerialised_gradient_is_bit_equal(kernel):
    model, z = small(), noise(7, 2)
    (plain, x), (remat, y) = (gradients(model, z, 4, flag, kernel) for flag in (False, True))
    assert torch.equal(x, y) and all(torch.equal(a, b) for a, b in zip(plain, remat, strict=True))


def test_rematerialised_gradient_is_bit_equal_under_guidance():
    model, z = small(), noise(7, 2)
    guided = guide(model, {"c": torch.full((1,), 0.5, dtype=torch.float64)}, 2.5, (0.1, 0.7))
    (plain, x), (remat, y) = (gradients(guided, z, 4, flag) for flag in (False, True))
    assert torch.equal(x, y) and all(torch.equal(a, b) for a, b in zip(plain, remat, strict=True))


def kept_bytes(remat):
    """Bytes that autograd keeps for the backward pass, each storage once."""
    model, z, kept = small(width=256), noise(200, 2), {}
    cond = {"c": torch.zeros(200, dtype=torch.float64)}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    walked = []  # nothing may be freed and its address used again
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for step in trajectory(model, ddim(), z, times(8, Flow()), cond, grad_last=8, remat=remat):
            walked.append(step)
    return sum(kept.values())


def test_rematerialisation_keeps_less():
    assert kept_bytes(True) < 0.4 * kept_bytes(False)


def test_gradient_reaches_the_starting_noise():
    model, z = small(), noise(5, 2).requires_grad_()
    cond = {"c": torch.zeros(5, dtype=torch.float64)}
    *_, last = trajectory(model, ddim(), z, times(3, Flow()), cond, grad_last=3)
    last.x_next.sum().backward()
    assert z.grad is not None and float(z.grad.abs().min()) > 0


def test_no_graph_by_default_and_grad_mode_does_not_leak():
    model, cond = small(), {"c": torch.zeros(5, dtype=torch.float64)}
    for step in trajectory(model, ddim(), noise(5, 2), times(3, Flow()), cond):
        assert not step.x_next.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        for step in trajectory(model, ddim(), noise(5, 2), times(3, Flow()), cond, grad_last=3):
            assert not step.x_next.requires_grad and not torch.is_grad_enabled()


def test_steps_chain_and_carry_their_density():
    teacher, grid = gm1d(), torch.tensor([0.999, 0.7, 0.4, 0.0])
    steps = list(trajectory(teacher, ancestral(), noise(9, 1), grid, gen=gen(1)))
    for a, b in zip(steps, steps[1:], strict=False):
        assert a.x_next is b.x and torch.equal(a.s, b.t)
    for step in steps[:2]:
        torch.testing.assert_close(step.logp, ancestral().log_prob(step.pred, step.x, step.x_next, step.t, step.s))
    assert steps[-1].logp is None  # s = 0 is a point, not a density
    assert next(iter(trajectory(teacher, heun(), noise(9, 1), grid))).logp is None


def test_on_step_replaces_the_state():
    seen = []

    def hold(step):
        seen.append(step.i)
        return step.x_next.clamp(-0.5, 0.5) if step.i == 1 else None

    steps = list(
        trajectory(gm1d(), ancestral(), noise(9, 1), torch.tensor([0.999, 0.7, 0.4, 0.1]), gen=gen(1), on_step=hold)
    )
    assert seen == [0, 1, 2] and float(steps[2].x.abs().max()) <= 0.5
    torch.testing.assert_close(  # the density is that of the proposal, not of what replaced it
        steps[1].logp, ancestral().log_prob(steps[1].pred, steps[1].x, steps[1].proposal, steps[1].t, steps[1].s)
    )


def test_on_step_resamples_state_condition_and_times():
    """Particle selection may also change the number of rows."""
    teacher, label = two_classes(), {"label": torch.tensor([0, 0, 1, 1])}
    grid = torch.stack([torch.linspace(0.9, end, 4) for end in (0.0, 0.1, 0.2, 0.3)], 1)
    index = torch.tensor([3, 3, 0, 2, 2, 2])
    steps = list(
        trajectory(
            teacher, ancestral(), noise(4, 4), grid, label, gen(2), on_step=lambda step: index if step.i == 0 else None
        )
    )
    assert torch.equal(steps[1].x, steps[0].proposal[index])
    assert steps[2].s.tolist() == pytest.approx([0.3, 0.3, 0.0, 0.2, 0.2, 0.2])
    own = teacher.predict(steps[1].x, steps[1].t, {"label": label["label"][index]}).x0
    torch.testing.assert_close(steps[1].pred.x0, own)


def test_trajectories_steer_tokens_too():
    from limbeck.core.diffusion.checks import toy_table
    from limbeck.core.diffusion.discrete import MaskProcess, mask
    from limbeck.core.diffusion.mixture import TokenTable

    process = MaskProcess(3)
    index = torch.tensor([1, 1, 0])
    steps = list(
        trajectory(
            TokenTable(toy_table(), process),
            mask(),
            process.initial(3, 4),
            torch.linspace(1, 0, 5),
            gen=gen(),
            on_step=lambda step: index if step.i == 2 else None,
        )
    )
    assert torch.equal(steps[2].x_next, steps[2].proposal[index]) and int(steps[-1].x_next.max()) < 3


def test_one_evaluation_a_step():
    counted = Counted(gm1d())
    sample(counted, noise(3, 1), torch.linspace(0.999, 0, 11), ddim())
    assert counted.calls == 10
    counted = Counted(gm1d())
    sample(counted, noise(3, 1), torch.linspace(0.999, 0, 11), heun())
    assert counted.calls == 19  # two a step, one for the last


def test_samples_have_the_teachers_distribution():
    teacher = gm1d()
    x = sample(teacher, noise(20_000, 1), torch.linspace(0.999, 0, 101), ancestral(), gen(3))
    own = teacher.sample(20_000, gen(4))
    grid = torch.linspace(-2.5, 2.5, 51)
    gap = ((x < grid).double().mean(0) - (own < grid).double().mean(0)).abs().max()
    assert float(gap) < 1.95 * math.sqrt(2 / 20_000) + 0.01  # Kolmogorov-Smirnov at .001 and the step error


def test_begin_opens_one_state_per_trajectory():
    class Cached(Counted):
        opened = 0

        def begin(self, grid):
            fresh = Cached(self.inner)
            fresh.opened = len(grid)
            self.child = fresh
            return fresh

    outer = Cached(gm1d())
    sample(outer, noise(3, 1), torch.linspace(0.999, 0, 6), ddim())
    assert outer.calls == 0 and outer.child.calls == 5 and outer.child.opened == 6
