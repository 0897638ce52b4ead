"""The slot `teacher` of sequences: an embedded or own masked model, or a fresh one to train; and its student."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.diffusion.denoiser import Denoiser, Model
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence import models
from limbeck.domains.sequence.constraints import constrained_model
from limbeck.domains.sequence.nets import DilatedCNN
from limbeck.domains.sequence.text import ALPHABETS


def masked(config: settings.Masked, build: Build) -> Model:
    """Factory of sequence.masked."""
    net, meta = models.load(config.model)
    model = models.model(net.requires_grad_(False).to(build.device), meta, config.length, config.model)
    if config.design == settings.Design():
        return model
    return constrained_model(model, config.design, ALPHABETS[meta["alphabet"]])


def fresh(config: settings.Fresh, build: Build) -> Model:
    """Factory of sequence.fresh: random weights."""
    meta = {
        "alphabet": config.alphabet,
        "length": config.length,
        "net": config.net.model_dump(),
        "schedule": config.schedule,
    }
    return models.model(models.network(meta).to(build.device), meta, None, "fresh")


def tuned(config: settings.Tuned, build: Build) -> ManyStep:
    """Factory of sequence.tuned: at first the teacher itself, under its own walk."""
    model: Model = build.piece("teacher")
    denoiser = copy.deepcopy(model.denoiser).float()
    if config.places:
        placed(denoiser, model.shape[0])
    return ManyStep(model, denoiser.requires_grad_(True), config.steps, 1.0)


def placed(denoiser: Denoiser, length: int) -> None:
    """Gives a net an embedding of each place, at first 0, and says so in what it was made from."""
    net: Any = getattr(getattr(denoiser, "network", None), "net", None)
    if not isinstance(net, DilatedCNN):
        raise BadInput("student.places: this model is no cnn and knows its places already; leave it out")
    net.places = nn.Parameter(net.embed.weight.new_zeros(net.embed.out_channels, length))
    net.meta = {**net.meta, "net": {**net.meta["net"], "places": length}}


def export(build: Build, path: Path) -> list[Path]:
    """Exporter `masked`: what the run trained, as a folder that `sequence.masked` and `model:` take."""
    model: Model = build.piece("teacher")
    trained: Any = build.piece("student").denoiser if build.has("student") else model.denoiser
    net = trained.network.net
    return models.save(net, path, {**net.meta, "length": model.shape[0], "name": build.recipe.name})
