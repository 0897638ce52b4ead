"""AccVideo: a few-step student from stored walks of the teacher, in any domain.

Zhang et al. 2025, arXiv 2503.19462. Step 1 stores the states of guided walks at the times at which the student will be
sampled; step 2 regresses the student's velocity on the secants between neighbouring states of one walk, and an
adversary with a head for each time compares where its steps land with the stored states. The authors have not released
their training code: the losses follow the paper's equations, lambda and the heads are ours.
Legend: b local batch, N walks, M steps of the student, *S sample dims.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Features, Prediction, index_cond, predict
from limbeck.core.diffusion.guidance import with_scale
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.diffusion.sampling import ddim, ddim_jump, trajectory
from limbeck.core.distillation import config as settings
from limbeck.core.distillation.adversarial import Head, head_for
from limbeck.core.distillation.consistency import Leg, continuous, guided_teacher
from limbeck.core.distillation.denoising import errors
from limbeck.core.distillation.reflow import Secant, secant
from limbeck.core.distillation.shards import Shards, named
from limbeck.core.distillation.source import Source, plain
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Phase, Player
from limbeck.core.run.rng import Draws, derive, generator

FOLDER = "trajectories"


@dataclass(frozen=True)
class Plan:
    """What the walks are of: names (all that a walk depends on, as text), prompts, seeds and further conditions [N]."""

    names: list[str]
    prompts: list[str]
    seeds: list[int]
    asked: Encoded


@dataclass
class Walks:
    """The teacher's walks at the student's times: read from the shards, or walked where they lack them.

    A prompt's first walk has seed 0, its next one 1: no pair of prompt and seed is walked twice, by whatever run.
    """

    source: Source
    config: settings.TrajectorySet
    keys: Tensor  # the student's times, falling [M+1]
    fine: Tensor  # the teacher's [M * each + 1]
    shards: Shards
    seed: int
    device: torch.device

    @classmethod
    def of(cls, build: Build, source: Source, config: settings.TrajectorySet) -> Walks:
        """The set of a recipe; its student says the times."""
        student = source.student
        if not isinstance(student, ManyStep) or student.guidance != 1:  # the walks' guidance is in their states
            raise BadInput(
                "stored walks are for a student that takes their steps; set student: {kind: many_step, steps: 5, "
                "shift: 7.0, guidance: 1.0}"
            )
        keys, fine = student.grid(), student.but(student.steps * config.each).grid()
        if not torch.allclose(fine[:: config.each], keys, atol=1e-5):
            raise BadInput(
                f"{config.each} steps of the teacher for one of the student's miss its times; set student.shift"
            )
        folder = Path(config.folder).expanduser() if config.folder else build.folder / FOLDER
        about = {"teacher": source.model.name, "guidance": config.guidance, "each": config.each, "times": fine.tolist()}
        return cls(source, config, keys, fine, Shards(folder, about), derive(build.seed, FOLDER), build.device)

    @cached_property
    def plan(self) -> Plan:
        """Prompts and conditions of all walks, from the run's seed."""
        draws = Draws(self.seed, 0, self.config.count, device=self.device)
        prompts, asked = self.source.asked(Context(0, FOLDER, draws, 1, 0, self.device))
        met: Counter[str] = Counter()
        seeds = []
        for prompt in prompts:
            seeds.append(met[prompt])
            met[prompt] += 1
        rows = {key: value.tolist() for key, value in asked.items()}
        made = named([json.dumps(self.shards.about)])
        names = [
            json.dumps([made, prompt, seed, {key: value[i] for key, value in rows.items()}])
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        return Plan(names, prompts, seeds, asked)

    def states(self, rows: Tensor) -> tuple[Tensor, Encoded]:
        """States [b, M+1, *S] float32 of these walks [b], at the student's times, and their conditions."""
        index = rows.tolist()
        names = [self.plan.names[i] for i in index]
        missing = [i for i in dict.fromkeys(index) if self.plan.names[i] not in self.shards]
        if missing:
            self.shards.add([self.plan.names[i] for i in missing], self.walk(missing))
        return self.shards.take(names).to(self.device).float(), self.condition(index)

    def condition(self, index: list[int]) -> Encoded:
        """The encoded prompts of these walks, and what else was asked."""
        asked = index_cond(self.plan.asked, torch.tensor(index, device=self.device))
        return self.source.model.encode([self.plan.prompts[i] for i in index]) | asked

    @torch.no_grad()
    def walk(self, index: list[int]) -> Tensor:
        """The guided teacher's Euler steps from each walk's own noise; every `each`-th state [b, M+1, *S].

        Kept in float16: over the shortest of five steps of shift 7 (.034) its rounding is .0085 of a velocity, and
        bfloat16's .068.
        """
        model, scale = self.source.model, self.config.guidance
        cond = with_scale(self.condition(index), scale)
        noise = torch.stack([self.noise(i) for i in index]).to(self.device)
        x = model.begin(noise, self.fine[0].expand(len(noise)).to(self.device), cond)
        states = [x]
        teacher = guided_teacher(model.denoiser, self.source.null, scale)
        for step in trajectory(teacher, ddim(), x, self.fine, cond):
            x = step.x_next
            if (step.i + 1) % self.config.each == 0:
                states.append(x)
        return torch.stack(states, 1).half()

    def noise(self, i: int) -> Tensor:
        """A walk's noise [*S], from its prompt and seed alone."""
        gen = generator(self.plan.seeds[i], f"{FOLDER} {self.plan.prompts[i]}", 0)
        return torch.randn(tuple(self.source.model.shape), generator=gen)


class Making:
    """Step 1: every step walks one batch of the set; nothing is trained. New walks reach the disk with a checkpoint."""

    def __init__(self, walks: Walks) -> None:
        self.walks = walks
        self.players: dict[str, Player] = {}

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """This process's rows of the step's batch; no phase."""
        first = ctx.step * ctx.global_batch
        for _ in ctx.each():
            rows = torch.arange(first + ctx.draws.rows.start, first + ctx.draws.rows.stop)
            rows = rows[rows < self.walks.config.count]
            if len(rows):
                self.walks.states(rows)
        ctx.log(FOLDER, float(min(self.walks.config.count, first + ctx.global_batch)))
        yield from ()

    def state(self) -> dict[str, Tensor]:
        """What is kept between steps lies in the set's own files."""
        self.walks.shards.flush()
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing to bring back."""


class KeyHeads(nn.ModuleList):
    """A head for each place where a step of the student ends."""

    def forward(self, features: Features, m: Tensor) -> Tensor:
        """Logits [b] of rows whose steps are m [b]; positive means stored."""
        each = torch.stack([head(features) for head in self])  # [M, b]
        return (each * nn.functional.one_hot(m, len(self)).T).sum(0)


@dataclass
class KeyAdversary:
    """Hinge losses on frozen features of the teacher at the time where a step ends."""

    teacher: Denoiser
    heads: nn.Module

    def fool(self, x: Tensor, leg: Leg, m: Tensor) -> Tensor:
        """-D: the gradient reaches x [b, *S] through the teacher."""
        return -self.logits(self.teacher.predict(x, self.time(leg), leg.cond, features=True), m).mean()

    def tell(self, fake: Tensor, leg: Leg, m: Tensor) -> tuple[Tensor, Tensor]:
        """The logits [b] of what landed and of the stored states, in one forward; they train the heads alone."""
        t = self.time(leg)
        with torch.no_grad():
            pair = predict(self.teacher, [(fake, t, leg.cond), (leg.x_next, t, leg.cond)], features=True)
        l_fake, l_real = (self.logits(one, m) for one in pair)
        return l_fake, l_real

    def logits(self, prediction: Prediction, m: Tensor) -> Tensor:
        """One logit a sample [b]."""
        found: Tensor = self.heads(prediction.features, m)
        return found

    def time(self, leg: Leg) -> Tensor:
        """The time that the teacher is asked at: where the step ends, and no less than nets are trained for."""
        return leg.s.clamp_min(self.teacher.process.t_min)


def hinge(l_fake: Tensor, l_real: Tensor) -> Tensor:
    """mean max(0, 1 + D(fake)) + mean max(0, 1 - D(real))."""
    return (1 + l_fake).relu().mean() + (1 - l_real).relu().mean()


@dataclass
class Following:
    """Step 2: the student, then the heads, on the same steps of stored walks, from one forward of the student."""

    walks: Walks
    config: settings.Trajectory
    player: Player
    adversary: KeyAdversary | None = None
    heads: Player | None = None
    goal: Secant = secant

    def __post_init__(self) -> None:
        self.players = {player.name: player for player in (self.player, self.heads) if player}

    @property
    def denoiser(self) -> Denoiser:
        """What is trained."""
        found: Denoiser = self.walks.source.student.denoiser  # type: ignore[assignment]
        return found

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """Student, then heads."""
        yield Phase((self.player.name,), lambda: self.student_terms(ctx))
        if self.heads:
            yield Phase((self.heads.name,), lambda: self.head_terms(ctx))

    def leg(self, ctx: Context) -> tuple[Leg, Tensor]:
        """A random step m [b] of a random walk each, drawn once a step."""
        return ctx.once("trajectory.leg", lambda: self._leg(ctx))

    def _leg(self, ctx: Context) -> tuple[Leg, Tensor]:
        gen = ctx.draws.gen("trajectory.row")  # files are read by these numbers: they stay on the CPU
        rows = torch.randint(self.walks.config.count, (ctx.global_batch,), generator=gen)[ctx.draws.rows]
        states, cond = self.walks.states(rows)
        m, grid = ctx.draws.integers("trajectory.m", states.shape[1] - 1), self.walks.keys.to(ctx.device)
        row = torch.arange(len(m), device=m.device)
        return Leg(states[row, m], grid[m], states[row, m + 1], grid[m + 1], cond), m

    def answer(self, ctx: Context) -> Prediction:
        """The student at the start of its step, with its graph where it trains in this phase."""
        leg, _ = self.leg(ctx)
        return ctx.once("trajectory.answer", lambda: self.denoiser.predict(leg.x, leg.t, leg.cond))

    def landed(self, ctx: Context) -> Tensor:
        """Where its step ends [b, *S]; the state before it has no graph."""
        leg, _ = self.leg(ctx)
        return ddim_jump(leg.x, leg.t, leg.s, self.answer(ctx).x0, self.denoiser.process)

    def student_terms(self, ctx: Context) -> dict[str, Tensor]:
        """Its velocity against the secant's, and the wish to be taken for a stored state."""
        leg, m = self.leg(ctx)
        goal = self.goal(leg, self.denoiser.process)
        terms = {"trajectory": errors(self.answer(ctx), goal.x0, goal.eps, self.config).mean()}
        if self.adversary and self.config.adversary:
            terms["gan"] = ctx.at(self.config.adversary.weight) * self.adversary.fool(self.landed(ctx), leg, m)
        return terms

    def head_terms(self, ctx: Context) -> dict[str, Tensor]:
        """Telling what landed from what was stored for the same time."""
        assert self.adversary is not None
        leg, m = self.leg(ctx)
        l_fake, l_real = self.adversary.tell(self.landed(ctx).detach(), leg, m)
        ctx.log("gan/fake", l_fake.mean())
        ctx.log("gan/real", l_real.mean())
        return {"gan": hinge(l_fake, l_real)}

    def state(self) -> dict[str, Tensor]:
        """Walks that were missing go to the set's files; nets are with their players."""
        self.walks.shards.flush()
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing to bring back."""


def key_heads(source: Source, steps: int, width: int, device: torch.device) -> KeyHeads:
    """Heads for what the teacher taps."""
    shape: Sequence[int] = source.model.shape
    heads: list[Head] = [
        head_for(source.model.denoiser, tuple(shape), source.null, width, device) for _ in range(steps)
    ]
    return KeyHeads(heads)


def build_set(config: settings.Trajectories, build: Build) -> Making:
    """Factory of the objective `trajectories`."""
    return Making(Walks.of(build, continuous(Source.of(build), FOLDER), config.set))


def build(config: settings.Trajectory, build: Build) -> Following:
    """Factory of the objective `trajectory`."""
    source = continuous(Source.of(build), "trajectory")
    walks = Walks.of(build, source, config.set)
    player = build.player("student", source.student, plain(config.optim))
    if config.adversary is None:
        return Following(walks, config, player)
    heads = key_heads(source, len(walks.keys) - 1, config.adversary.width, build.device)
    adversary = KeyAdversary(source.model.denoiser, heads)
    return Following(walks, config, player, adversary, build.player("heads", heads, plain(config.adversary.optim)))
