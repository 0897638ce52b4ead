"""Diffusion-DPO: a denoiser learns from pairs which of two samples was preferred, with no reward in between.

Legend: b pairs of this process, *S sample shape; winners and losers go through a net as one batch of 2b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.alignment import config as settings
from limbeck.core.alignment.losses import diffusion_dpo
from limbeck.core.alignment.rollout import repeat_rows
from limbeck.core.diffusion.denoiser import Denoiser, Encoded
from limbeck.core.diffusion.time import law
from limbeck.core.distillation.config import Denoising
from limbeck.core.distillation.denoising import draw_t, errors
from limbeck.core.distillation.source import Source, plain
from limbeck.core.rewards.pairs import Pairs
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player, Single

Terms = dict[str, Tensor]


def twice(x: Tensor) -> Tensor:
    """The same rows for winners and for losers [2b,…]: one t and one noise a pair."""
    return x.repeat(2, *[1] * (x.ndim - 1))


@dataclass
class DiffusionDpo(Single):
    """One phase on fresh pairs; the teacher, frozen, is the reference. Ties are never drawn."""

    source: Source
    denoiser: Denoiser
    config: settings.DiffusionDpo
    player: Player

    def __post_init__(self) -> None:
        super().__init__(self.player)
        self.times = law(self.config.time, self.config.t_group)
        self._error = Denoising(space=self.config.space)

    def terms(self, ctx: Context) -> Terms:
        """The loss, and both errors apart: at a large beta both may grow together while their gap widens."""
        both, cond, strength = ctx.once("dpo.pairs", lambda: self._drawn(ctx))
        t = twice(draw_t(ctx, "dpo", self.times, self.denoiser.process))
        eps = twice(ctx.draws.normal("dpo.eps", tuple(both.shape[1:])).to(both))
        winner, loser = self._errors(self.denoiser, both, t, eps, cond)
        with torch.no_grad():
            fixed_w, fixed_l = self._errors(self.source.model.denoiser, both, t, eps, cond)
        # of a strength below one, the implicit reward's gap counts that much: sigmoid(s gap), as in bradley-terry
        own, fixed = (strength * winner, strength * loser), (strength * fixed_w, strength * fixed_l)
        told = {"winner": winner, "loser": loser, "winner_reference": fixed_w, "loser_reference": fixed_l}
        told["agreed"] = ((winner - loser) < (fixed_w - fixed_l)).float()
        numbers = {f"_{name}": value.detach().mean() for name, value in told.items()}
        return {"dpo": diffusion_dpo(*own, *fixed, ctx.at(self.config.beta))} | numbers

    def _errors(self, net: Denoiser, both: Tensor, t: Tensor, eps: Tensor, cond: Encoded) -> list[Tensor]:
        """Mean square errors of winners and losers [b] each, from one forward."""
        pred = net.predict(self.denoiser.process.add_noise(both, eps, t), t, cond)
        return list(errors(pred, both, eps, self._error).chunk(2))

    @torch.no_grad()
    def _drawn(self, ctx: Context) -> tuple[Tensor, Encoded, Tensor]:
        """Winners, then losers [2b,*S] in the teacher's space, their condition and the strengths [b]."""
        model = self.source.model
        found: Pairs = self.source.data.pairs(ctx.global_batch, ctx.draws.gen("data.pairs"), ctx.draws.rows, ties=False)
        both = model.codec.encode(torch.cat([found.winner, found.loser]).to(ctx.device))
        if tuple(both.shape[1:]) != tuple(model.shape):
            raise BadInput(
                f"the pairs are samples of shape {list(both.shape[1:])}, the teacher has {list(model.shape)}; "
                "give both one size"
            )
        return both, repeat_rows(model.encode(found.prompts), 2), found.strength.to(both)


def build_dpo(config: settings.DiffusionDpo, build: Build) -> DiffusionDpo:
    """Factory of diffusion-dpo (Wallace et al. 2023): one forward of the student, one of the teacher."""
    source = Source.of(build)
    denoiser = getattr(source.student, "denoiser", None)
    if build.recipe.student is None or not isinstance(denoiser, Denoiser):
        raise BadInput("diffusion-dpo tunes a student that denoises; give the recipe one beside its teacher")
    if not hasattr(source.data, "pairs"):
        raise BadInput("diffusion-dpo learns from pairs and `data` gives none; use data: {kind: preferences, path: …}")
    return DiffusionDpo(source, denoiser, config, build.player("student", source.student, plain(config.optim)))
