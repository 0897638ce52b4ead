"""Rewards with a gradient: DRaFT-K, DRaFT-LV, AlignProp, ReFL, DRAKES, and that of a few-step student's own sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from limbeck.core.alignment import config as settings
from limbeck.core.alignment import relaxed
from limbeck.core.alignment.rollout import repeat_rows
from limbeck.core.alignment.tuning import Tuning
from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.diffusion.sampling import Step, rematerialised, trajectory
from limbeck.core.distillation.source import Source, plain
from limbeck.core.rewards.base import Condition
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.players import Phase, Player

Terms = dict[str, Tensor]
Gradient = settings.Draft | settings.AlignProp | settings.Refl | settings.Drakes


class Ascent:
    """One phase: samples with their graph, minus the mean reward, and what holds the student near its reference."""

    def __init__(self, tuning: Tuning, terms: Callable[[Context], Terms]) -> None:
        self.tuning, self.terms = tuning, terms
        self.players = {tuning.player.name: tuning.player}

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """The reward's gradient reaches the student through the sampler."""
        yield Phase((self.tuning.player.name,), lambda: self.terms(ctx))

    def state(self) -> dict[str, Tensor]:
        """The judge's."""
        return self.tuning.judge.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring it back."""
        self.tuning.judge.load(state)


def gradient_steps(ctx: Context, config: Gradient) -> int:
    """How many of the last steps keep their graph in this step, one number for all processes."""
    if isinstance(config, settings.Draft | settings.Drakes):
        return min(config.last, config.walk.steps)
    if isinstance(config, settings.Refl):
        return 1
    normal = float(torch.randn((), generator=ctx.draws.gen("tuning.cut")))
    drawn = round(ctx.at(config.mean) + ctx.at(config.std) * normal)
    return max(1, min(config.walk.steps, drawn))


def walked_steps(ctx: Context, config: Gradient) -> int:
    """How many steps of the walk are taken: all, or (ReFL) a share that is drawn anew."""
    if not isinstance(config, settings.Refl):
        return config.walk.steps
    lo, hi = ctx.at(config.lo), ctx.at(config.hi)
    share = lo + (hi - lo) * float(torch.rand((), generator=ctx.draws.gen("tuning.cut")))
    return max(1, round(share * config.walk.steps))


def started(tuning: Tuning, config: Gradient, ctx: Context) -> tuple[Tensor, Encoded, Condition, Tensor]:
    """The first state of a walk, both forms of its condition, and the times [K+1] that it takes."""
    times, edit = tuning.times(config.walk), getattr(config, "edit", None)
    if edit is None:
        return *tuning.begin(ctx, config.walk), times[: walked_steps(ctx, config) + 1]
    times = remaining(times, edit.share)
    return *tuning.edited(ctx, config.walk, edit, times[0]), times


def remaining(times: Tensor, share: float) -> Tensor:
    """The end of a walk's times [K+1]: those of round(share K) steps, one at least.

    InstructVideo's .6 of 20 steps are 12: of the indices 951, 901, ..., 1 those from 551 down.
    """
    count = max(1, round(share * (len(times) - 1)))
    return times[-count - 1 :]


def backpropagate(tuning: Tuning, config: Gradient, ctx: Context) -> Terms:
    """DRaFT (Clark et al. 2023), AlignProp (Prabhudesai et al. 2023), ReFL (Xu et al. 2023), DRAKES as truncations.
    With `edit` the walk is InstructVideo's (Yuan et al. 2023): from data made noisy down, and short.

    The state before the last K steps is detached whole: no earlier step is reached, by either branch of guidance.
    """
    x, cond, raw, times = started(tuning, config, ctx)
    walker, last = tuning.guided(ctx, tuning.student, config.walk), gradient_steps(ctx, config)
    gen, kernel = tuning.gen(ctx), tuning.kernel(ctx, config.walk)
    price, divergence = ctx.at(getattr(config, "kl", 0.0)), x.new_zeros(())
    watched = price > 0 or tuning.judge.due(ctx)
    soft = isinstance(config, settings.Drakes)
    args = (walker, kernel, x, times, cond, gen, last)
    for step in relaxed.walk(ctx, config, *args) if soft else trajectory(*args):  # type: ignore[arg-type]
        if watched and step.pred.raw.requires_grad:
            divergence = divergence + _divergence(tuning, ctx, config, step, cond)
    x = _ending(config, step)
    if isinstance(config, settings.Draft) and config.noises > 1:
        x, cond, raw = _again(tuning, ctx, config, x.detach(), times, cond, raw)
    terms = {"reward": -tuning.score(ctx, x, raw).mean()}
    if watched:
        ctx.log("kl", divergence)
    return terms | ({"kl": price * divergence} if price > 0 else {})


def _ending(config: Gradient, step: Step) -> Tensor:
    """What is judged of a walk's last step: its state, ReFL's predicted x0, DRAKES' straight-through letters."""
    if isinstance(config, settings.Refl):
        return step.pred.x0
    return relaxed.letters(step.x_next) if isinstance(config, settings.Drakes) else step.x_next


