"""Consistency distillation: the student says the same end of a path from both ends of a teacher's step.

Song et al. 2023, "Consistency Models" (alg. 2), and Luo et al. 2023, "Latent Consistency Models" (guidance folded in,
one interval of a coarse grid a step). Legend: b local batch, *S sample dims; one t per sample, whatever its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, FewStep, Prediction
from limbeck.core.diffusion.discrete import TokenProcess
from limbeck.core.diffusion.guidance import Scale, guide, with_scale
from limbeck.core.diffusion.process import expand
from limbeck.core.diffusion.sampling import Solver, euler, heun
from limbeck.core.distillation import config as settings
from limbeck.core.distillation.source import Source, plain
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Phase, Player, place
from limbeck.core.scheduled import Scheduled


@dataclass(frozen=True)
class Leg:
    """A piece of a path: state x [b, *S] at t [b], state x_next at s < t, and the student's condition."""

    x: Tensor
    t: Tensor
    x_next: Tensor
    s: Tensor
    cond: Encoded


@dataclass(frozen=True)
class Boundary:
    """f = c_skip x_t + c_out x0 with c_skip = d^2/(u^2 + d^2), c_out = u/sqrt(u^2 + d^2), u = scaling (t - t_min).

    LCM's form: with an index k of 1000, u = 10 k is scaling 1e4. Up to t_min f is x_t itself, bit for bit.
    """

    scaling: float = 1e4
    sigma_data: float = 0.5

    def __call__(self, x_t: Tensor, t: Tensor, x0: Tensor, t_min: float) -> Tensor:
        """The mapped answer [B, *S]; the factors are computed in float64."""
        u = self.scaling * (t.to(x_t.device).double() - t_min).clamp_min(0)
        norm = torch.hypot(u, torch.full_like(u, self.sigma_data))
        skip, out = (expand(c.to(x0.dtype), x_t) for c in ((self.sigma_data / norm) ** 2, u / norm))
        return skip * x_t + out * x0


class Consistent(FewStep):
    """A few-step student whose answer is a consistency function: it owns the boundary condition f(x, t_min) = x.

    Sampling is `FewStep`'s: predict the end, renoise to the next time (Consistency Models, alg. 1).
    """

    def __init__(self, denoiser: Denoiser, times: Sequence[float], boundary: Boundary) -> None:
        super().__init__(denoiser, times)
        self.boundary = boundary

    def denoise(self, x_t: Tensor, t: Tensor, cond: Encoded) -> Prediction:
        """The consistency function as x0. Below t_min, where nets are not defined, the net is asked at t_min."""
        t_min = self.denoiser.process.t_min
        pred = self.denoiser.predict(x_t, t.clamp_min(t_min), cond)
        return pred.replace(self.boundary(x_t, t, pred.x0, t_min))


