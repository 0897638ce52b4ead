"""Denoising regression: teachers, critics and fine-tuning. Legend: B batch, *S sample dims."""

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Prediction
from limbeck.core.diffusion.discrete import DiscretePrediction, MaskProcess, TokenProcess
from limbeck.core.diffusion.process import Process, expand
from limbeck.core.diffusion.time import Law, law, weight
from limbeck.core.distillation import config as settings
from limbeck.core.distillation.source import Source, plain
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player, Single


def draw_t(ctx: Context, name: str, times: Law, process: Process) -> Tensor:
    """t [b] of this process's rows, drawn for the global batch; no group of a shared t is cut between processes."""
    if ctx.batch % times.group:
        raise BadInput(f"{ctx.batch} samples a process are no whole groups of t_group: {times.group}; change `batch`")
    t = times.sample(ctx.global_batch, ctx.draws.gen(f"{name}.t"), process, ctx.step)
    return t[ctx.draws.rows].to(ctx.device)


def noised(ctx: Context, name: str, x: Tensor, times: Law, process: Process) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, eps) with fresh draws of the streams `name.t` and `name.eps`; keeps the graph of x [b, *S].

    eps is standard normal; for tokens [b, L] it is uniform.
    """
    t = draw_t(ctx, name, times, process)
    if isinstance(process, TokenProcess):
        eps = torch.special.ndtr(ctx.draws.normal(f"{name}.eps", tuple(x.shape[1:2])).double()).to(ctx.device)
        return process.add_noise(x, eps, t), t, eps
    eps = ctx.draws.normal(f"{name}.eps", tuple(x.shape[1:])).to(x)
    return process.add_noise(x, eps, t), t, eps


def dropped(ctx: Context, name: str, cond: Encoded, null: Encoded, share: float, whole_batch: bool) -> Encoded:
    """The condition with a share of its rows (or, with that probability, the whole batch) made the null condition.

    Keys that have no null value (a camera) are kept.
    """
    if share == 0 or not cond:
        return cond
    if whole_batch:  # one draw for all processes
        gone = torch.rand(1, generator=ctx.draws.gen(f"{name}.drop")).lt(share).expand(ctx.batch).to(ctx.device)
    else:
        gone = ctx.draws.uniform(f"{name}.drop") < share
    shaped = {k: gone.view(-1, *[1] * (cond[k].dim() - 1)) for k in null if k in cond}
    return {**cond, **{k: torch.where(g, null[k].to(cond[k]).expand_as(cond[k]), cond[k]) for k, g in shaped.items()}}


def truth(space: str, x0: Tensor, eps: Tensor, t: Tensor, process: Process) -> Tensor:
    """What a perfect net of this space would say, [B, *S]."""
    alpha, sigma = process.coefficients(t, x0)
    table = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}
    return table[space]


def errors(pred: Prediction, x0: Tensor, eps: Tensor, config: settings.Compared) -> Tensor:
    """w(t) times the mean square error over the sample [B]; for tokens see `token_errors`."""
    if isinstance(pred, DiscretePrediction):
        return token_errors(pred, x0)
    space = config.space or ("eps" if pred.kind == "score" else pred.kind)
    error = getattr(pred, space).float() - truth(space, x0.float(), eps.float(), pred.t, pred.process)
    w = weighting(config, pred.process, pred.t).to(error)
    if w.dim() == 1:  # the mean over a sample first: the order of sums that runs are repeated by
        return w * error.square().flatten(1).mean(1)
    return (expand(w, error) * error.square()).flatten(1).mean(1)


def token_errors(pred: DiscretePrediction, x0: Tensor) -> Tensor:
    """Nats a token [B]: of ids x0 [B,L] under p(x0 | x_t).

    Masked tokens: MDLM's bound (Sahoo et al. 2024, eq. 10), -alpha'/(1 - alpha) times what the masked ones cost, whose
    mean over t uniform in [0,1] bounds the negative log-likelihood. Uniform noise: the cross-entropy of all tokens
    (the auxiliary loss of D3PM), which has the same minimum and is no bound.
    """
    process, cost = pred.process, -pred.logp_x0.gather(-1, x0.long()[..., None])[..., 0]
    if not isinstance(process, MaskProcess):
        return cost.mean(1)
    rate = -process.d_alpha(pred.t) / process.sigma(pred.t)
    gone = (pred.x_t == process.vocab).to(cost)
    return expand(rate.to(cost), cost)[:, 0] * (gone * cost).mean(1)


def weighting(config: settings.Compared, process: Process, t: Tensor) -> Tensor:
    """w(t) [B] by name; `alpha2` turns an eps loss into SwiftBrush's (alpha eps_psi - alpha eps)^2."""
    name = "alpha" if config.weighting == "alpha2" else config.weighting
    w = weight(name, process, t, config.sigma_data)
    return w.square() if config.weighting == "alpha2" else w


class Regression:
    """The denoising loss of one net: its law of t, space, weight and condition dropout."""

    def __init__(self, denoiser: Denoiser, config: settings.Denoising, null: Encoded) -> None:
        self.denoiser, self.config, self.null = denoiser, config, null
        self.times = law(config.time, config.t_group)

    def loss(self, ctx: Context, name: str, x0: Tensor, cond: Encoded) -> Tensor:
        """The loss on x0 [b, *S] (detached by the caller) with the streams of `name`."""
        return self.errors(ctx, name, x0, cond).mean()

    def errors(self, ctx: Context, name: str, x0: Tensor, cond: Encoded) -> Tensor:
        """The loss of each sample [b]."""
        x_t, t, eps = noised(ctx, name, x0, self.times, self.denoiser.process)
        cond = dropped(ctx, name, cond, self.null, ctx.at(self.config.dropout), self.config.whole_batch)
        return errors(self.denoiser.predict(x_t, t, cond), x0, eps, self.config)


class DenoisingObjective(Single):
    """Trains a denoiser on data: teachers, fine-tuning."""

    def __init__(self, name: str, source: Source, regression: Regression, player: Player) -> None:
        super().__init__(player)
        self.name, self.source, self.regression = name, source, regression

    def terms(self, ctx: Context) -> dict[str, Tensor]:
        x0, cond = self.source.real(ctx)
        return {"denoising": self.regression.loss(ctx, self.name, x0, cond)}


def build(config: settings.Denoising, build: Build) -> DenoisingObjective:
    """Factory of the objective `denoising`: the student's denoiser, or the teacher's in a recipe without a student."""
    source = Source.of(build)
    trained: nn.Module = source.model.denoiser if build.recipe.student is None else source.student
    denoiser = trained if isinstance(trained, Denoiser) else getattr(trained, "denoiser", None)
    if not isinstance(denoiser, Denoiser) or not list(denoiser.parameters()):
        raise BadInput("the loss denoising needs a net that denoises, and this recipe has no denoiser to train")
    name = "teacher" if build.recipe.student is None else "student"
    player = build.player(name, trained.requires_grad_(True), plain(config.optim))
    return DenoisingObjective("denoising", source, Regression(denoiser, config, source.null), player)
