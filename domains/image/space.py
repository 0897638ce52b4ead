"""The space of pictures: what a run shows, samples and exports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded, FewStep, Model
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.pictures import sheet, slug, to_pictures
from limbeck.core.rewards.preference import inside
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean
from limbeck.core.run.rng import generator
from limbeck.domains.image import pipelines, students
from limbeck.domains.image.config import Pictures


class ImageSpace:
    """Shows, samples and exports pictures of the slots `teacher` and `student`.

    Noise comes from the run's seed and the picture's number alone: the same picture at every step of a run.
    """

    formats = ("diffusers", "lora", "png")

    def __init__(self, config: Pictures) -> None:
        self.config = config
        self._teacher_sheet: list[Image.Image] | None = None

    def noise(self, model: Model, seed: int, count: int, device: str | torch.device) -> Tensor:
        """Noise [count,*S], the very draws of a diffusers pipeline given `torch.Generator().manual_seed(seed)`."""
        return model.noise(count, torch.Generator().manual_seed(seed)).to(device)

    @torch.no_grad()
    def teacher_pictures(
        self, build: Build, prompts: list[str], seed: int, steps: int | None = None, guidance: float | None = None
    ) -> list[Image.Image]:
        """Pictures of the teacher in its family's own sampler."""
        model: Model = build.piece("teacher")
        scale = self.config.guidance if guidance is None else guidance
        noise = self.noise(model, seed, len(prompts), build.device)
        x = pipelines.sample(model, noise, prompts, steps or self.config.steps, scale)
        return to_pictures(model.codec.decode(x))

    @torch.no_grad()
    def student_pictures(
        self, build: Build, prompts: list[str], seed: int, steps: int | None = None, guidance: float | None = None
    ) -> list[Image.Image]:
        """Pictures of the student in its own sampler (few-step students take guidance only where asked for)."""
        model: Model = build.piece("teacher")
        student, cond = self._student(build, model.encode(prompts), steps, guidance)
        noise = self.noise(model, seed, len(prompts), build.device)
        renoise = [self.noise(model, seed + 1 + k, len(prompts), build.device) for k in range(student.draws - 1)]
        return to_pictures(model.codec.decode(student.sample(noise, cond, renoise).x))

    def _student(
        self, build: Build, cond: Encoded, steps: int | None, guidance: float | None
    ) -> tuple[FewStep | ManyStep, Encoded]:
        """The student with other steps or guidance than its own, where it can have them."""
        student: FewStep | ManyStep = build.piece("student")
        if isinstance(student, ManyStep):
            return student.but(steps, guidance), cond
        if steps is not None and steps != student.steps:
            raise BadInput(f"--steps {steps}: this student was trained for {student.steps} step(s)")
        if guidance is None:
            return student, cond
        denoiser, cond = pipelines.guided(build.piece("teacher"), cond, guidance, denoiser=student.denoiser)
        return FewStep(denoiser, student.times), cond

    def prompts(self, build: Build) -> list[str]:
        """The recipe's sample prompts, else the first of the data's."""
        wanted = build.recipe.sample
        return list(wanted.prompts) or build.piece("data").prompts(wanted.count, generator(0, "sample prompts", 0))

    def show(self, build: Build, step: int, folder: Path) -> list[Path]:
        """Writes the sheet teacher | student for the recipe's sample prompts (a teacher in training stands alone)."""
        prompts, seed, trained = self.prompts(build), build.recipe.seed, f"after {step} training steps"
        if not build.has("student"):
            pictures = self.teacher_pictures(build, prompts, seed)
            blocks: dict[str, Sequence[Image.Image]] = {f"{self.config.steps} steps, {trained}": pictures}
        else:
            self._teacher_sheet = self._teacher_sheet or self.teacher_pictures(build, prompts, seed)
            count = build.piece("student").steps
            blocks = {
                f"teacher, {self.config.steps} steps": self._teacher_sheet,
                f"student, {count} step{'s' * (count > 1)}, {trained}": self.student_pictures(build, prompts, seed),
            }
        path = folder / f"step-{step:08d}.png"
        sheet(blocks, prompts).save(path)
        return [path]

    def sample(
        self, build: Build, prompts: list[str], seed: int, folder: Path, which: str = "student",
        steps: int | None = None, guidance: float | None = None,
    ) -> list[Path]:  # fmt: skip
        """Writes one PNG per prompt."""
        if which == "teacher":
            pictures = self.teacher_pictures(build, prompts, seed, steps, guidance)
        else:
            pictures = self.student_pictures(build, prompts, seed, steps, guidance)
        return saved(pictures, prompts, seed, folder)

    def keep(self, build: Build, x: Tensor, prompts: list[str], seed: int, folder: Path) -> list[Path]:
        """Writes samples [B,*S] of the model's own space, one PNG a prompt."""
        return saved(to_pictures(build.piece("teacher").codec.decode(x)), prompts, seed, folder)

    def grid(self, build: Build, blocks: dict[str, Tensor], prompts: list[str], path: Path) -> Path:
        """Writes samples [B,*S] of several samplers side by side, each block under its title."""
        decode = build.piece("teacher").codec.decode
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet({title: to_pictures(decode(x)) for title, x in blocks.items()}, prompts).save(path)
        return path

    def write(self, x: Tensor, folder: Path) -> None:
        """Writes pixels [B,3,H,W] as 00000.png and so on, for programs that judge pictures."""
        for i, picture in enumerate(to_pictures(x)):
            picture.save(folder / f"{i:05d}.png")

    def read(self, name: str, folder: Path) -> Tensor:
        """Reads the picture of this name, which lies in the folder or below, as pixels [3,H,W] in [-1,1]."""
        path = inside(name, folder)
        try:
            with Image.open(path) as picture:
                array = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
                width, height = picture.size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise BadInput(f"{path}: no picture that can be read ({clean(error, 80)})") from None
        return array.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1

    def export(self, build: Build, path: Path, format: str) -> list[Path]:
        """Writes the student: `diffusers` (folder), `lora` (for the teacher's pipeline), `png` (a sheet)."""
        writers: dict[str, Callable[[], list[Path]]] = {
            "diffusers": lambda: students.export_folder(build, path),
            "lora": lambda: students.export_lora(build, path),
            "png": lambda: self.show(build, build.step, _made(path)),
        }
        return writers[format]()


def saved(pictures: list[Image.Image], prompts: list[str], seed: int, folder: Path) -> list[Path]:
    """One PNG a prompt, named by its number, its prompt and the seed."""
    paths = [_made(folder) / f"{i:03d}-{slug(prompt)}-seed{seed}.png" for i, prompt in enumerate(prompts)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build(config: Pictures, build: Build) -> ImageSpace:
    """The slot `space` of image recipes."""
    return ImageSpace(config)
