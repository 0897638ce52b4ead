"""Checks of AccVideo on three modes in the plane, whose guided walk of fifty steps is the truth.

Each takes what is under test as an argument, so that a test can hand it a wrong one and see it caught.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from limbeck.core.check import Check
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Network, Output
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.diffusion.process import Flow
from limbeck.core.distillation import config as settings
from limbeck.core.distillation.adversarial import Head
from limbeck.core.distillation.consistency import Leg
from limbeck.core.distillation.critic import FlatNet
from limbeck.core.distillation.path_checks import source, three_modes
from limbeck.core.distillation.shards import Shards
from limbeck.core.distillation.trajectories import Following, KeyAdversary, KeyHeads, Walks, hinge
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.players import Player
from limbeck.core.run.rng import Draws
from limbeck.core.run.trainer import Trainer

KEYS, EACH, COUNT, BATCH = 5, 10, 1024, 128
OPTIM = OptimConfig(kind="adam", lr=1e-2, decay="linear", clip=None)
Fault = Callable[[Following], None]


class Seen(Denoiser):
    """A denoiser whose features are its input."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.process, inner.kind)
        self.inner = inner

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        raw = self.inner(x_t, t, cond)
        return (raw, [x_t]) if features else raw


def model() -> Model:
    """The three modes under rectified flow of shift 7."""
    return Model(Seen(three_modes()), (2,), Identity(), lambda prompts: {}, "modes")


def walks(student: ManyStep | None = None) -> Walks:
    """Walks of fifty steps in memory, kept at five times."""
    teacher = model()
    own = student or ManyStep(teacher, teacher.denoiser, KEYS, 1.0)
    shards = Shards(Path("none"), {})
    fine = own.but(KEYS * EACH).grid()
    made = source(Model(three_modes(), (2,), Identity(), lambda prompts: {}, "modes"), own)
    set_ = settings.TrajectorySet(count=COUNT, each=EACH, guidance=1.0)
    return Walks(made, set_, own.grid(), fine, shards, 0, torch.device("cpu"))


def fresh() -> ManyStep:
    """The teacher plus a small net, sampled at the key times."""
    teacher, exact = model(), three_modes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = FlatNet((2,), 0, 64, 2)

    def call(own: nn.Module, x: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        return exact.predict(x, t, {}).flow + own(x, t, cond)

    return ManyStep(teacher, Network(net, Flow(7.0), "flow", call), KEYS, 1.0)


def distilled(steps: int = 300, change: Fault = lambda rule: None) -> Following:
    """A student trained on the secants alone; `change` plants a fault."""
    student = fresh()
    player = Player("student", student, OPTIM, steps)
    rule = Following(walks(student), settings.Trajectory(adversary=None), player)
    change(rule)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Trainer(rule, Team("cpu"), 0, "modes", steps, BATCH).run()
    finally:
        torch.set_num_threads(threads)
    return rule


def ends(student: ManyStep, n: int = 1000) -> Tensor:
    """The ends [n,2] of a sampler from fixed noise."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(5))
    return student.sample(noise, {}).x.float()


def rms(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared distance of rows."""
    return float((a - b).square().sum(1).mean().sqrt())


def unexplained(rule: Following) -> float:
    """The loss on fresh draws over the variance of the secants' velocities: 1 for one that says the mean."""
    ctx = Context(10**6, "modes", Draws(0, 10**6, 2048), 1, 0, torch.device("cpu"))
    leg, _ = rule.leg(ctx)
    with torch.no_grad():
        loss = rule.student_terms(ctx)["trajectory"]
    return float(loss / rule.goal(leg, rule.denoiser.process).flow.var(0).mean())


def followed(steps: int = 300, change: Fault = lambda rule: None) -> list[Check]:
    """Five steps of the student against fifty of the teacher from the same noise; five of the teacher's are far off."""
    rule = distilled(steps, change)
    teacher = ManyStep(model(), three_modes(), KEYS * EACH, 1.0)
    truth = ends(teacher)
    student: ManyStep = rule.walks.source.student  # type: ignore[assignment]
    plain = rms(ends(teacher.but(KEYS)), truth)
    return [
        Check("five steps of the student from the end of fifty", rms(ends(student), truth), 0.5, "<=", "rms"),
        Check("five steps of the teacher from it", plain, 0.7, ">=", "why tangents are no targets"),
        Check("share of the velocity that is not explained", unexplained(rule), 0.15, "<="),
    ]


def separation(made: Walks, late: int = 1, steps: int = 60) -> float:
    """How well trained heads tell stored states from those of a student that is right, where its last step ends.

    That is the area under the ROC curve. `late` 0 plants a fault: the real states are those of the time before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = KeyHeads([Head([2], 32) for _ in range(KEYS)])
    judge, grid, gen = KeyAdversary(model().denoiser, heads), made.keys, torch.Generator().manual_seed(1)
    optim, m = torch.optim.Adam(heads.parameters(), 2e-2), torch.full((2 * BATCH,), KEYS - 1)
    for _ in range(steps):
        mine, other = (made.states(torch.randint(COUNT, (2 * BATCH,), generator=gen))[0] for _ in range(2))
        row = torch.arange(2 * BATCH)
        real = Leg(mine[row, m], grid[m], mine[row, m + late], grid[m + 1], {})
        l_fake, l_real = judge.tell(other[row, m + 1], real, m)
        optim.zero_grad()
        hinge(l_fake, l_real).backward()  # type: ignore[no-untyped-call]
        optim.step()
    return float((l_real[:, None] > l_fake[None]).float().mean())


def told() -> list[Check]:
    """Heads separate states of the time before from those of the right one; a right student cannot be told."""
    made = walks()
    return [
        Check("area for stored states of the same time, chance .5", abs(separation(made) - 0.5), 0.15, "<="),
        Check("area for stored states of the time before", separation(made, late=0), 0.85, ">="),
    ]
