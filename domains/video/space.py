"""The space of clips: what a run shows, samples and exports. Legend: B clips, F frames, H and W pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from limbeck.core import film
from limbeck.core.diffusion.denoiser import FewStep, Model
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.distillation.lora import merged
from limbeck.core.pictures import sheet, slug, to_pictures
from limbeck.core.pipelines import PipelineModel, lora
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.video import models
from limbeck.domains.video.config import Clips

Blocks = dict[str, Tensor]  # title -> pixels [B,3,F,H,W] in [-1,1]


class ClipSpace:
    """Shows, samples and exports clips of the slots `teacher` and `student`.

    Noise comes from the run's seed and the clip's number alone: the same clip at every step of a run.
    """

    formats = ("diffusers", "lora", "mp4")

    def __init__(self, config: Clips) -> None:
        self.config = config
        self._teacher: Tensor | None = None

    @torch.no_grad()
    def drawn(self, build: Build, sampler: FewStep | ManyStep, prompts: list[str], seed: int) -> Tensor:
        """Pixels [B,3,F,H,W] of a sampler for these prompts, at the configured frame rate."""
        model: Model = build.piece("teacher")
        fps = torch.full((len(prompts),), self.config.fps, device=build.device)
        noise, *renoise = (self.noise(model, seed + k, len(prompts), build.device) for k in range(sampler.draws))
        x = sampler.sample(noise, model.encode(prompts) | {"fps": fps}, renoise).x
        return model.codec.decode(x).cpu()

    def noise(self, model: Model, seed: int, count: int, device: torch.device) -> Tensor:
        """Noise [count,*S]."""
        return model.noise(count, torch.Generator().manual_seed(seed)).to(device)

    def teacher(self, build: Build, steps: int | None = None, guidance: float | None = None) -> ManyStep:
        """The teacher in many steps."""
        model: Model = build.piece("teacher")
        scale = self.config.guidance if guidance is None else guidance
        return ManyStep(model, model.denoiser, steps or self.config.steps, scale)

    def student(self, build: Build, steps: int | None = None, guidance: float | None = None) -> FewStep | ManyStep:
        """The student, in other steps or at another guidance where it can have them."""
        student: FewStep | ManyStep = build.piece("student")
        if isinstance(student, ManyStep):
            return student.but(steps, guidance)
        if steps is not None and steps != student.steps:
            raise BadInput(f"--steps {steps}: this student was trained for {student.steps} step(s)")
        if guidance is not None:
            raise BadInput("--guidance: a student of few steps has its guidance built in; leave it out")
        return student

    def prompts(self, build: Build) -> list[str]:
        """The recipe's sample prompts, else the first of the data's."""
        wanted = build.recipe.sample
        return list(wanted.prompts) or build.piece("data").prompts(wanted.count, generator(0, "sample prompts", 0))

    def show(self, build: Build, step: int, folder: Path) -> list[Path]:
        """Writes a moving sheet teacher | student for the sample prompts (a teacher in training stands alone).

        The clips lie beside it, the student's in a folder of the step, the teacher's in one of their own.
        """
        first, blocks, prompts = self._teacher is None, self.blocks(build, step), self.prompts(build)
        *teacher, own = blocks.items()
        written = [self.moving_sheet(blocks, prompts, folder / f"step-{step:08d}.webp")]
        for title, clips in teacher if first else []:
            written += self.labelled(title, clips, prompts, build.recipe.seed, folder / "teacher")
        return written + self.labelled(*own, prompts, build.recipe.seed, folder / f"step-{step:08d}")

    def labelled(self, title: str, clips: Tensor, prompts: Sequence[str], seed: int, folder: Path) -> list[Path]:
        """One MP4 a prompt, and who made them of what for `limbeck view`."""
        paths = self.saved(clips, prompts, seed, folder)
        made = {path.name: {"prompt": prompt} for path, prompt in zip(paths, prompts, strict=True)}
        (folder / "clips.json").write_text(json.dumps({"title": title, "files": made}, indent=1), encoding="utf-8")
        return paths

    def blocks(self, build: Build, step: int) -> Blocks:
        """The clips of the sample prompts by whoever makes them, each under its title."""
        prompts, seed, trained = self.prompts(build), build.recipe.seed, f"after {step} training steps"
        if not build.has("student"):
            return {f"{self.config.steps} steps, {trained}": self.drawn(build, self.teacher(build), prompts, seed)}
        if self._teacher is None:
            self._teacher = self.drawn(build, self.teacher(build), prompts, seed)
        student = self.student(build)
        title = f"student, {student.steps} step{'s' * (student.steps > 1)}, {trained}"
        return {
            f"teacher, {self.config.steps} steps": self._teacher,
            title: self.drawn(build, student, prompts, seed),
        }

    def moving_sheet(self, blocks: Blocks, prompts: Sequence[str], path: Path) -> Path:
        """A film of all clips side by side, each block under its title: .webp (endless) or .mp4."""
        frames = next(iter(blocks.values())).shape[2]
        pages = [
            sheet({title: to_pictures(clips[:, :, k]) for title, clips in blocks.items()}, prompts)
            for k in range(frames)
        ]
        return film.write(
            torch.from_numpy(np.stack([np.asarray(page) for page in pages])).movedim(3, 1), path, self.config.fps
        )

    def sample(
        self, build: Build, prompts: list[str], seed: int, folder: Path, which: str = "student",
        steps: int | None = None, guidance: float | None = None,
    ) -> list[Path]:  # fmt: skip
        """Writes one MP4 per prompt."""
        make = self.teacher if which == "teacher" else self.student
        return self.saved(self.drawn(build, make(build, steps, guidance), prompts, seed), prompts, seed, folder)

    def saved(self, clips: Tensor, prompts: Sequence[str], seed: int, folder: Path) -> list[Path]:
        """One MP4 a prompt, named by its number, its prompt and the seed."""
        folder.mkdir(parents=True, exist_ok=True)
        return [
            film.write(clip.movedim(1, 0), folder / f"{i:03d}-{slug(prompt)}-seed{seed}.mp4", self.config.fps)
            for i, (clip, prompt) in enumerate(zip(clips, prompts, strict=True))
        ]

    def keep(self, build: Build, x: Tensor, prompts: list[str], seed: int, folder: Path) -> list[Path]:
        """Writes samples [B,*S] of the model's own space, one MP4 a prompt."""
        return self.saved(build.piece("teacher").codec.decode(x).cpu(), prompts, seed, folder)

    def export(self, build: Build, path: Path, format: str) -> list[Path]:
        """Writes `diffusers` (a folder for `teacher.model`), `lora` (for the teacher's pipeline) or `mp4`.

        `mp4` is the sample prompts, together and alone.
        """
        if format == "mp4":
            path.mkdir(parents=True, exist_ok=True)
            prompts, blocks = self.prompts(build), self.blocks(build, build.step)
            sheet = self.moving_sheet(blocks, prompts, path / "side-by-side.mp4")
            return [sheet, *self.saved(list(blocks.values())[-1], prompts, build.recipe.seed, path)]
        piece = build.piece("student") if build.has("student") else build.piece("teacher")
        model: Model = build.piece("teacher")
        if format == "lora":
            return lora.export_lora(model, piece.denoiser, path)
        if isinstance(model, PipelineModel):
            return lora.export_folder(model, piece.denoiser, path)
        trained = {"recipe": build.recipe.name, "steps": build.step, "batch": build.recipe.batch}
        meta = {
            "format": 1,
            "prediction": "flow",
            "frames": model.shape[1],
            "size": model.shape[-1],
            "trained": trained,
        }
        path.mkdir(parents=True, exist_ok=True)
        return models.save(merged(piece.denoiser).net, path, meta)


def build(config: Clips, build: Build) -> ClipSpace:
    """The slot `space` of video recipes."""
    return ClipSpace(config)
