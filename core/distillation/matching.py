"""Matching losses by composition: a rule (what the student learns from), a critic, perhaps an adversary and a ratio.

swiftbrush, dmd2, f_distill and every plain operator share the rule `Residual` and differ in its parts; sim's gradient
runs through both nets' inputs, so it has a rule of its own. Legend: b local batch, *S sample dims.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.config import Uniform
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Prediction, Query, predict
from limbeck.core.diffusion.guidance import combine, perp_neg, unpacked
from limbeck.core.diffusion.process import Process
from limbeck.core.diffusion.time import Law, weight
from limbeck.core.distillation import config as settings
from limbeck.core.distillation.adversarial import Adversary, Ratio, head_for
from limbeck.core.distillation.critic import Critic
from limbeck.core.distillation.denoising import noised
from limbeck.core.distillation.operators import OPERATORS, Operator, dot, rows, surrogate
from limbeck.core.distillation.source import Source, plain
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Phase, Player
from limbeck.core.scheduled import Scheduled, at

Branches = dict[str, Prediction | Tensor]


class Rule(Protocol):
    """What the student's sample x [b, *S] (with its graph) learns from."""

    def __call__(self, ctx: Context, x: Tensor, cond: Encoded) -> Tensor:
        """A scalar loss."""


def guided(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Encoded, null: Encoded, scale: float, features: bool = False
) -> Prediction:
    """eps_u + scale (eps_c - eps_u) in one forward; the conditional branch alone at scale 1.

    Keys that have no null value (a camera) keep theirs in the unconditional branch.
    """
    if scale == 1:
        return denoiser.predict(x_t, t, cond, features)
    with_cond, without = predict(denoiser, [(x_t, t, cond), (x_t, t, {**cond, **null})], features)
    return combine(with_cond, without, scale)


@dataclass
class AsdShift:
    """ASD's larger time t2 = t + ratio (t - t_min) u, at most t_max; t_min is the law's current lower end."""

    ratio: Scheduled
    random: bool
    t_min: Scheduled
    group: int = 1  # neighbours that share one t share u as well

    def __call__(self, ctx: Context, name: str, t: Tensor, process: Process) -> Tensor:
        """t2 [b]."""
        u = ctx.draws.uniform(f"{name}.shift") if self.random else torch.ones_like(t)
        u = u[:: self.group].repeat_interleave(self.group)[: len(t)].to(t)
        ratio, t_min = ctx.at(self.ratio), at(self.t_min, ctx.step)
        return (t + ratio * (t - t_min).clamp_min(0) * u).clamp_max(process.t_max)


@dataclass
class Residual:
    """w(t) r on the sample, r an operator of predictions without gradient (table 0.1: SDS to f-distill)."""

    name: str
    teacher: Denoiser
    null: Encoded
    operator: Operator
    times: Law
    guidance: Scheduled
    critic: Critic | None = None
    mean: bool = False  # papers with a mean over elements: w/numel
    scale: Scheduled | None = None
    negative: Encoded | None = None
    shift: AsdShift | None = None
    adversary: Adversary | None = None
    ratio: Ratio | None = None

    def __call__(self, ctx: Context, x: Tensor, cond: Encoded) -> Tensor:
        """surrogate(x, r, w): the gradient on x is w r over the batch."""
        with torch.no_grad():
            t, branches = self.branches(ctx, x.detach(), cond)
            r = self.operator.on(branches, None if self.scale is None else ctx.at(self.scale))
            w = weight(self.operator.weight, self.teacher.process, t) / (x[0].numel() if self.mean else 1)
            ctx.log(f"{self.name}/residual", r.square().mean().sqrt())
        return surrogate(x, r, w)

    def branches(self, ctx: Context, x: Tensor, cond: Encoded) -> tuple[Tensor, Branches]:
        """t [b] and all that the operator reads, at one x_t: one forward of the teacher, one of the critic."""
        x_t, t, eps = noised(ctx, self.name, x, self.times, self.teacher.process)
        scale = ctx.at(self.guidance)
        found: Branches = {"x": x, "eps": eps, **self._teacher(ctx, x, x_t, t, eps, cond, scale)}
        if "critic" in self.operator.reads:
            assert self.critic is not None
            own = self.critic.scale(ctx, scale)
            found["critic"] = guided(self.critic.denoiser, x_t, t, unpacked(cond)[0], self.null, own)
        return t, found

    def _teacher(
        self, ctx: Context, x: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, cond: Encoded, scale: float
    ) -> Branches:
        reads = self.operator.reads
        cond, others, weights = unpacked(cond)
        queries: dict[str, Query] = {"cond": (x_t, t, cond)}
        if "uncond" in reads or ("teacher" in reads and (scale != 1 or others)):
            null = self.null if "negative" in reads else self.negative or self.null
            queries["uncond"] = (x_t, t, {**cond, **null})
        if "negative" in reads:
            queries["negative"] = (x_t, t, {**cond, **(self.negative or self.null)})
        if "later" in reads:
            assert self.shift is not None
            t2 = self.shift(ctx, self.name, t, self.teacher.process)
            queries["later"] = (self.teacher.process.add_noise(x, eps, t2), t2, cond)  # the same eps
        if "teacher" in reads:
            queries |= {f"against.{k}": (x_t, t, other) for k, other in enumerate(others)}
        found = dict(zip(queries, predict(self.teacher, list(queries.values()), "h" in reads), strict=True))
        branches: Branches = dict(found)
        branches["teacher"] = combine(found["cond"], found["uncond"], scale) if "uncond" in found else found["cond"]
        if "teacher" in reads and weights is not None:
            away = [found[f"against.{k}"] for k in range(len(others))]
            branches["teacher"] = perp_neg(found["cond"], found["uncond"], away, weights, scale)
        if "h" in reads:
            assert self.adversary is not None and self.ratio is not None
            branches["h"] = self.ratio(ctx, self.adversary.logits(found["cond"]), t)
        return branches