class Shadow:
    """A second set of a player's weights, taken at its first use: their running average, or (decay None) frozen."""

    def __init__(self, player: Player, decay: Scheduled | None = None) -> None:
        self.player, self.decay = player, decay
        self.weights: dict[str, Tensor] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """The net has the shadow's weights inside; no graph may be alive that was recorded with its own."""
        kept = self._copies()
        self.weights = self.weights or self._copies()
        try:
            self._set(self.weights)
            yield
        finally:
            self._set(kept)

    def follow(self, ctx: Context) -> None:
        """Once the player is updated: w <- decay w + (1 - decay) new."""
        if self.decay is not None and self.weights:
            new = [p.detach() for p in self.player.tensors]
            torch._foreach_lerp_(list(self.weights.values()), new, 1 - ctx.at(self.decay))

    def state(self) -> dict[str, Tensor]:
        """`shadow/<parameter>`."""
        return {f"shadow/{name}": value for name, value in self.weights.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring them back."""
        found = {n: state[f"shadow/{n}"] for n in self.player.params if f"shadow/{n}" in state}
        self.weights = {n: place(w, self.player.params[n]).clone() for n, w in found.items()}

    def _copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.player.params.items()}

    def _set(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.player.tensors, weights.values(), strict=True):
                p.copy_(value)
        self.player.reshard()


def drawn_scale(ctx: Context, name: str, guidance: Scheduled, to: Scheduled | None) -> Scale:
    """The guidance scale g of this step, or one for each sample [b] between the two; g = 1 + the w of the papers."""
    if to is None:
        return ctx.at(guidance)
    return ctx.draws.uniform(f"{name}.guidance", (), ctx.at(guidance), ctx.at(to))


def told(cond: Encoded, scale: Scale) -> Encoded:
    """The student's condition: a drawn scale is always told (key "guidance"), a fixed one where nets take it."""
    return {**cond, "guidance": scale} if isinstance(scale, Tensor) else with_scale(cond, scale)


def guided_teacher(teacher: Denoiser, null: Encoded, scale: Scale) -> Denoiser:
    """The teacher at this scale; one that takes the scale as an input (its null condition has it) as it is."""
    return teacher if not null or "guidance" in null else guide(teacher, null, scale)


def distance(a: Tensor, b: Tensor, c: float | None) -> Tensor:
    """Pseudo-Huber mean(sqrt(d^2 + c^2) - c) over each sample [B] (LCM); c None: the mean square."""
    square = (a.float() - b.float()).square()
    each = square if c is None else (square + c * c).sqrt() - c
    return each.flatten(1).mean(1)


@dataclass
class Consistency:
    """d(m(f(x_t, t)), sg m(f-(x_s, s))), x_s one step of the guided teacher from x_t, t and s neighbours of a grid.

    `motion` is what is compared: all of x, or a part of it (MCM's motion representations, a head with weights).
    `target` lends the weights of f-: an EMA, or none for the student as it is; always without gradient.
    """

    name: str
    student: Consistent
    teacher: Denoiser
    null: Encoded
    times: Tensor  # falling [K+1], the last one 0
    solver: Solver
    guidance: Scheduled
    huber: Scheduled | None
    guidance_to: Scheduled | None = None
    target: Callable[[], AbstractContextManager[None]] = nullcontext
    motion: Callable[[Tensor], Tensor] = lambda x: x

    @classmethod
    def of(
        cls, name: str, source: Source, config: settings.Consistency,
        target: Callable[[], AbstractContextManager[None]] = nullcontext,
        motion: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Consistency:  # fmt: skip
        """The rule of these settings for the run's student; BadInput where it has no boundary condition."""
        student, model = source.student, source.model
        if not isinstance(student, Consistent):  # a constant would have the lowest loss
            raise BadInput(
                f"the loss {name} needs a boundary condition; set student: {{kind: consistency, of: {{kind: …}}}}"
            )
        solver = heun() if config.solver == "heun" else euler()
        return cls(
            name, student, model.denoiser, source.null, model.grid(config.intervals), solver, config.guidance,
            config.huber, config.guidance_to, target, motion,
        )  # fmt: skip

    def __call__(self, ctx: Context, x0: Tensor, cond: Encoded) -> Tensor:
        """The loss on data x0 [b, *S]; the target comes first, as it changes the net's weights for a while."""
        leg = self.leg(ctx, x0, cond)
        goal = self.goal(leg)
        own = self.motion(self.student.denoise(leg.x, leg.t, leg.cond).x0)
        return distance(own, goal, None if self.huber is None else ctx.at(self.huber)).mean()

    @torch.no_grad()
    def leg(self, ctx: Context, x0: Tensor, cond: Encoded) -> Leg:
        """x_t of the data at a time of the grid, and the teacher's x_s one interval later."""
        i = ctx.draws.integers(f"{self.name}.i", len(self.times) - 1)
        grid = self.times.to(i.device)
        eps = ctx.draws.normal(f"{self.name}.eps", tuple(x0.shape[1:])).to(x0)
        x = self.teacher.process.add_noise(x0, eps, grid[i])
        scale = drawn_scale(ctx, self.name, self.guidance, self.guidance_to)
        return self.advanced(x, grid[i], grid[i + 1], cond, scale)

    def advanced(self, x: Tensor, t: Tensor, s: Tensor, cond: Encoded, scale: Scale) -> Leg:
        """One step of the teacher at this scale."""
        given = told(cond, scale)
        teacher = guided_teacher(self.teacher, self.null, scale)
        asked = given if "guidance" in self.null else cond
        x_s = self.solver.advance(teacher, teacher.predict(x, t, asked), x, t, s, asked, None)
        return Leg(x, t, x_s.to(x.dtype), s, given)

    @torch.no_grad()
    def goal(self, leg: Leg) -> Tensor:
        """What the student should say at (x_t, t): what the target says at (x_s, s)."""
        with self.target():
            return self.motion(self.student.denoise(leg.x_next, leg.s, leg.cond).x0)


class Followed:
    """One loss of one player, whose shadow (where it has one) follows after each update."""

    def __init__(
        self, term: str, loss: Callable[[Context], Tensor], player: Player, shadow: Shadow | None = None
    ) -> None:
        self.term, self.loss, self.player, self.shadow = term, loss, player, shadow
        self.players = {player.name: player}

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """One phase."""
        yield Phase((self.player.name,), lambda: {self.term: self.loss(ctx)})
        if self.shadow and self.player.due(ctx.step):
            self.shadow.follow(ctx)

    def state(self) -> dict[str, Tensor]:
        """The shadow's weights."""
        return self.shadow.state() if self.shadow else {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring them back."""
        if self.shadow:
            self.shadow.load(state)


def continuous(source: Source, name: str) -> Source:
    """The source itself; token models have no probability-flow ODE to distil."""
    if isinstance(source.model.denoiser.process, TokenProcess):
        raise BadInput(f"the loss {name} follows a probability-flow ODE, and {source.model.name} is a model of tokens")
    return source


def build_student(config: settings.ConsistencyStudent, build: Build) -> Consistent:
    """Factory of the student `consistency`: a few-step student with the boundary condition."""
    inner = build.part("student", config.of)
    if not isinstance(inner, FewStep):
        raise BadInput(f"student.of: {config.of.kind} is no few-step student; name one that predicts at fixed times")
    return Consistent(inner.denoiser, inner.times, Boundary(config.scaling, config.sigma_data))


def build(config: settings.Consistency, build: Build) -> Followed:
    """Factory of the objective `consistency`."""
    source = continuous(Source.of(build), "consistency")
    player = build.player("student", source.student, plain(config.optim))
    shadow = None if config.target is None else Shadow(player, config.target)
    rule = Consistency.of("consistency", source, config, shadow.on if shadow else nullcontext)
    return Followed("consistency", lambda ctx: rule(ctx, *source.real(ctx)), player, shadow)
