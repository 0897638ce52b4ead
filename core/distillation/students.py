"""Students of any domain that start as the teacher: full copies of it, or patches on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from limbeck.core.diffusion.denoiser import Denoiser, FewStep, Model
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.distillation import config as settings
from limbeck.core.distillation.lora import LoRA, Patched
from limbeck.core.pipelines import PipelineModel
from limbeck.core.pipelines.lora import attach
from limbeck.core.run.build import Build

RANK = 64  # of `lora: auto`


def full_copy(model: Model) -> Denoiser:
    """A trainable float32 copy of the teacher."""
    return copy.deepcopy(model.denoiser).float().requires_grad_(True)


def trainable(
    model: Model, lora: int | str | None, alpha: float | None = None, targets: Sequence[str] = ()
) -> Denoiser:
    """The teacher to be trained: LoRA of this rank on it, or a full copy; `auto` patches pipelines, copies the rest.

    `targets` are the layers that LoRA patches; none named: those of the pipeline's family, every one of other nets.
    """
    rank = (RANK if isinstance(model, PipelineModel) else None) if lora == "auto" else lora
    if rank is None:
        return full_copy(model)
    if isinstance(model, PipelineModel):
        return attach(model, int(rank), alpha, targets=targets)
    frozen = model.denoiser.requires_grad_(False)
    return Patched(frozen, LoRA(frozen, int(rank), alpha, targets))


def few_step(config: settings.FewStepStudent, build: Build) -> FewStep:
    """Factory of the student `few_step`: at first the teacher itself."""
    return FewStep(trainable(build.piece("teacher"), config.lora, config.alpha, config.targets), config.times)


def many_step(config: settings.ManyStepStudent, build: Build) -> ManyStep:
    """Factory of the student `many_step`: the teacher's own sampler, at first the teacher itself."""
    model: Model = build.piece("teacher")
    student = trainable(model, config.lora, config.alpha, config.targets)
    return ManyStep(model, student, config.steps, config.guidance, config.shift)
