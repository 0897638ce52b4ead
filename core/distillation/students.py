"""Students of any domain that start as the teacher: full copies of it, or patches on it."""

from __future__ import annotations

import copy

from limbeck.core.diffusion.denoiser import Denoiser, FewStep, Model
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.distillation import config as settings
from limbeck.core.distillation.lora import LoRA, Patched
from limbeck.core.run.build import Build


def full_copy(model: Model) -> Denoiser:
    """A trainable float32 copy of the teacher."""
    return copy.deepcopy(model.denoiser).float().requires_grad_(True)


def few_step(config: settings.FewStepStudent, build: Build) -> FewStep:
    """Factory of the student `few_step`: at first the teacher itself."""
    return FewStep(full_copy(build.piece("teacher")), config.times)


def many_step(config: settings.ManyStepStudent, build: Build) -> ManyStep:
    """Factory of the student `many_step`: the teacher's own sampler, at first the teacher itself."""
    model: Model = build.piece("teacher")
    return ManyStep(model, trainable(model, config), config.steps, config.guidance, config.shift)


def trainable(model: Model, config: settings.ManyStepStudent) -> Denoiser:
    """What is trained: LoRA on the frozen teacher, or a copy of it."""
    if config.lora is None:
        return full_copy(model)
    frozen = model.denoiser.requires_grad_(False)
    return Patched(frozen, LoRA(frozen, config.lora, targets=config.targets))
