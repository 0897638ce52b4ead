"""The slot `student` of images (a LoRA patch on the frozen teacher, or a full copy) and its exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.core.diffusion.denoiser import Denoiser, FewStep, Model
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.distillation import students
from limbeck.core.pipelines import PipelineModel
from limbeck.core.pipelines import lora as patches
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.image import models
from limbeck.domains.image.config import Student, Tuned


def trainable(model: Model, lora: int | str | None, alpha: float | None) -> Denoiser:
    """The teacher to be trained: LoRA of this rank on it, or a full copy; `auto` patches pipelines, copies the rest."""
    if isinstance(lora, int) and not isinstance(model, PipelineModel):
        raise BadInput(
            f"student.lora: {model.name} is no diffusers pipeline; set student.lora=null to train a full copy"
        )
    return students.trainable(model, lora, alpha)


def build(config: Student, build: Build) -> FewStep:
    """The slot `student`: few steps, at first the teacher itself."""
    return FewStep(trainable(build.piece("teacher"), config.lora, config.alpha), config.times)


def build_tuned(config: Tuned, build: Build) -> ManyStep:
    """The slot `student` of reward recipes: the teacher's own sampler of many steps, at first the teacher itself."""
    model: Model = build.piece("teacher")
    return ManyStep(model, trainable(model, config.lora, config.alpha), config.steps, config.guidance)


def export_lora(build: Build, path: Path) -> list[Path]:
    """`limbeck export RUN --format lora`."""
    return patches.export_lora(build.piece("teacher"), trained(build), path)


def export_folder(build: Build, path: Path) -> list[Path]:
    """`limbeck export RUN --format diffusers`: the teacher's own folder layout with the weights that were trained."""
    model, denoiser = build.piece("teacher"), trained(build)
    if isinstance(model, PipelineModel):
        return patches.export_folder(model, denoiser, path)
    path.mkdir(parents=True, exist_ok=True)
    models.save_teacher(patches.plain(denoiser), path, {"size": model.shape[-1], **_history(build)})
    return sorted(file for file in path.rglob("*") if file.is_file())


def trained(build: Build) -> Denoiser:
    """What the run trained: the student's denoiser, or the teacher's in a recipe without a student."""
    denoiser: Denoiser = (build.piece("student") if build.has("student") else build.piece("teacher")).denoiser
    return denoiser


def _history(build: Build) -> dict[str, Any]:
    """What the folder says of the weights: the times of a student's steps, how long a teacher was trained."""
    if build.has("student"):
        student = build.piece("student")
        if isinstance(student, FewStep):
            return {"times": list(student.times)}
        return {"tuned": {"recipe": build.recipe.name, "steps": build.step, "batch": build.recipe.batch}}
    return {"trained": {"recipe": build.recipe.name, "steps": build.step, "batch": build.recipe.batch}}
