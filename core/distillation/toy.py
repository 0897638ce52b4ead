"""ring4, the shared toy: a 2-D mixture of four unequal modes with its exact denoiser, a small student and a metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Output, Sample
from limbeck.core.diffusion.mixture import GaussianMixture
from limbeck.core.diffusion.process import process
from limbeck.core.distillation.config import EnergyDistance, Ring4Data, Ring4Space, Ring4Student, Ring4Teacher
from limbeck.core.distillation.critic import FlatNet
from limbeck.core.run.build import Batch, Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator

MODES = torch.tensor([[1.5, 1.5], [-1.5, 1.5], [-1.5, -1.5], [1.5, -1.5]])
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])
STD = 0.4
LABELS = [str(i) for i in range(len(MODES))]  # the prompts; "" is unconditional


class Ring4(Denoiser):
    """The exact denoiser; its features (for heads) are the scaled input, the answer and the noise level."""

    def __init__(self, config: Ring4Teacher) -> None:
        classes = list(range(len(MODES))) if config.labels else None
        mixture = GaussianMixture(MODES, STD, process(config.process), WEIGHTS, classes)
        super().__init__(mixture.process, "x0")
        self.mixture, self.classes = mixture, len(MODES) if config.labels else 0

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        x0 = self.mixture(x_t, t, cond)
        if not features:
            return x0
        alpha, sigma = self.process.coefficients(t, x_t)
        return x0, [torch.cat([x_t / torch.hypot(1.6 * alpha, sigma), x0, (sigma / alpha).log() / 2], 1)]


def encode(prompts: list[str]) -> Encoded:
    """Labels [B]; -1 for the empty prompt."""
    unknown = [prompt for prompt in prompts if prompt not in ("", *LABELS)]
    if unknown:
        raise BadInput(f"ring4 has no mode {unknown[0]!r}; its prompts are {', '.join(LABELS)}")
    return {"label": torch.tensor([int(prompt) if prompt else -1 for prompt in prompts])}


def teacher(config: Ring4Teacher, build: Build) -> Model:
    """Factory of the teacher; without `labels` the prompts mean nothing and the teacher is unconditional."""
    denoiser = Ring4(config).to(build.device)
    to_device: Callable[[list[str]], Encoded] = lambda p: {k: v.to(build.device) for k, v in encode(p).items()}  # noqa: E731
    return Model(denoiser, (2,), Identity(), to_device if config.labels else lambda p: {}, "ring4")


class MlpStudent(nn.Module):
    """z [B, 2] -> x [B, 2] in one step."""

    def __init__(self, config: Ring4Student, classes: int) -> None:
        super().__init__()
        self.net = FlatNet((2,), classes, config.width, config.depth)

    def sample(self, noise: Tensor, cond: Encoded, renoise: list[Tensor] | None = None) -> Sample:
        """The net's output is the sample."""
        return Sample(self.net(noise, noise.new_zeros(len(noise)), cond), cond)


def student(config: Ring4Student, build: Build) -> MlpStudent:
    """Factory of the student."""
    model: Model = build.piece("teacher")
    return MlpStudent(config, int(model.denoiser.classes)).to(build.device)  # type: ignore[arg-type]


@dataclass
class Ring4Set:
    """Exact samples with their mode's name as prompt."""

    def prompts(self, n: int, gen: Generator, rows: slice) -> list[str]:
        """Modes by their weights."""
        picked = torch.multinomial(WEIGHTS, n, replacement=True, generator=gen)
        return [LABELS[k] for k in picked[rows].tolist()]

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """x [b, 2] and prompts."""
        x, labels = exact(n, gen)
        return Batch(x[rows], [LABELS[k] for k in labels[rows].tolist()])


def data(config: Ring4Data, build: Build) -> Ring4Set:
    """Factory of the data."""
    return Ring4Set()


def exact(n: int, gen: Generator) -> tuple[Tensor, Tensor]:
    """n exact samples [n, 2] and their modes [n]."""
    labels = torch.multinomial(WEIGHTS, n, replacement=True, generator=gen)
    return MODES[labels] + STD * torch.randn(n, 2, generator=gen), labels


