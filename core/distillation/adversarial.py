"""The adversary: a small head on a denoiser's features, its non-saturating losses, and the density ratio it implies."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Features, Prediction, predict
from limbeck.core.diffusion.time import law
from limbeck.core.distillation.config import AdversaryConfig, RatioConfig
from limbeck.core.distillation.denoising import noised
from limbeck.core.distillation.operators import DIVERGENCES
from limbeck.core.run.context import Context


class Head(nn.Module):
    """Features [B, C, *positions] -> one logit per sample [B]: an MLP per tap at every position, then the mean."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.taps = nn.ModuleList(_mlp(count, width) for count in channels)

    def forward(self, features: Features) -> Tensor:
        """Logits [B], float32; positive means real."""
        places = [f.flatten(2).mT if f.dim() > 2 else f for f in features]
        logits = [tap(f.float()).flatten(1).mean(1) for tap, f in zip(self.taps, places, strict=True)]
        return torch.stack(logits).mean(0)


def _mlp(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
    )  # fmt: skip


def head_for(denoiser: Denoiser, shape: tuple[int, ...], null: Encoded, width: int, device: torch.device) -> Head:
    """A head for what this denoiser taps, found by one forward without gradient."""
    x, t = torch.zeros(1, *shape, device=device), torch.full((1,), 0.5, device=device)
    with torch.no_grad():
        features = denoiser.predict(x, t, null, features=True).features
    assert features is not None
    return Head([f.shape[1] for f in features], width).to(device)


class Adversary:
    """DMD2 section 4.3 (features of the critic, which learns with the head) or f-distill (features of the teacher)."""

    def __init__(self, config: AdversaryConfig, denoiser: Denoiser, head: Head) -> None:
        self.config, self.denoiser, self.head = config, denoiser, head
        self.times = law(config.time, config.t_group)

    def fool(self, ctx: Context, x: Tensor, cond: Encoded) -> Tensor:
        """softplus(-l_fake): the gradient reaches x [b, *S] through the frozen net at x_t."""
        x_t, t, _ = noised(ctx, "fool", x, self.times, self.denoiser.process)
        logits = self.logits(self.denoiser.predict(x_t, t, cond, features=True))
        return ctx.at(self.config.generator) * F.softplus(-logits).mean()

    def tell(self, ctx: Context, name: str, fake: tuple[Tensor, Encoded], real: tuple[Tensor, Encoded]) -> Tensor:
        """softplus(l_fake) + softplus(-l_real), both noised to the same t, in one forward."""
        x_fake, t, _ = noised(ctx, f"{name}.fake", fake[0], self.times, self.denoiser.process)
        noise = ctx.draws.normal(f"{name}.real.eps", tuple(real[0].shape[1:])).to(real[0])
        x_real = self.denoiser.process.add_noise(real[0], noise, t)
        with torch.set_grad_enabled(self.config.features == "critic"):
            pair = predict(self.denoiser, [(x_fake, t, fake[1]), (x_real, t, real[1])], features=True)
        l_fake, l_real = map(self.logits, pair)
        ctx.log("gan/fake", l_fake.mean())
        ctx.log("gan/real", l_real.mean())
        return ctx.at(self.config.discriminator) * (F.softplus(l_fake) + F.softplus(-l_real)).mean()

    def logits(self, prediction: Prediction) -> Tensor:
        """One logit per sample [b] from a prediction with features."""
        assert prediction.features is not None
        logits: Tensor = self.head(prediction.features)
        # a sharded net gathers its weights for the backward when a gradient reaches its output, so one (of 0) must
        return logits + 0 * prediction.raw.flatten(1).sum(1)


class Ratio:
    """h(r)/mean h of f-distill: r = exp(logit), clamped, over the running mean of r in its time bin."""

    def __init__(self, config: RatioConfig, device: torch.device) -> None:
        self.config, self.h = config, DIVERGENCES[config.divergence].h
        self.means = torch.ones(config.bins, device=device)
        self.seen = torch.zeros(config.bins, dtype=torch.bool, device=device)

    def __call__(self, ctx: Context, logits: Tensor, t: Tensor) -> Tensor:
        """The weight [b] of each sample, mean one over the global batch; updates the bins."""
        r = logits.detach().float().clamp(-10, 10).exp().clamp(ctx.at(self.config.lo), ctx.at(self.config.hi))
        bin = (t * self.config.bins).long().clamp(0, self.config.bins - 1)
        self._update(ctx, r, bin)
        h = self.h(r / self.means[bin])
        return h / ctx.mean(h.mean())

    def _update(self, ctx: Context, r: Tensor, bin: Tensor) -> None:
        """means <- rate * means + (1 - rate) * mean of this (global) batch, for the bins it has."""
        hits = torch.nn.functional.one_hot(bin, self.config.bins).to(r)  # [b, bins]
        total, count = ctx.mean(torch.stack([(hits * r[:, None]).sum(0), hits.sum(0)]))
        new = total / count.clamp_min(torch.finfo(r.dtype).tiny)
        rate = ctx.at(self.config.rate)
        kept = torch.where(self.seen, rate * self.means + (1 - rate) * new, new)
        self.means, self.seen = torch.where(count > 0, kept, self.means), self.seen | (count > 0)

    def state(self) -> dict[str, Tensor]:
        """The bins."""
        return {"ratio/means": self.means, "ratio/seen": self.seen}

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring the bins back."""
        self.means, self.seen = (state[key].to(self.means.device) for key in ("ratio/means", "ratio/seen"))
