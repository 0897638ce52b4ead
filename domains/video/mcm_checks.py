"""Checks of MCM: what its maps see, what its judge sees, and the small comparison with plain consistency.

Each check takes what is under test as an argument, so that a test can hand it a wrong one and see it caught.
Legend: B clips, C channels, F frames, S pixels a side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from limbeck.core.check import Check
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Encoded, Model, Network
from limbeck.core.diffusion.mixture import DataSet
from limbeck.core.diffusion.process import Flow
from limbeck.core.distillation.consistency import Boundary, Consistent, distance
from limbeck.core.distillation.source import Source
from limbeck.core.run.build import Batch
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.players import Player
from limbeck.core.run.rng import Draws
from limbeck.core.run.trainer import Trainer
from limbeck.domains.video import config as settings
from limbeck.domains.video import metrics, motion
from limbeck.domains.video.mcm import Judge, Mcm, assembled, judge_of, picked

CUTOFF, ORDER = 0.25, 4
SIDE, COUNT, CLIPS = 16, 8, 16  # of the small comparison: pixels, frames, clips that its teacher knows
BLUR = 1.2  # pixels: deviation of the Gaussian that the teacher's clips went through
STEPS, BATCH, WEIGHT = 240, 4, 0.08


def maps() -> dict[str, motion.Map]:
    """Every map without weights."""
    plain: list[settings.MotionMap] = [settings.PlainMap(kind=kind) for kind in ("raw", "diff", "gcor", "sgcor")]
    slow, fast = (settings.FrequencyMap(kind=kind) for kind in ("freql", "freqh"))
    every = [*plain, slow, fast, settings.LocalMap(kind="lcor")]
    return {config.kind: motion.build(config, (4, 16, 8, 8)) for config in every}


def appearance(under_test: Mapping[str, motion.Map] | None = None) -> list[Check]:
    """||m(x + a) - m(x)|| / ||m(x)|| for clips and pictures a of normal noise; their sums are exact, so 0 is exact."""
    gen = torch.Generator().manual_seed(0)
    x, still = (torch.randn(2, 4, f, 8, 8, generator=gen).mul(256).round() / 256 for f in (16, 1))
    change = {name: float((m(x + still) - m(x)).norm() / m(x).norm()) for name, m in (under_test or maps()).items()}
    least = {"raw": 0.9, "freqh": 0.9, "freql": 1.5, "gcor": 1.4, "sgcor": 1.4, "lcor": 1.4}
    seen = [Check(f"a still picture in {name}", change[name], bound, ">=") for name, bound in least.items()]
    return [Check("a still picture in diff", change["diff"], 0.0, "<="), *seen]


def frequencies(low: Callable[[Tensor, float, int], Tensor] = motion.low) -> list[Check]:
    """The gain of `low` for waves of 1, 2, ... n/2 cycles along one axis is 1/(1 + (d^2/.25^2)^4), d = 2 cycles/n."""
    worst, sizes = 0.0, (16, 8, 12)
    for axis, n in enumerate(sizes):
        cycles, place = torch.arange(n // 2 + 1, dtype=torch.float64)[:, None], torch.arange(n)
        wave = (2 * torch.pi * cycles * place / n).cos()
        x = wave.view(-1, 1, *(n if a == axis else 1 for a in range(3))).expand(-1, 1, *sizes).float()
        gain = (low(x, CUTOFF, ORDER) * x).flatten(1).sum(1) / x.square().flatten(1).sum(1)
        known = 1 / (1 + ((2 * cycles[:, 0] / n) ** 2 / CUTOFF**2) ** ORDER)
        worst = max(worst, float((gain - known).abs().max()))
    x = torch.randn(2, 4, *sizes, generator=torch.Generator().manual_seed(0))
    whole = low(x, CUTOFF, ORDER) + motion.high(x, CUTOFF, ORDER)
    return [
        Check("slow + fast, from the whole", float((whole - x).abs().max()), 1e-6, "<="),
        Check("gains of waves along three axes", worst, 1e-5, "<="),
    ]


def context(batch: int) -> Context:
    """A first step of so many rows in one process."""
    return Context(0, "check", Draws(0, 0, batch), 1, 0, torch.device("cpu"))


def layout(pick: Callable[[Tensor, Tensor], Tensor] = picked, kind: type[Judge] = Judge) -> list[Check]:
    """Elements that know their place; and a judge who is shown the same clips as fake and as real cannot tell."""
    sizes = (3, 3, COUNT, 4, 5)
    x = torch.arange(3 * 3 * COUNT * 20.0).view(sizes)
    place = torch.tensor([[0.0, 0.99999999], [0.3, 0.5], [0.9, 0.0]])
    found = metrics.frames(pick(x, place))
    known = torch.stack([x[b, :, f] for b, f in ((0, 0), (0, 7), (1, 1), (1, 6), (2, 3), (2, 4))])
    wrong = float((found - known).abs().max()) if found.shape == known.shape else float("inf")
    usual = judge_of(settings.FrameAdversary(size=32), Identity(), torch.device("cpu"))
    judge, ctx = kind(usual.config, usual.net, usual.head, usual.codec), context(4)
    clips = torch.randn(4, 3, COUNT, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        judge.tell(ctx, clips, lambda look: judge.shown(clips, look))
    apart = abs(float(ctx.logged["gan/fake"]) - float(ctx.logged["gan/real"]))
    return [
        Check("frames of a batch, from where they belong", wrong, 0.0, "<="),
        Check("logits of clips against themselves", apart, 0.0, "<="),
    ]


def texture(u: Tensor) -> Tensor:
    """Still grounds [B,3,S,S] in [-1,0]: waves of 4 to 6 pixels at any angle between two dark colours; u [B,9]."""
    angle, phase = 2 * torch.pi * u[:, :2].T[..., None, None]
    place = torch.arange(SIDE) - (SIDE - 1) / 2
    along = angle.cos() * place + angle.sin() * place[:, None]
    wave = (1 + (2 * torch.pi * along / (4 + 2 * u[:, 2, None, None]) + phase).sin()) / 2
    return -u[:, 3:6, None, None].lerp(u[:, 6:9, None, None], wave[:, None])


def squares(n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    """Sharp clips [n,3,F,S,S] of a white square over a still ground, and its velocity [n,2] (right, down) in pixels."""
    velocity = 2 * torch.rand(n, 2, generator=gen) - 1
    time = torch.arange(COUNT) - (COUNT - 1) / 2
    centre = (velocity[:, None] * time[:, None])[..., None, None]  # [n,F,2,1,1]
    place = torch.arange(SIDE) - (SIDE - 1) / 2
    across, down = (place - centre[:, :, 0]).abs(), (place[:, None] - centre[:, :, 1]).abs()
    cover = (2.5 - torch.maximum(across, down)).clamp(0, 1)[:, None]
    return texture(torch.rand(n, 9, generator=gen))[:, :, None].lerp(torch.ones(()), cover), velocity


def blurred(x: Tensor) -> Tensor:
    """Clips [B,3,F,S,S] through a Gaussian, frame by frame."""
    kernel = (-(torch.arange(-4, 5.0) ** 2) / (2 * BLUR**2)).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 9)
    picture = F.conv2d(F.pad(metrics.frames(x), (4, 4, 4, 4), "replicate"), kernel, groups=3)
    return motion.clips(F.conv2d(picture, kernel.mT, groups=3), len(x))


def speed(x: Tensor) -> Tensor:
    """Velocity [B,2] of what is brighter than any ground; the root, as it counts squares."""
    return metrics.velocities(x.amin(1, keepdim=True).clamp(min=0).sqrt())


@dataclass
class Known:
    """Clips with their numbers as prompts."""

    x: Tensor

    def prompts(self, n: int, gen: Generator, rows: slice) -> list[str]:
        """Numbers of clips."""
        return [str(i) for i in torch.randint(len(self.x), (n,), generator=gen).tolist()][rows]

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """Clips [b,3,F,S,S]."""
        prompts = self.prompts(n, gen, rows)
        return Batch(self.x[[int(p) for p in prompts]], prompts)


class Pictures:
    """Sharp frames of other clips of the same kind."""

    def prompts(self, n: int, gen: Generator, rows: slice) -> list[str]:
        """None are known."""
        return [""] * n

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """Pictures [b,3,S,S]."""
        place = torch.rand(n, 1, generator=gen)
        return Batch(picked(squares(n, gen)[0], place)[rows, :, 0], [""] * n)


def repainter(width: int = 24) -> nn.Sequential:
    """A small net over space and time that changes nothing at first."""
    first, last = (nn.Conv3d(*sides, (3, 5, 5), padding=(1, 2, 2)) for sides in ((3, width), (width, 3)))
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(first, nn.SiLU(), last)


def toy(config: settings.Mcm, clips: int = CLIPS) -> tuple[Mcm, Tensor, Tensor]:
    """The objective on a closed-form teacher of blurred clips, the sharp clips and their velocities.

    The student is the teacher itself at first, with a small net behind it. Other clips give the judge's pictures.
    """
    sharp, velocity = squares(clips, torch.Generator().manual_seed(0))
    x = blurred(sharp)
    teacher = DataSet(x, Flow(), labels=range(clips))

    def answer(net: nn.Module, x_t: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        seen: Tensor = teacher.predict(x_t, t, cond).x0
        out: Tensor = seen + net(seen)
        return out

    model = Model(teacher, tuple(x.shape[1:]), Identity(), numbers, "squares")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Consistent(Network(repainter(), teacher.process, "x0", answer), (1.0,), Boundary(4e3))
        source = Source(model, student, Known(x), {})
        objective = assembled(config, source, player, torch.device("cpu"), Pictures())
    return objective, sharp, velocity


def numbers(prompts: list[str]) -> Encoded:
    """Labels of clips [B]."""
    return {"label": torch.tensor([int(prompt) for prompt in prompts])}


def player(name: str, net: nn.Module, optim: OptimConfig) -> Player:
    """A player whose rate falls over the steps of the comparison, where it falls."""
    return Player(name, net, optim, STEPS)


def head(change: Callable[[Mcm], None] = lambda objective: None, steps: int = 3) -> list[Check]:
    """The head's gradient after a few updates, from one with a separate copy of the average as the target's head."""
    fast = OptimConfig(lr=3e-2, clip=None)
    config = settings.Mcm(optim=fast, intervals=4, target=None, motion=settings.LearnedMap(kind="learn", width=32),
                          adversary=None)  # fmt: skip
    objective, sharp, _ = toy(config, clips=2)
    own = objective.rule.motion
    assert isinstance(own, motion.Learned)
    first = float((own(sharp) - sharp).detach().abs().max())
    change(objective)
    average, trainer = copy.deepcopy(own), Trainer(objective, Team("cpu"), 0, "head", steps, 2)
    for _ in range(steps):
        trainer.one_step()
        for mean, new in zip(average.parameters(), own.parameters(), strict=True):
            mean.data.lerp_(new.data, 0.05)
    trainer.toggle(("student", "motion"))
    return [Check("the map before the first step, from raw", first, 0.0, "<=")] + gradients(objective, own, average)


def gradients(objective: Mcm, own: motion.Learned, average: motion.Learned) -> list[Check]:
    """How far the gradient on the head is from that of a loss whose target is computed apart."""
    parameters, rule = list(own.parameters()), objective.rule
    found = torch.autograd.grad(objective.student_terms(context(2), None)["consistency"], parameters)
    ctx = context(2)
    x0, cond = objective.source.real(ctx)
    leg = objective.leg(ctx, x0, cond, 1.0)
    with torch.no_grad():
        goal = average(rule.student.denoise(leg.x_next, leg.s, leg.cond).x0)
    loss = distance(own(rule.student.denoise(leg.x, leg.t, leg.cond).x0), goal, 1e-3).mean()
    known = torch.autograd.grad(loss, parameters)
    off = torch.cat([(a - b).flatten() for a, b in zip(found, known, strict=True)]).norm()
    return [
        Check(
            "the head's gradient, from one apart",
            float(off / torch.cat([k.flatten() for k in known]).norm()),
            1e-4,
            "<=",
        )
    ]


def compared(kind: Literal["raw", "diff"], steps: int = STEPS) -> tuple[float, float]:
    """One-step samples after training: how far sharpness went from the teacher's (0) to the pictures' (1), and the
    error of velocity in pixels a frame. The average of the student's weights is judged.
    """
    config = settings.Mcm(
        optim=OptimConfig(lr=1e-3, decay="linear", clip=10.0, ema=0.95), intervals=2, guidance=1.0, target=None,
        motion=settings.PlainMap(kind=kind),
        adversary=settings.FrameAdversary(optim=OptimConfig(lr=5e-4, betas=(0.0, 0.99)), weight=WEIGHT, size=32),
    )  # fmt: skip
    objective, sharp, velocity = toy(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Trainer(objective, Team("cpu"), 0, "squares", steps, BATCH).run()
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad(), objective.students[0].ema_weights():
        noise = torch.randn(sharp.shape, generator=torch.Generator().manual_seed(1))
        own = objective.rule.student.sample(noise, {"label": torch.arange(len(sharp))}).x
    start, end, found = (float(metrics.sharpness(x).mean()) for x in (blurred(sharp), sharp, own))
    return (found - start) / (end - start), error(own, velocity)


def error(x: Tensor, velocity: Tensor) -> float:
    """Mean distance of the squares' velocities from the true ones [B,2], pixels a frame."""
    return float((speed(x) - velocity).norm(dim=1).mean())


def pictures(steps: int = STEPS) -> list[Check]:
    """Clips blurred, pictures sharp, the judge equally strong: differences come half of the way, frames do not.

    Velocities are .7 pixels a frame on average; what differences let go of is the square's edge, so that the error of
    its velocity grows from the teacher's .009.
    """
    (own, off), (raw, _) = compared("diff", steps), compared("raw", steps)
    return [
        Check("differences, way to the pictures' sharpness", own, 0.5, ">="),
        Check("frames themselves, the same way", raw, 0.5, "<="),
        Check("differences, error of velocity, pixels", off, 0.05, "<="),
    ]