@dataclass
class Implicit:
    """SIM (Luo et al. 2024): -w <d'(y), D_psi(x_t) - x>, y = D_psi - D_phi; x_t and both nets keep their graph."""

    name: str
    teacher: Denoiser
    null: Encoded
    times: Law
    guidance: Scheduled
    critic: Critic
    huber: Scheduled
    weighting: str
    mean: bool = True

    def __call__(self, ctx: Context, x: Tensor, cond: Encoded) -> Tensor:
        """The loss whose gradient is that of the score divergence when the critic is exact."""
        process = self.teacher.process
        x_t, t, _ = noised(ctx, self.name, x, self.times, process)
        scale = ctx.at(self.guidance)
        teacher = guided(self.teacher, x_t, t, cond, self.null, scale)
        critic = guided(self.critic.denoiser, x_t, t, cond, self.null, self.critic.scale(ctx, scale))
        loss = implicit_loss(x, teacher, critic, ctx.at(self.huber) * x[0].numel() ** 0.5)
        w = weight(self.weighting, process, t).to(loss)
        return (w * loss).mean() / (x[0].numel() if self.mean else 1)


def implicit_loss(x: Tensor, teacher: Prediction, critic: Prediction, c: float) -> Tensor:
    """SIM's loss per sample [b] in x0 space with the pseudo-Huber distance: one norm per sample, not per element."""
    y = critic.x0 - teacher.x0
    slope = y / rows((dot(y, y) + c**2).sqrt(), y)
    return -dot(slope, critic.x0 - x)


