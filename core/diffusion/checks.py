"""Closed-form checks of the diffusion core: conversions, guidance, kernels, solvers, tokens, teachers.

Each takes the thing under test as an argument, so that a test can hand it a wrong one and see it caught.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.core.check import Check
from limbeck.core.diffusion import discrete, sampling
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Output, Prediction, predict
from limbeck.core.diffusion.guidance import combine, guide
from limbeck.core.diffusion.mixture import DataSet, GaussianMixture, TokenTable, cdf_map
from limbeck.core.diffusion.process import EDM, KINDS, VP, Flow, Process, convert

PROCESSES: dict[str, Process] = {
    "linear": VP(),
    "scaled_linear": VP("scaled_linear", 1000, 0.00085, 0.012),
    "cosine": VP("cosine"),
    "edm": EDM(),
    "flow": Flow(),
    "flow shift 3": Flow(3.0),
}
Convert = Callable[[Tensor, Tensor, Tensor, Process, str, str], Tensor]
Mix = Callable[[Prediction, Prediction, float], Prediction]


def _gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_gen(seed), dtype=torch.float64)


def usable_times(process: Process, floor: float = 1e-3, n: int = 2001) -> Tensor:
    """Times where min(alpha, sigma) >= floor."""
    t = torch.linspace(0, 1, n, dtype=torch.float64)
    return t[torch.minimum(process.alpha(t), process.sigma(t)) >= floor]


def round_trip(process: Process, src: str, dst: str, convert: Convert = convert) -> float:
    """Largest relative error of src -> dst -> src over all usable times."""
    t = usable_times(process)
    x0, eps = _draw(len(t), 8, seed=1), _draw(len(t), 8, seed=2)
    x_t = process.add_noise(x0, eps, t)
    value = convert(x0, x_t, t, process, "x0", src)
    back = convert(convert(value, x_t, t, process, src, dst), x_t, t, process, dst, src)
    return float(((back - value).abs() / value.abs().amax(1, keepdim=True).clamp_min(1)).max())


def conversions(convert: Convert = convert) -> list[Check]:
    """Round trips of every pair of kinds, for every process, in float64."""
    checks = []
    for name, process in PROCESSES.items():
        worst = max(round_trip(process, src, dst, convert) for src, dst in itertools.permutations(KINDS, 2))
        checks.append(Check(f"round trips, {name}", worst, 1e-12, "<="))
    return checks


class Counted(Denoiser):
    """Counts forwards and rows of the denoiser inside."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.process, inner.kind)
        self.inner, self.calls, self.rows = inner, 0, 0

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        self.calls, self.rows = self.calls + 1, self.rows + len(x_t)
        return self.inner(x_t, t, cond, features)


def two_classes(process: Process | None = None) -> GaussianMixture:
    """N(-1, .5^2) and N(1, .5^2) in four dimensions, labels 0 and 1."""
    means = torch.tensor([-1.0, 1.0])[:, None].expand(2, 4)
    return GaussianMixture(means, 0.5, process or VP("cosine"), classes=[0, 1])


def guidance(mix: Mix = combine) -> list[Check]:
    """SDS(g) - SDS(1) = (g - 1) CSD, and one forward for all of it (distribution-matching card 0.1, fact ii)."""
    teacher, eps, t = Counted(two_classes()), _draw(64, 4, seed=3), torch.linspace(0.05, 0.9, 64, dtype=torch.float64)
    x_t = teacher.process.add_noise(_draw(64, 4, seed=4), eps, t)
    label, null = {"label": torch.arange(64) % 2}, {"label": torch.tensor([-1])}
    cond, uncond = predict(teacher, [(x_t, t, label), (x_t, t, null)])
    csd, plain = cond.eps - uncond.eps, cond.eps - eps
    guided = (mix(cond, uncond, 7.5).eps - eps) - plain
    error = (guided - 6.5 * csd).abs().max() / (6.5 * csd).abs().max()
    return [
        Check("SDS(7.5) - SDS(1) - 6.5 CSD", float(error), 1e-14, "<="),
        Check("forwards of one guided prediction", _guided_calls(x_t, t, label, null), 1, "<="),
    ]


def _guided_calls(x_t: Tensor, t: Tensor, label: Encoded, null: Encoded) -> float:
    counted = Counted(two_classes())
    guide(counted, null, 3.0).predict(x_t, t, label)
    return counted.calls


