"""The slot `teacher` of images: an embedded name, a folder, or a hub id, all behind one kind."""

from __future__ import annotations

import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Encoded, Model, Network
from limbeck.core.diffusion.process import Flow
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.core.text import MiniLMEncoder
from limbeck.domains.image import models
from limbeck.domains.image.config import Teacher
from limbeck.domains.image.data import FluentData
from limbeck.domains.image.pipelines import load_pipeline

ASSETS = Path(__file__).parent / "assets"
MARK = "limbeck.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = 4  # prompts a forward of the text encoder, always: a row's bits must not depend on its company


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
    return Model(denoiser, shape, Identity(), PromptStates(MiniLMEncoder(), torch.device(device)), name)


def call(net: nn.Module, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """The U-Net sees 2x2 pixels as channels and time 1000 t."""
    return models.flow(net, x, time, cond["states"], cond["mask"])


class PromptStates:
    """Token states by prompt, each encoded once: the encoder costs as much as a training step, captions come again."""

    def __init__(self, encoder: MiniLMEncoder, device: torch.device, limit: int = 8192) -> None:
        self.encoder, self.device, self.limit = encoder.to(device), device, limit
        self.known: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, prompts: list[str]) -> Encoded:
        """states [B,L,384] and mask [B,L]."""
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.known))
        warn_unknown(new)
        rows = {prompt: self.known[prompt] for prompt in prompts if prompt in self.known}
        for start in range(0, len(new), ROWS):
            rows |= self._encode(new[start : start + ROWS])
        self._keep(rows)
        states, masks = zip(*(rows[prompt] for prompt in prompts), strict=True)
        return {"states": torch.stack(states), "mask": torch.stack(masks)}

    def _encode(self, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        states, mask = self.encoder.encode(prompts + [""] * (ROWS - len(prompts)))
        return {p: (states[i].clone(), mask[i].clone()) for i, p in enumerate(prompts)}

    def _keep(self, rows: dict[str, tuple[Tensor, Tensor]]) -> None:
        for prompt, row in rows.items():
            self.known[prompt] = row
            self.known.move_to_end(prompt)
        while len(self.known) > self.limit:
            self.known.popitem(last=False)


@cache
def vocabulary() -> tuple[FluentData, frozenset[str]]:
    """What the embedded teachers were trained on."""
    data = FluentData()
    return data, frozenset(text.lower() for text in data.texts())


def warn_unknown(prompts: list[str]) -> None:
    """A prompt outside the embedded teacher's small world gets a warning that names the nearest ones inside."""
    for prompt in prompts:
        if prompt.strip() and prompt.strip().lower() not in vocabulary()[1]:
            near = ", ".join(f'"{name}"' for name in vocabulary()[0].nearest(prompt))
            print(
                f'warning: the embedded teacher does not know "{clean(prompt, 80)}"; nearest: {near}', file=sys.stderr
            )
