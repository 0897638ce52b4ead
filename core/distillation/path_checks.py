"""Checks of consistency, progressive and reflow distillation on teachers whose paths are known exactly.

In one dimension the probability-flow ODE keeps the CDF, so that the end of every path is known (`mixture.cdf_map`).
Each check takes what is under test as an argument, so that a test can hand it a wrong one and see it caught.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from limbeck.core.check import Check
from limbeck.core.diffusion.checks import PROCESSES, end_point_rmse, gm1d
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Call, Denoiser, FewStep, Model, Network, Prediction
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.diffusion.mixture import GaussianMixture, cdf_map
from limbeck.core.diffusion.process import VP, Flow, Process
from limbeck.core.diffusion.sampling import ddim, ddim_jump, euler, times, trajectory
from limbeck.core.diffusion.time import law
from limbeck.core.distillation import config as settings
from limbeck.core.distillation.consistency import Boundary, Consistency, Consistent, Followed, Leg, Shadow
from limbeck.core.distillation.critic import FlatNet
from limbeck.core.distillation.reflow import Halving, Regression, Secant, Straight, secant, straightness, two_steps
from limbeck.core.distillation.source import Source
from limbeck.core.run.build import Batch
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.distributed import Team
from limbeck.core.run.players import Player
from limbeck.core.run.trainer import Trainer

Mapped = Callable[[Tensor, Tensor, Tensor, float], Tensor]
OPTIM = OptimConfig(kind="adam", lr=2e-3, decay="linear", clip=None)
BATCH = 256


@dataclass
class Exact:
    """Exact samples of a closed-form teacher, without prompts."""

    teacher: GaussianMixture

    def prompts(self, n: int, gen: Generator, rows: slice) -> list[str]:
        """Empty ones."""
        return [""] * n

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """x [b, *S]."""
        return Batch(self.teacher.sample(n, gen)[rows], [""] * n)


def line(process: Process) -> Model:
    """gm1d under a process."""
    known = gm1d()
    teacher = GaussianMixture(known.get_buffer("means"), known.get_buffer("std"), process, known.get_buffer("weights"))
    return Model(teacher, (1,), Identity(), lambda prompts: {}, "gm1d")


def net(model: Model) -> Denoiser:
    """A small net for it, always the same one, which knows nothing of a boundary condition.

    Flows are asked at t itself: their noise end is a limit of log(sigma/alpha).
    """
    process = model.denoiser.process
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = FlatNet((1,), 0, 96, 3)
    if isinstance(process, Flow):
        return Network(inner, process, "flow", lambda own, x, t, cond: own(x, t, cond))
    level: Call = lambda own, x, t, cond: own(x, (process.ratio(t).log() / 4).to(x), cond)  # noqa: E731
    return Network(inner, process, "x0", level)


def source(model: Model, student: torch.nn.Module) -> Source:
    """Teacher, student and exact data."""
    assert isinstance(model.denoiser, GaussianMixture)
    return Source(model, student, Exact(model.denoiser), {})


def train(objective: Followed, steps: int) -> None:
    """So many steps, in this process on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Trainer(objective, Team("cpu"), 0, "line", steps, BATCH).run()
    finally:
        torch.set_num_threads(threads)


def starts(count: int = 2000) -> Tensor:
    """Quantiles of the standard normal [count, 1]."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None].float()


def map_error(model: Model, student: FewStep | ManyStep) -> float:
    """RMSE of the student's samples from quantiles of the noise against the exact map."""
    x, process = starts(), model.denoiser.process
    assert isinstance(model.denoiser, GaussianMixture)
    t = torch.full((len(x),), process.t_max, dtype=torch.float64)
    target = cdf_map(model.denoiser, x[:, 0], t, torch.zeros_like(t))
    with torch.no_grad():
        return float((student.sample(x, {}).x[:, 0] - target).square().mean().sqrt())