def jumps() -> list[Check]:
    """J(x,t,t) = x, J(x,t,0) = x0, inverse(J) = x0, J then J = J (trajectory card 0.2)."""
    worst = {"J(x,t,t) = x": 0.0, "J(x,t,0) = x0": 0.0, "inverse(J) = x0": 0.0, "forward noise keeps N(0,1)": 0.0}
    for process in PROCESSES.values():
        t, s = usable_times(process, 0.05), usable_times(process, 0.05) * 0.6
        x, x0, zero = _draw(len(t), 4, seed=5), _draw(len(t), 4, seed=6), torch.zeros_like(t)
        landed = sampling.ddim_jump(x, t, s, x0, process)
        errors = (
            sampling.ddim_jump(x, t, t, x0, process) - x,
            sampling.ddim_jump(x, t, zero, x0, process) - x0,
            sampling.ddim_inverse(x, landed, t, s, process) - x0,
            _travel_error(process, s, t),
        )
        for name, error in zip(worst, errors, strict=True):
            worst[name] = max(worst[name], float(error.abs().max()))
    return [Check(name, error, 1e-11, "<=") for name, error in worst.items()]


def _travel_error(process: Process, s: Tensor, p: Tensor) -> Tensor:
    """Noise of variance sigma_s^2 carried to p has variance sigma_p^2, exactly."""
    one, none = torch.ones_like(s), torch.zeros_like(s)
    carried = (
        sampling.travel(process.sigma(s), s, p, none, process) ** 2 + sampling.travel(none, s, p, one, process) ** 2
    )
    return carried / process.sigma(p) ** 2 - 1


def gm1d() -> GaussianMixture:
    """The 1-D test bed of the trajectory cards: .3 N(-1,.4^2) + .7 N(1,.4^2), VP-cosine."""
    return GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.4, VP("cosine"), [0.3, 0.7])


def end_point_rmse(rule: sampling.Kernel | sampling.Solver, n: int, count: int = 2000) -> float:
    """RMSE of n uniform steps from T = .999 to 0 against the exact CDF map, over quantiles of N(0,1) (p_T to 1e-3)."""
    teacher, start = gm1d(), torch.full((count,), 0.999, dtype=torch.float64)
    x = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    target = cdf_map(teacher, x[:, 0], start, torch.zeros_like(start))
    times = torch.linspace(0.999, 0, n + 1, dtype=torch.float64)
    for step in sampling.trajectory(teacher, rule, x, times):
        x = step.x_next
    return float((x[:, 0] - target).square().mean().sqrt())


def solvers() -> list[Check]:
    """DDIM-N end points against the CDF map, first order; Heun, second order (trajectory card 0.1)."""
    checks = []
    for n, known in ((4, 0.233), (16, 0.063), (64, 0.0161)):
        measured = end_point_rmse(sampling.ddim(), n)
        checks.append(Check(f"DDIM-{n} RMSE near {known}", abs(measured / known - 1), 0.03, "<=", f"{measured:.4f}"))
    fine, finer = end_point_rmse(sampling.heun(), 32), end_point_rmse(sampling.heun(), 64)
    return [*checks, Check("Heun error ratio, 32 to 64 steps", fine / finer, 3.5, ">=")]


def transition(
    kernel: sampling.Kernel, process: Process, t: float, s: float, count: int = 40_000
) -> tuple[float, float]:
    """(mean, standard deviation) of x_s given x0 = 1 for every row, in units of the exact ones' standard error."""
    x0 = torch.ones(count, 1, dtype=torch.float64)
    at_t, at_s = (torch.full((count,), value, dtype=torch.float64) for value in (t, s))
    x = process.add_noise(x0, _draw(count, 1, seed=8), at_t)
    x_s = kernel.propose(Prediction(x0, x, at_t, process, "x0"), x, at_t, at_s, _gen(9))
    alpha, sigma = float(process.alpha(at_s[:1])), float(process.sigma(at_s[:1]))
    error = sigma / count**0.5
    return abs(float(x_s.mean()) - alpha) / error, abs(float(x_s.std()) - sigma) / (error / 2**0.5)


def kernels() -> list[Check]:
    """x_s given x0 has exactly the marginal of the process, for every kernel and process, in standard errors."""
    table = {
        "ddim 0": sampling.ddim(),
        "ddim .5": sampling.ddim(0.5),
        "ancestral": sampling.ancestral(),
        "renoise": sampling.renoise(),
        "jump .4": sampling.jump(0.4),
    }
    worst = dict.fromkeys(table, 0.0)
    for (name, kernel), process in itertools.product(table.items(), PROCESSES.values()):
        worst[name] = max(worst[name], *transition(kernel, process, 0.7, 0.4))
    return [Check(f"marginal after {name}", value, 4.5, "<=", "standard errors") for name, value in worst.items()]


def toy_table(length: int = 4, vocab: int = 3) -> Tensor:
    """Toy D of the alignment cards: softmax(1.2 randn) over all sequences."""
    flat = torch.softmax(1.2 * torch.randn(vocab**length, generator=_gen()), 0)
    return flat.reshape((vocab,) * length)


