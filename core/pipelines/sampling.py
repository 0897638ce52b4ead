"""Samples of a teacher as its own pipeline draws them: its grid, its guidance, DDIM (Euler for rectified flow)."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model
from limbeck.core.diffusion.guidance import guided_by, with_scale
from limbeck.core.diffusion.sampling import ddim
from limbeck.core.diffusion.sampling import sample as walk
from limbeck.core.pipelines.loading import PipelineModel


def guided(
    model: Model,
    cond: Encoded,
    guidance: float | None,
    negative: str | None = None,
    denoiser: Denoiser | None = None,
) -> tuple[Denoiser, Encoded]:
    """(denoiser, cond) at a guidance scale: an input of the net where it embeds guidance, else CFG in one forward.

    As in diffusers, a scale of at most 1 is the conditional prediction alone; None is the pipeline's own default.
    `denoiser` is a student to guide instead of the teacher.
    """
    inner = model.denoiser if denoiser is None else denoiser
    if guidance is None:
        guidance = model.options.guidance if isinstance(model, PipelineModel) else 1.0
    null = {} if guidance <= 1 or "guidance" in cond else model.encode([model.uncond if negative is None else negative])
    return guided_by(inner, null, guidance), with_scale(cond, guidance)


def sample(
    model: Model,
    noise: Tensor,
    prompts: list[str],
    steps: int,
    guidance: float | None = None,
    negative: str | None = None,
) -> Tensor:
    """x [B,*S] of the teacher from standard normal noise, without gradient (pixels: `model.codec.decode`)."""
    denoiser, cond = guided(model, model.encode(prompts), guidance, negative)
    return walk(denoiser, noise, model.grid(steps), ddim(), cond=cond)