def boundary(mapped: Mapped | None = None) -> list[Check]:
    """f(x, 0) = x, to the bit, for nets of every process that answer anything; LCM's own number at index 19."""
    f = mapped or Boundary()
    gen = torch.Generator().manual_seed(0)
    x, x0 = (torch.randn(64, 3, 4, generator=gen) for _ in range(2))
    worst = max(float((f(x, torch.zeros(64), x0, p.t_min) - x).abs().max()) for p in PROCESSES.values())
    skip = f(torch.ones(1, 1), torch.tensor([0.02]), torch.zeros(1, 1), 0.001)
    return [
        Check("largest |f(x, 0) - x|, six processes", worst, 0.0, "<="),
        Check("c_skip at index 19, from 6.925e-6", abs(float(skip) / 6.925e-6 - 1), 1e-3, "<="),
    ]


def two_normals() -> GaussianMixture:
    """Class 0 is N(-.5, .36), class 1 is N(.8, .36); unguided alone, so that each is one Gaussian."""
    return GaussianMixture(torch.tensor([[-0.5], [0.8]]), 0.6, VP("cosine"), classes=[0, 1])


def guidance(scale: float = 3.0, steps: int = 400) -> list[Check]:
    """The guided teacher walked by the rule's own steps: of N(-.5, .36) and N(.8, .36) the mean is -.5 + 1.3 g.

    With the w of the papers, g - 1, for g it would be 4.7 or 2.1 instead of 3.4.
    """
    teacher, known = two_normals(), 3.0
    rule = Consistency(
        "guided", Consistent(teacher, (0.999,), Boundary()), teacher, {"label": torch.tensor([0])},
        times(steps, teacher.process).double(), euler(), scale, None,
    )  # fmt: skip
    x, label = starts(500).double(), {"label": torch.ones(500, dtype=torch.long)}
    for t, s in zip(rule.times[:-1], rule.times[1:], strict=True):
        x = rule.advanced(x, t.expand(500), s.expand(500), label, scale).x_next
    mean, std = float(x.mean()), float(x.std())
    return [
        Check("guided mean, from -.5 + 1.3 g", abs(mean - (-0.5 + 1.3 * known)), 0.1, "<=", f"{mean:.4f}"),
        Check("guided deviation, from .6", abs(std - 0.6), 0.02, "<=", f"{std:.4f}"),
    ]


def consistency(
    steps: int = 3000, intervals: int = 32, change: Callable[[Consistency], None] = lambda rule: None
) -> tuple[Model, Consistent]:
    """gm1d distilled: target EMA .95, the mean square, DDIM; `change` plants a fault."""
    model = line(VP("cosine"))
    student = Consistent(net(model), (model.denoiser.process.t_max,), Boundary(scaling=10.0))
    player = Player("student", student, OPTIM, steps)
    shadow = Shadow(player, 0.95)
    grid = times(intervals, model.denoiser.process)
    rule = Consistency("c", student, model.denoiser, {}, grid, euler(), 1.0, None, target=shadow.on)
    change(rule)
    data = source(model, student)
    train(Followed("consistency", lambda ctx: rule(ctx, *data.real(ctx)), player, shadow), steps)
    return model, student


def consistency_map(
    steps: int = 3000, intervals: int = 32, change: Callable[[Consistency], None] = lambda rule: None
) -> list[Check]:
    """One step of the student against the exact map, and against the teacher's one step (which says the mean)."""
    found = map_error(*consistency(steps, intervals, change))
    return [
        Check("one step, RMSE to the exact map", found, 0.15, "<="),
        Check("the teacher's one step over it", end_point_rmse(ddim(), 1) / found, 5.0, ">="),
    ]


def halving(goal: Secant = secant) -> list[Check]:
    """J(z, t, s) of the target is two steps of the teacher; at s = 0 it is the teacher's second answer."""
    checks, n = [], 400
    t = torch.linspace(0.4, 0.9, n, dtype=torch.float64)
    z = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, process in (("cosine", VP("cosine")), ("flow", Flow())):
        worst = 0.0
        for s in (t - 0.2, torch.zeros_like(t)):
            z_s = two_steps(line(process).denoiser, z, t, s, {})
            landed = ddim_jump(z, t, s, goal(Leg(z, t, z_s, s, {}), process).x0, process)
            worst = max(worst, float((landed - z_s).abs().max()))
        checks.append(Check(f"one step against two, {name}", worst, 1e-12, "<="))
    return checks