class Matching:
    """Student phase, then `steps_per` critic phases, on one sample per step (the critic's detached)."""

    def __init__(
        self,
        source: Source,
        rule: Rule,
        student: Player,
        critic: Critic | None = None,
        critic_player: Player | None = None,
        adversary: Adversary | None = None,
        ratio: Ratio | None = None,
    ) -> None:
        self.source, self.rule, self.critic, self.adversary, self.ratio = source, rule, critic, adversary, ratio
        self.players = {player.name: player for player in (student, critic_player) if player}
        self._student, self._critic = student.name, critic_player.name if critic_player else ""

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """Student (every `optim.every` steps, once the critic is warm), then critic."""
        if self.critic is None or ctx.step >= self.critic.config.warm:
            yield Phase((self._student,), partial(self.student_terms, ctx))
        for i in range(self.critic.config.steps_per if self.critic else 0):
            yield Phase((self._critic,), partial(self.critic_terms, ctx, i))

    def student_terms(self, ctx: Context) -> dict[str, Tensor]:
        """The rule, and the adversary's wish to be taken for data."""
        x, cond = self.source.sample(ctx)
        terms = {"matching": self.rule(ctx, x, cond)}
        if self.adversary:
            terms["gan"] = self.adversary.fool(ctx, x, cond)
        return terms

    def critic_terms(self, ctx: Context, i: int) -> dict[str, Tensor]:
        """Denoising on the student's samples, and telling them from data."""
        assert self.critic is not None
        x, cond = self.source.sample(ctx)
        terms = {"denoising": self.critic.loss(ctx, f"critic{i}", x, cond)}
        if self.adversary:
            fake = (x.detach(), cond)
            terms["gan"] = self.adversary.tell(ctx, f"tell{i}", fake, self.source.real(ctx))
        return terms

    def state(self) -> dict[str, Tensor]:
        """The ratio's bins; nets are with their players."""
        return self.ratio.state() if self.ratio else {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring the bins back."""
        if self.ratio:
            self.ratio.load(state)


def _critic_player(build: Build, critic: Critic, adversary: Adversary | None) -> Player:
    """One player for the critic and the head: they share their phase and optimiser (DMD2's choice)."""
    nets = nn.ModuleDict({"net": critic.denoiser} | ({"head": adversary.head} if adversary else {}))
    small = critic.config.kind == "lora"  # hooks call its layers, not the patch itself, so it cannot be sharded
    player = build.player("critic", dict(nets.named_parameters()) if small else nets, plain(critic.config.optim))
    if next(p for p in nets.parameters() if p.requires_grad) is not player.tensors[0]:  # it would never be trained
        raise BadInput("two losses of this stage have a critic each; keep one of them, or use two stages")
    return player


def _adversary(
    config: settings.AdversaryConfig | None, source: Source, critic: Critic, build: Build
) -> Adversary | None:
    if config is None:
        return None
    denoiser = critic.denoiser if config.features == "critic" else source.model.denoiser
    head = head_for(denoiser, tuple(source.model.shape), source.null, config.width, build.device)
    return Adversary(config, denoiser, head)


def _matching(build: Build, config: settings.Matched, source: Source, rule: Rule, critic: Critic,
              adversary: Adversary | None = None, ratio: Ratio | None = None) -> Matching:  # fmt: skip
    student = build.player("student", source.student, plain(config.optim))
    return Matching(source, rule, student, critic, _critic_player(build, critic, adversary), adversary, ratio)


def build_residual(config: settings.SwiftBrush | settings.Dmd2, build: Build) -> Matching:
    """Factory of swiftbrush (VSD, same guidance on both), dmd2 and f_distill (DMD, DMD times h(r))."""
    source = Source.of(build)
    critic = Critic.of(config.critic, source.model, source.null, build.device)
    adversary = _adversary(getattr(config, "adversary", None), source, critic, build)
    ratio = Ratio(config.ratio, build.device) if isinstance(config, settings.FDistill) else None
    operator = "vsd" if isinstance(config, settings.SwiftBrush) else "f_distill" if ratio else "dmd"
    rule = Residual(
        operator, source.model.denoiser, source.null, OPERATORS[operator], source.times(config),
        config.guidance, critic, config.reduction == "mean", adversary=adversary, ratio=ratio,
    )  # fmt: skip
    return _matching(build, config, source, rule, critic, adversary, ratio)


def build_sim(config: settings.Sim, build: Build) -> Matching:
    """Factory of sim."""
    source = Source.of(build)
    critic = Critic.of(config.critic, source.model, source.null, build.device)
    rule = Implicit("sim", source.model.denoiser, source.null, source.times(config), config.guidance,
                    critic, config.huber, config.weighting, config.reduction == "mean")  # fmt: skip
    return _matching(build, config, source, rule, critic)


def build_score(config: settings.Score, build: Build) -> Matching:
    """Factory of score: any operator, built-in or a plugin's, alone on the student (with a critic if it reads one)."""
    source = Source.of(build)
    operator = _operator(config, source, build)
    critic = None
    if "critic" in operator.reads:
        critic = Critic.of(config.critic or settings.CriticConfig(), source.model, source.null, build.device)
    times = source.times(config)
    t_min = config.time.lo if isinstance(config.time, Uniform) else source.model.denoiser.process.t_min
    rule = Residual(
        f"score.{config.operator}", source.model.denoiser, source.null, operator, times,
        config.guidance, critic, config.reduction == "mean", config.scale,
        negative=None if config.negative is None else source.model.encode([config.negative]),
        shift=AsdShift(config.shift, config.shift_random, t_min, times.group),
    )  # fmt: skip
    student = build.player("student", source.student, plain(config.optim))
    return Matching(source, rule, student, critic, _critic_player(build, critic, None) if critic else None)


def _operator(config: settings.Score, source: Source, build: Build) -> Operator:
    operator: Operator = build.registry.load(build.registry.get("operator", config.operator))
    if "uncond" in operator.reads and not source.null:
        raise BadInput(f"operator {config.operator} needs a conditional teacher; {source.model.name} has no condition")
    if config.scale is not None and not operator.scaled:
        raise BadInput(f"operator {config.operator} has no scale; leave `scale` out")
    if "negative" in operator.reads and config.negative is None:  # the null condition would cancel against itself
        raise BadInput(f"operator {config.operator} needs a bad-quality prompt to lean away from; set `negative`")
    if "h" in operator.reads:
        raise BadInput(f"operator {config.operator} reads a density ratio; use the loss kind: f-distill")
    return operator