def _divergence(tuning: Tuning, ctx: Context, config: Gradient, step: Step, cond: Encoded) -> Tensor:
    """The mean KL of one step from the reference's, in nats; a step without noise is measured as if eta were 1
    and its deviation at least .01. Its gradient runs through the student and, where drakes asks, the reference's input.
    """
    through, remat = getattr(config, "kl_through", False), getattr(config, "remat", True)
    with torch.set_grad_enabled(through):
        reference = tuning.guided(ctx, tuning.reference, config.walk)
        asked = rematerialised(reference) if remat else reference
        fixed = asked.predict(step.x if through else step.x.detach(), step.t, cond)
    kernel = tuning.kernel(ctx, settings.Walk(floor=0.01))
    return kernel.kl(step.pred, fixed, step.x, step.t, step.s).mean()


def _again(
    tuning: Tuning, ctx: Context, config: settings.Draft, x: Tensor, times: Tensor, cond: Encoded, raw: Condition
) -> tuple[Tensor, Encoded, Condition]:
    """DRaFT-LV: the sample noised `noises` times to the last step's time and denoised, as one batch."""
    n, process = config.noises, tuning.student.process
    many, cond = x.repeat(n, *[1] * (x.ndim - 1)), repeat_rows(cond, n)
    eps = torch.cat([ctx.draws.normal(f"tuning.again{i}", tuple(x.shape[1:])) for i in range(n)]).to(x)
    t = times[-2].expand(len(many)).to(x.device)
    pred = tuning.guided(ctx, tuning.student, config.walk).predict(process.add_noise(many, eps, t), t, cond)
    return pred.x0, cond, {key: list(rows) * n for key, rows in raw.items()}


def build_walk(config: Gradient, build: Build) -> Ascent:
    """Factory of draft, alignprop, refl and drakes."""
    tuning = Tuning.of(config, config.optim, build)
    if isinstance(config, settings.Drakes):
        relaxed.needed_tokens(tuning)
    tuning.trained.needed_differentiable(type(config).__name__.lower())
    return Ascent(tuning, lambda ctx: backpropagate(tuning, config, ctx))


def own_sample(tuning: Tuning, config: settings.OwnSample, ctx: Context) -> Terms:
    """-mean reward of the sample that the other losses of this step read too (one draw, one graph)."""
    x, _ = tuning.source.sample(ctx)
    raw: Condition = {"prompt": tuning.source.prompts(ctx)}
    if not config.normalise:
        return {"reward": -tuning.score(ctx, x, raw).mean()}
    leaf = x.detach().requires_grad_(True)
    values, total = tuning.trained.each(leaf, raw), torch.zeros_like(x)
    weights = [ctx.at(weight) for _, weight in tuning.trained.parts]
    for value, weight in zip(values, weights, strict=True):
        total = total + weight * unit(torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0])
    with torch.no_grad():
        tuning.judge.observe(ctx, x, raw, sum((w * v for w, v in zip(weights, values, strict=True)), x.new_zeros(())))
    return {"reward": -(x * total).flatten(1).sum(1).mean()}


def unit(gradient: Tensor) -> Tensor:
    """Each sample's gradient [B,*S] divided by its norm (R0): no reward's scale decides."""
    norm = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
    return gradient / norm.view(-1, *[1] * (gradient.ndim - 1))


def build_own(config: settings.OwnSample, build: Build) -> Ascent:
    """Factory of reward."""
    tuning = Tuning.of(config, config.optim, build)
    tuning.trained.needed_differentiable("reward")
    return Ascent(tuning, lambda ctx: own_sample(tuning, config, ctx))


class Anchor:
    """R0's regulariser (Luo et al. 2025): half the squared distance of the student's weights from their start.

    Deviation: the paper's weight is twice the loss's own `weight` here.
    """

    def __init__(self, player: Player) -> None:
        self.players, self.player = {player.name: player}, player
        self.start: dict[str, Tensor] = {}

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """The start is taken at the first step: after `init_from` has done its work."""
        self.start = self.start or {name: p.detach().clone() for name, p in self.player.params.items()}
        yield Phase((self.player.name,), lambda: {"anchor": self.distance()})

    def distance(self) -> Tensor:
        """|theta - theta_0|^2/2."""
        moved = [(p - self.start[name]).square().sum() for name, p in self.player.params.items()]
        return torch.stack(moved).sum() / 2

    def state(self) -> dict[str, Tensor]:
        """The weights at the start."""
        return {f"start/{name}": value for name, value in self.start.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring them back."""
        prefix = "start/"
        self.start = {k.removeprefix(prefix): v.clone() for k, v in state.items() if k.startswith(prefix)}


def build_anchor(config: settings.Anchor, build: Build) -> Anchor:
    """Factory of anchor."""
    return Anchor(build.player("student", Source.of(build).student, plain(config.optim)))