def progressive(first: int = 2500, each: int = 400, goal: Secant = secant) -> dict[int, float]:
    """RMSE to the exact map by number of steps: gm1d from DDIM-16 of the exact teacher to 8, 4, 2 and 1 steps."""
    model, found = line(VP("cosine")), {}
    own, asked = net(model), settings.Progressive()
    for steps in (8, 4, 2, 1):
        student = ManyStep(model, own, steps, 1.0)
        player = Player("student", student, OPTIM, first if steps == 8 else each)
        lent, teacher = (nullcontext, model.denoiser) if steps == 8 else (Shadow(player).on, own)
        legs = Halving("p", source(model, student), teacher, model.grid(steps), 1.0, lent)
        train(Followed("progressive", Regression(own, legs, asked, goal), player), player.total_steps)
        found[steps] = map_error(model, student)
    return found


def progressive_map(first: int = 2500, each: int = 400) -> list[Check]:
    """Each halving keeps the end: what the last student misses is what the first one missed."""
    found = progressive(first, each)
    growth = max(b - a for a, b in itertools.pairwise(found.values()))
    note = ", ".join(f"{steps}: {value:.3f}" for steps, value in found.items())
    return [
        Check("one step, RMSE to the exact map", found[1], 0.2, "<=", note),
        Check("largest growth by a halving", growth, 0.02, "<="),
    ]


def reflow(
    steps: int = 2000, pairs: int = 4096, change: Callable[[Straight], None] = lambda legs: None
) -> tuple[Model, ManyStep]:
    """gm1d as a flow, straightened on pairs of the exact teacher's 100-step walk; `change` plants a fault."""
    model = line(Flow())
    student = ManyStep(model, net(model), 1, 1.0)
    player = Player("student", student, OPTIM, steps)
    walk = settings.Pairing(steps=100, guidance=1.0)
    legs = Straight("r", source(model, student), law(settings.FULL), walk, pairs // BATCH)
    change(legs)
    train(Followed("reflow", Regression(student.denoiser, legs, settings.Reflow()), player), steps)
    return model, student


def reflow_map(
    steps: int = 2000, pairs: int = 4096, change: Callable[[Straight], None] = lambda legs: None
) -> list[Check]:
    """One step of the student against the exact map, and how straight its paths are beside the teacher's."""
    model, student = reflow(steps, pairs, change)
    grid = model.grid(50)
    before, after = (straightness(one, starts(), grid) for one in (model.denoiser, student.denoiser))
    return [
        Check("one step, RMSE to the exact map", map_error(model, student), 0.08, "<="),
        Check("8 steps, RMSE to the exact map", map_error(model, student.but(8)), 0.08, "<="),
        Check("straightness over the teacher's", after / before, 0.1, "<=", f"{before:.4f} before, {after:.4f} after"),
    ]


def three_modes() -> GaussianMixture:
    """Three modes of deviation .2 in the plane, under rectified flow of shift 7 (HunyuanVideo's)."""
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.2], [-0.6, -1.4]])
    return GaussianMixture(means, 0.2, Flow(7.0), [0.5, 0.3, 0.2])


def secants(goal: Secant = secant, shuffled: bool = False) -> list[Check]:
    """The secants between 5 key times of a stored walk of 50 Euler steps lead to its end; 5 plain steps do not."""
    teacher, gen = three_modes(), torch.Generator().manual_seed(0)
    x = torch.randn(1000, 2, generator=gen, dtype=torch.float64)
    grid = times(50, teacher.process).double()
    states = [x, *(step.x_next for step in trajectory(teacher, ddim(), x, grid))]
    keys, own, plain = range(0, 51, 10), x, x
    if shuffled:
        states = [states[0].roll(1, 0), *states[1:]]
    for a, b in itertools.pairwise(keys):
        t, s = grid[a].expand(len(x)), grid[b].expand(len(x))
        flow = goal(Leg(states[a], t, states[b], s, {}), teacher.process).flow
        own = ddim().propose(Prediction(flow, own, t, teacher.process, "flow"), own, t, s, None)
        plain = ddim().propose(teacher.predict(plain, t, {}), plain, t, s, None)
    off = [float((end - states[-1]).square().sum(1).mean().sqrt()) for end in (own, plain)]
    return [
        Check("5 secants, distance from the end of 50 steps", off[0], 5e-8, "<="),
        Check("5 Euler steps, distance from it", off[1], 0.3, ">=", "why tangents are no targets"),
    ]