def enumerated_step(process: discrete.TokenProcess, table: Tensor, x: Tensor, t: float, s: float) -> Tensor:
    """p(x_s,i | x_t = x) [L,V+1] by summing over every x0 and x_s, from the definition of the process alone."""
    vocab, length = process.vocab, table.ndim
    to_s, to_t = forward_matrix(process, s), forward_matrix(process, t)
    between = torch.linalg.solve(to_s, to_t)
    rows = torch.zeros(length, vocab + 1, dtype=torch.float64)
    for x0 in itertools.product(range(vocab), repeat=length):
        joint = [to_s[x0[i]] * between[:, x[i]] for i in range(length)]
        sums = torch.stack([part.sum() for part in joint])
        for i in range(length):
            others = torch.cat([sums[:i], sums[i + 1 :]]).prod()
            rows[i] += table[x0] * joint[i] * others
    return rows / rows.sum(1, keepdim=True)


def forward_matrix(process: discrete.TokenProcess, t: float) -> Tensor:
    """q(x_t | x_0) [V+1,V+1] of one token; the mask state stays."""
    size = process.vocab + 1
    matrix = (1 - t) * torch.eye(size, dtype=torch.float64)
    if isinstance(process, discrete.MaskProcess):
        matrix[:, -1] += t
    else:
        matrix[:-1, :-1] += t / process.vocab
        matrix[-1, -1] = 1
    return matrix


def token_step_error(process: discrete.TokenProcess, states: list[list[int]]) -> float:
    """Largest error of the kernel's transition rows against enumeration, over the states given."""
    table, worst = toy_table().double(), 0.0
    teacher = TokenTable(table, process)
    for state, (t, s) in itertools.product(states, ((0.8, 0.5), (0.4, 0.1), (0.9, 0.0))):
        x = torch.tensor([state])
        at_t, at_s = torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64)
        pred = teacher.predict(x, at_t, {})
        assert isinstance(pred, discrete.DiscretePrediction)
        rows = discrete.posterior(process, pred.logp_x0.exp(), x, at_t, at_s)[0]
        worst = max(worst, float((rows - enumerated_step(process, table, x[0], t, s)).abs().max()))
    return worst


def one_token_tv(kernel: sampling.Kernel | None = None, count: int = 100_000) -> float:
    """Total variation between four steps of a sampler (first-hitting) on toy D and the table."""
    table, times = toy_table(), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    teacher = TokenTable(table, discrete.MaskProcess(3))
    x, gen = discrete.MaskProcess(3).initial(count, 4), _gen(11)
    for step in sampling.trajectory(teacher, kernel or sampling.first_hitting(), x, times, gen=gen):
        x = step.x_next
    index = (x * torch.tensor([27, 9, 3, 1])).sum(1)
    return float((torch.bincount(index, minlength=81) / count - table.flatten()).abs().sum() / 2)


def tokens() -> list[Check]:
    """Mask and uniform transitions against enumeration of every x0 and x_s; the one-token sampler against the table."""
    hidden, open_ = [[3, 3, 3, 3], [0, 3, 2, 3], [1, 2, 3, 0]], [[0, 0, 0, 0], [2, 1, 0, 2]]
    return [
        Check("mask step against enumeration", token_step_error(discrete.MaskProcess(3), hidden), 1e-12, "<="),
        Check("uniform step against enumeration", token_step_error(discrete.UniformProcess(3), open_), 1e-12, "<="),
        Check("one-token sampler, TV to the table", one_token_tv(), 0.015, "<=", "an exact sampler has about .009"),
    ]


def score_error(teacher: GaussianMixture) -> float:
    """Largest difference between the denoiser's score and autograd of log p_t, over times and labels."""
    usable = usable_times(teacher.process, 0.02)
    t = usable[torch.linspace(0, len(usable) - 1, 96).long()]
    x = _draw(96, *teacher.shape, seed=12).requires_grad_()
    cond = {"label": torch.arange(96) % 3 - 1}
    (gradient,) = torch.autograd.grad(teacher.log_prob(x, t, cond).sum(), x)
    return float((teacher.predict(x.detach(), t, cond).score - gradient).abs().div(gradient.abs() + 1).max())


def teachers() -> list[Check]:
    """Closed-form teachers: score = grad log p_t; a data set is a mixture of narrow Gaussians."""
    points = _draw(12, 3, seed=13)
    x, t = _draw(40, 3, seed=14), torch.linspace(0.2, 0.9, 40, dtype=torch.float64)
    narrow = GaussianMixture(points, 1e-4, Flow()).predict(x, t, {}).x0
    data = DataSet(points, Flow()).predict(x, t, {}).x0
    checks = [Check(f"score of a mixture, {n}", score_error(two_classes(p)), 1e-9, "<=") for n, p in PROCESSES.items()]
    return [*checks, Check("data set against a narrow mixture", float((data - narrow).abs().max()), 1e-5, "<=")]
