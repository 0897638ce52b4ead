"""How point sets are drawn, shown and written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from limbeck.api import Build, generator
from limbeck_points.config import Plots
from limbeck_points.data import POINTS, SHAPES

CELL = 96


@torch.no_grad()
def draw(build: Build, prompts: list[str], seed: int, which: str = "student") -> Tensor:
    """Samples [B, P, 2] on the CPU; row i depends on the seed and the prompts alone."""
    model, gen = build.piece("teacher"), generator(seed, "points.samples", 0)
    if which == "teacher":
        return model.denoiser.sample(len(prompts), gen, model.encode(prompts)).cpu()
    noise = torch.randn(len(prompts), POINTS, 2, generator=gen)
    return build.piece("student").sample(noise.to(build.device), model.encode(prompts)).x.cpu()


def plot(sets: Tensor, columns: int, path: Path) -> Path:
    """One cell a set, `columns` a row."""
    page = Image.new("RGB", (columns * CELL, -(-len(sets) // columns) * CELL), "white")
    pen = ImageDraw.Draw(page)
    for i, points in enumerate((sets.clamp(-1.8, 1.8) / 1.8 + 1) * CELL / 2):
        left, top = i % columns * CELL, i // columns * CELL
        for x, y in points.tolist():
            pen.ellipse((left + x - 2, top + y - 2, left + x + 2, top + y + 2), fill=(24, 78, 160))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return path


def write_csv(build: Build, path: Path) -> list[Path]:
    """Exporter: a hundred samples a shape, one row a point."""
    prompts = [name for name in SHAPES for _ in range(100)]
    rows = ["sample,prompt,x,y"]
    for i, (name, points) in enumerate(zip(prompts, draw(build, prompts, build.seed), strict=True)):
        rows += [f"{i},{name},{x:.5f},{y:.5f}" for x, y in points.tolist()]
    path = path.with_suffix(".csv")
    path.write_text("\n".join(rows) + "\n")
    return [path]


@dataclass
class Space:
    """Teacher in the upper rows, student in the lower."""

    count: int
    formats: tuple[str, ...] = ("png",)

    def show(self, build: Build, step: int, folder: Path) -> list[Path]:
        """Both models on the same prompts."""
        prompts = [name for name in SHAPES for _ in range(self.count)]
        sets = torch.cat([draw(build, prompts, build.seed, which) for which in ("teacher", "student")])
        return [plot(sets, self.count, folder / f"step-{step:08d}.png")]

    def sample(
        self, build: Build, prompts: list[str], seed: int, folder: Path, which: str = "student",
        steps: int | None = None, guidance: float | None = None,
    ) -> list[Path]:  # fmt: skip
        """One picture for all prompts."""
        return [plot(draw(build, prompts, seed, which), min(8, len(prompts)), folder / f"{which}-seed{seed}.png")]

    def export(self, build: Build, path: Path, format: str) -> list[Path]:
        """A sheet of samples."""
        return self.show(build, build.step, path)


def build(config: Plots, build: Build) -> Space:
    """Factory of the space."""
    return Space(config.count)