@torch.no_grad()
def draw(build: Build, n: int, seed: int, prompts: list[str] | None = None) -> Tensor:
    """n samples of the student [n, 2] on the CPU; prompts by their weights unless given."""
    noise = torch.randn(n, 2, generator=generator(seed, "ring4.noise", 0))
    prompts = prompts or Ring4Set().prompts(n, generator(seed, "ring4.prompts", 0), slice(None))
    model: Model = build.piece("teacher")
    x: Tensor = build.piece("student").sample(noise.to(build.device), model.encode(prompts)).x
    return x.cpu()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| (Szekely and Rizzo), unbiased within each set."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within)


def shares(x: Tensor) -> Tensor:
    """The share of samples nearest to each mode, [4]."""
    return torch.bincount(torch.cdist(x, MODES).argmin(1), minlength=len(MODES)) / len(x)


def spread(x: Tensor) -> float:
    """The standard deviation around the nearest mode, per axis; .4 in the data."""
    return float((x - MODES[torch.cdist(x, MODES).argmin(1)]).square().mean().sqrt())


def row(name: str, x: Tensor, target: Tensor) -> dict[str, float | str]:
    """One line of the evaluation."""
    found = shares(x)
    out: dict[str, float | str] = {"samples": name, "energy distance": energy_distance(x, target)}
    out |= {"worst mode": float((found - WEIGHTS).abs().max()), "spread": spread(x)}
    return out | {f"mode {k}": float(share) for k, share in zip(LABELS, found, strict=True)}


def metric(config: EnergyDistance, build: Build) -> Callable[[], list[dict[str, float | str]]]:
    """Factory of the metric: student and a second exact draw against an exact draw."""

    def measure() -> list[dict[str, float | str]]:
        target, again = (exact(config.count, generator(build.seed, f"ring4.target{i}", 0))[0] for i in range(2))
        return [row("student", draw(build, config.count, build.seed), target), row("exact", again, target)]

    return measure


def scatter(panels: list[Tensor], path: Path, size: int = 320, reach: float = 3.2) -> Path:
    """Points [n, 2] of each panel side by side as a PNG."""
    picture = Image.new("RGB", (size * len(panels), size), "white")
    pen = ImageDraw.Draw(picture)
    for i, points in enumerate(panels):
        places = (points.clamp(-reach, reach) / reach * torch.tensor([1.0, -1.0]) + 1) * (size - 1) / 2
        for x, y in places.tolist():
            pen.point((i * size + x, y), fill=(24, 78, 160) if i == 0 else (120, 120, 120))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


class Scatter:
    """Scatter plots: student (left) and exact samples (right)."""

    formats = ("safetensors",)

    def __init__(self, count: int) -> None:
        self.count = count

    def show(self, build: Build, step: int, folder: Path) -> list[Path]:
        """One picture with fixed noise."""
        target, _ = exact(self.count, generator(build.seed, "ring4.show", 0))
        return [scatter([draw(build, self.count, build.seed), target], folder / f"step-{step:08d}.png")]

    def sample(
        self,
        build: Build,
        prompts: list[str],
        seed: int,
        folder: Path,
        which: str = "student",
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[Path]:
        """`count` points per prompt, as a picture."""
        rows = [prompt for prompt in prompts or [""] for _ in range(self.count)]
        if which == "teacher":
            mixture = build.piece("teacher").denoiser.mixture
            points = mixture.sample(len(rows), generator(seed, "ring4.teacher", 0), encode(rows))
        else:
            points = draw(build, len(rows), seed, rows)
        return [scatter([points], folder / f"{which}.png")]

    def export(self, build: Build, path: Path, format: str) -> list[Path]:
        """The student's weights."""
        save_file(build.piece("student").state_dict(), path)
        return [path]


def space(config: Ring4Space, build: Build) -> Scatter:
    """Factory of the space."""
    return Scatter(config.count)
