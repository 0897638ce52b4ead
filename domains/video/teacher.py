"""The slot `teacher` of clips: the embedded video net, fresh or trained, and diffusers pipelines."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from limbeck.core import text
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Model, Network
from limbeck.core.diffusion.process import Flow
from limbeck.core.pipelines.loading import DTYPES
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.core.text import PromptStates
from limbeck.domains.video import config as settings
from limbeck.domains.video import models
from limbeck.domains.video.data import motions
from limbeck.domains.video.pipelines import load_pipeline

ASSETS = Path(__file__).parent / "assets"


def names() -> list[str]:
    """The teachers that come with limbeck."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{models.MARK}"))


def model(net: nn.Module, meta: models.Meta, device: torch.device, name: str) -> Model:
    """A net with everything around it: clips [3,F,S,S] in [-1,1], rectified flow, MiniLM token states."""
    denoiser = Network(net.to(device), Flow(), "flow", models.flow, models.TIME, taps=("mid_block",))
    shape = (3, meta["frames"], meta["size"], meta["size"])
    return Model(denoiser, shape, Identity(), PromptStates(device, warn_unknown), name)


def warn_unknown(prompt: str) -> None:
    """A prompt outside the embedded teacher's small world gets a warning that names the nearest ones inside."""
    if prompt.strip() and not motions().knows(prompt):
        text.warn_unknown(prompt, motions().nearest(prompt))


def folder_of(name: str) -> Path:
    """The folder of an embedded teacher, or the folder itself; BadInput where there is none."""
    folder = ASSETS / name if name in names() else Path(name).expanduser()
    if not (folder / models.MARK).is_file():
        hint = did_you_mean(name, names()) or f"; embedded teachers: {', '.join(names()) or 'none'}"
        raise BadInput(f"teacher: there is no {clean(name, 80)}{hint}")
    return folder


def fresh(config: settings.FreshVideo, build: Build) -> Model:
    """Factory of the teacher `video.fresh`: a net to be trained."""
    if config.start is not None:
        return model(*models.load(folder_of(config.start)), build.device, "fresh")
    net = models.build_net(config.size, tuple(config.channels), config.layers)
    return model(net, {"frames": config.frames, "size": config.size}, build.device, "fresh")


def build(config: settings.VideoTeacher, build: Build) -> Model:
    """Factory of the teacher `video.teacher`: an embedded name, a folder (ours or diffusers'), or a hub id."""
    path = Path(config.model).expanduser()
    ours = config.model in names() or (path / models.MARK).is_file()
    if not ours and ("/" in config.model or path.exists()):
        return load_pipeline(config, build.device, DTYPES[build.recipe.precision])
    if more := sorted(config.model_dump(exclude_defaults=True).keys() - {"kind", "model"}):
        raise BadInput(f"teacher.{more[0]}: is for diffusers pipelines, and {clean(config.model, 80)} is not one")
    folder = folder_of(config.model)
    net, meta = models.load(folder)
    return model(net.requires_grad_(False), meta, build.device, folder.name)
