"""The space of designed sequences: what a run shows, samples and exports. Legend: B sequences, L length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import FewStep, Model
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.rewards.preference import inside
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean
from limbeck.core.run.rng import generator
from limbeck.core.steering.samplers import in_parts
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence import export, fasta, logo, tokens
from limbeck.domains.sequence.text import ALPHABETS, Alphabet

CHUNK = 64  # sequences at a time
SAMPLER_CHUNK = 8  # prompts at a time, of samplers that keep many particles for each


@torch.no_grad()
def draw(model: Model, student: FewStep | ManyStep, prompts: list[str], seed: int, device: torch.device) -> Tensor:
    """Ids [B,L] on the CPU, one a prompt; the same noise for any two students of as many draws."""
    shape = (len(prompts), *model.shape)
    noise = [torch.randn(shape, generator=generator(seed, "sequence.noise", k)) for k in range(student.draws)]
    found = []
    for start in range(0, len(prompts), CHUNK):
        rows = slice(start, start + CHUNK)
        first, *more = (one[rows].to(device) for one in noise)
        found.append(student.sample(first, model.encode(prompts[rows]), more).x.cpu())
    return tokens.ids(torch.cat(found), export.letters(model).size)


def teacher_walk(model: Model, steps: int) -> ManyStep:
    """The teacher under its own walk, without guidance."""
    return ManyStep(model, model.denoiser, steps, 1.0)


class DesignSpace:
    """Shows, samples and exports sequences of the slots `teacher`, `student` and `sampler`.

    Noise comes from the run's seed alone: the same sequence at every step of a run.
    """

    formats = ("fasta", "csv", "parquet", "genbank", "probabilities", "png")

    def __init__(self, config: settings.Designs, build: Build) -> None:
        self.config, self._build = config, build
        self._teacher: Tensor | None = None

    @property
    def alphabet(self) -> Alphabet:
        """The model's, or the one that the recipe names."""
        if self.config.alphabet:
            return ALPHABETS[self.config.alphabet]
        if not self._build.has("teacher"):
            raise BadInput("which letters? the recipe has no teacher: set space.alphabet to dna, rna or protein")
        return export.letters(self._build.piece("teacher"))

    def prompts(self, build: Build, count: int) -> list[str]:
        """The recipe's sample prompts over and over, else those of the data, else empty ones."""
        wanted = list(build.recipe.sample.prompts)
        if not wanted and build.has("data"):
            return list(build.piece("data").prompts(count, generator(0, "sample prompts", 0), slice(None)))
        wanted = wanted or [build.piece("teacher").uncond]
        return [wanted[i % len(wanted)] for i in range(count)]

    def drawn(
        self, build: Build, which: str, prompts: list[str], seed: int, steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Ids [B,L] of the teacher or of the student."""
        model: Model = build.piece("teacher")
        if which == "teacher":
            return draw(model, teacher_walk(model, self.config.steps).but(steps, guidance), prompts, seed, build.device)
        student: FewStep | ManyStep = build.piece("student")
        if isinstance(student, ManyStep):
            student = student.but(steps, guidance)
        elif (steps or student.steps) != student.steps or guidance is not None:
            raise BadInput(
                f"this student has {student.steps} step(s) and no guidance; leave --steps and --guidance out"
            )
        return draw(model, student, prompts, seed, build.device)

    def result(self, build: Build, prompts: list[str], seed: int) -> Tensor:
        """Ids [B,L] of what the recipe makes: its sampler's, else its student's, else the teacher's."""
        if build.has("sampler"):
            found = in_parts(build.piece("sampler"), prompts, seed, SAMPLER_CHUNK).x.cpu()
            return tokens.ids(found, self.alphabet.size)
        return self.drawn(build, "student" if build.has("student") else "teacher", prompts, seed)

    def show(self, build: Build, step: int, folder: Path) -> list[Path]:
        """Writes the logo of the student's samples above the teacher's, with the first sequences of each."""
        prompts, seed = self.prompts(build, build.recipe.sample.count), build.recipe.seed
        trained, steps = f"after {step} training steps", self.config.steps
        if not build.has("student"):
            blocks = {f"teacher, {steps} steps, {trained}": self.drawn(build, "teacher", prompts, seed)}
        else:
            if self._teacher is None:
                self._teacher = self.drawn(build, "teacher", prompts, seed)
            count = build.piece("student").steps
            mine = f"student, {count} step{'s' * (count > 1)}, {trained}"
            drawn = self.drawn(build, "student", prompts, seed)
            blocks = {mine: drawn, f"teacher, {steps} steps": self._teacher}
        return [self.grid(build, blocks, prompts, folder / f"step-{step:08d}.png")]

    def sample(
        self, build: Build, prompts: list[str], seed: int, folder: Path, which: str = "student",
        steps: int | None = None, guidance: float | None = None,
    ) -> list[Path]:  # fmt: skip
        """Writes samples.fasta, samples.csv and their logo: `n` of each prompt."""
        many = [prompt for prompt in prompts for _ in range(self.config.n)]
        x = self.drawn(build, which, many, seed, steps, guidance)
        return self._files(build, x, many, folder, "samples", "samples")

    def keep(self, build: Build, x: Tensor, prompts: list[str], seed: int, folder: Path) -> list[Path]:
        """Writes ids [B,L] as designs.fasta and designs.csv with every reward of the recipe, and logo.png."""
        return self._files(build, tokens.ids(x, self.alphabet.size), prompts, folder, "designs", "logo")

    def _files(
        self, build: Build, ids: Tensor, prompts: list[str], folder: Path, name: str, picture: str
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        found = export.judged(build, ids, prompts)
        paths = [export.as_fasta(found, folder, name), export.as_csv(found, folder, name)]
        return [*paths, self.grid(build, {name: found.ids}, prompts, folder / f"{picture}.png")]

    def grid(self, build: Build, blocks: dict[str, Tensor], prompts: list[str], path: Path) -> Path:
        """Writes the logos of several samplers' ids [B,L], one under the other on one scale."""
        path.parent.mkdir(parents=True, exist_ok=True)
        size = self.alphabet.size
        shown = [logo.Block(title, tokens.ids(x, size).cpu()) for title, x in blocks.items()]
        logo.sheet(shown, self.alphabet, self.config.shown).save(path)
        return path

    def write(self, x: Tensor, folder: Path) -> None:
        """Writes ids [B,L] or rows [B,L,V] as samples.fasta, for programs that judge sequences."""
        texts = tokens.decode(tokens.ids(x, self.alphabet.size), self.alphabet)
        records = [fasta.Record(name, text) for name, text in zip(fasta.names(len(texts)), texts, strict=True)]
        fasta.write(folder / "samples.fasta", records)

    def read(self, name: str, folder: Path) -> Tensor:
        """Ids [L] of a sequence that is spelled out, or of FILE.fasta or FILE.fasta#RECORD in the folder or below."""
        text = self._record(name, folder) if "." in name else self.alphabet.clean(name, "preference")
        wrong = next((i for i, letter in enumerate(text) if letter not in self.alphabet.letters), None)
        if wrong is not None or not text:
            what = (
                f"{text[wrong]} at position {wrong + 1} stands for several letters"
                if text and wrong is not None
                else ""
            )
            raise BadInput(f"{clean(name, 60)}: {what or 'has no letters'}; spell the sequence out")
        return tokens.encode([text], self.alphabet)[0]

    def _record(self, name: str, folder: Path) -> str:
        file, mark, wanted = name.partition("#")
        found = {record.id: record.text for record in fasta.read(inside(file, folder), self.alphabet)}
        if mark and wanted not in found:
            raise BadInput(f"{clean(file, 80)} has no record {clean(wanted, 60)}; it has {clean(', '.join(found), 80)}")
        if not mark and len(found) > 1:
            raise BadInput(f"{clean(file, 80)} has {len(found)} records; name one as {clean(file, 60)}#RECORD")
        return found[wanted] if mark else next(iter(found.values()))

    def export(self, build: Build, path: Path, format: str) -> list[Path]:
        """Draws sample.count designs of the recipe's result (`n` times as many) and writes them in one of `formats`."""
        path.mkdir(parents=True, exist_ok=True)
        if format == "png" and not build.has("sampler"):
            return self.show(build, build.step, path)
        prompts = self.prompts(build, build.recipe.sample.count * self.config.n)
        x = self.result(build, prompts, build.recipe.seed)
        if format == "png":
            return [self.grid(build, {build.recipe.sampler.kind: x}, prompts, path / "designs.png")]
        return export.write(build, export.judged(build, x, prompts), path, format)


def build(config: settings.Designs, build: Build) -> Any:
    """The slot `space` of recipes that design sequences."""
    return DesignSpace(config, build)
