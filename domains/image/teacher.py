"""The slot `teacher` of images: an embedded name, a folder, or a hub id, all behind one kind."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from limbeck.core import text
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Encoded, Model, Network
from limbeck.core.diffusion.process import Flow
from limbeck.core.pipelines.loading import DTYPES
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.core.text import PromptStates
from limbeck.domains.image import models
from limbeck.domains.image.config import Teacher
from limbeck.domains.image.data import FluentData
from limbeck.domains.image.pipelines import load_pipeline

ASSETS = Path(__file__).parent / "assets"
MARK = "limbeck.json"


def embedded(name: str, device: str | torch.device = "cpu") -> Model:
    """A teacher that comes with limbeck, by its name."""
    return load_embedded(ASSETS / name, device)


def folder_of(name: str) -> Path:
    """The folder of an embedded teacher, or the folder itself."""
    return ASSETS / name if name in names() else Path(name).expanduser()


def names() -> list[str]:
    """The teachers that come with limbeck."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{MARK}"))


def build(config: Teacher, build: Build) -> Model:
    """`model:` is an embedded name, a local folder (ours or diffusers'), or a hub id."""
    folder = folder_of(config.model)
    if (folder / MARK).is_file():
        return load_embedded(folder, build.device)
    if "/" not in config.model and not folder.exists():
        hint = did_you_mean(config.model, names()) or f"; embedded teachers: {', '.join(names()) or 'none'}"
        raise BadInput(f"teacher.model: there is no {clean(config.model, 80)}{hint}")
    dtype = DTYPES[build.recipe.precision]  # frozen, so it may be held in the precision of the run
    return load_pipeline(config.model, build.device, dtype, config.size, config.guidance)


def load_embedded(folder: Path, device: str | torch.device = "cpu") -> Model:
    """A teacher in the embedded format: pixels [3,S,S] in [-1,1], rectified flow, MiniLM token states."""
    net, meta = models.load_teacher(folder)
    net.requires_grad_(False).to(device)
    return embedded_model(net, (3, meta["size"], meta["size"]), meta["prediction"], device, folder.name)


def embedded_model(
    net: nn.Module, shape: tuple[int, ...], prediction: str, device: str | torch.device, name: str
) -> Model:
    """A net of the embedded kind with everything around it."""
    denoiser = Network(net, Flow(), prediction, call, taps=("mid_block",))
    return Model(denoiser, shape, Identity(), PromptStates(torch.device(device), warn_unknown), name)


def call(net: nn.Module, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """The U-Net sees 2x2 pixels as channels and time 1000 t."""
    return models.flow(net, x, time, cond["states"], cond["mask"])


@cache
def vocabulary() -> tuple[FluentData, frozenset[str]]:
    """What the embedded teachers were trained on."""
    data = FluentData()
    return data, frozenset(text.lower() for text in data.texts())


def warn_unknown(prompt: str) -> None:
    """A prompt outside the embedded teacher's small world gets a warning that names the nearest ones inside."""
    data, known = vocabulary()
    if prompt.strip() and prompt.strip().lower() not in known:
        text.warn_unknown(prompt, data.nearest(prompt))
