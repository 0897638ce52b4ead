"""The embedded objects: names, pictures from known cameras, and the data that a teacher of views learns from.

Legend: K objects, V cameras, B batch. Pictures are 32x32, lit by one fixed soft light; objects fit into the unit ball.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Generator, Tensor

from limbeck.core.run.build import Batch, Build
from limbeck.core.text import sentences
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.known import Known

FOLDER = Path(__file__).parent / "assets" / "objects"
FACTS, CAMERAS, TRAINING, HELD_OUT = "objects.json", "cameras.safetensors", "training.webp", "held_out.webp"
NAMED = 0.7  # share of the prompts that are an object's name; the rest are its other words


@dataclass(frozen=True)
class Objects:
    """Names [K] with other words for each, views uint8 RGBA on white [K,V,4,H,W], and the poses they are seen from.

    Training poses [K,V,3,4] differ from object to object; the held-out ones [V,3,4] are the same for all.
    """

    names: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    training: Tensor
    held_out: Tensor
    training_pose: Tensor
    held_out_pose: Tensor
    fov: float  # degrees

    @property
    def size(self) -> int:
        """Pixels along a side."""
        return int(self.training.shape[-1])

    def captions(self) -> dict[str, int]:
        """Every text that means an object, and which."""
        pairs = [(text, i) for i, name in enumerate(self.names) for text in (name, *self.words[i])]
        return dict(pairs)

    def find(self, prompt: str) -> int | None:
        """The number of the object that a prompt names, whatever its article and case."""
        return self.captions().get(plain(prompt))

    def cameras(self, pose: Tensor) -> Cameras:
        """Cameras [V] of poses [V,3,4]."""
        return Cameras(pose, torch.full((len(pose),), math.radians(self.fov)), self.size, self.size)

    def known(self, prompt: str) -> Known | None:
        """The pictures of an object at the held-out cameras; None for what the set does not have."""
        index = self.find(prompt)
        if index is None:
            return None
        pixels = self.held_out[index].float() / 255
        return Known(self.cameras(self.held_out_pose), pixels[:, :3] * 2 - 1, pixels[:, 3:])

    def nearest(self, prompt: str, count: int = 3) -> list[str]:
        """The names of the objects whose words mean most nearly what the prompt says."""
        texts, owners = list(self.captions()), list(self.captions().values())
        likeness = vectors(texts) @ vectors([prompt])[0]
        ranked = [owners[i] for i in likeness.argsort(descending=True).tolist()]
        return [self.names[i] for i in dict.fromkeys(ranked)][:count]


def plain(prompt: str) -> str:
    """A prompt in lower case, without its article and needless blanks."""
    return re.sub(r"^(an?|the) ", "", " ".join(prompt.lower().split()))


@cache
def objects(folder: Path = FOLDER) -> Objects:
    """The committed set."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    rows, poses = facts["objects"], load_file(folder / CAMERAS)
    names, words = tuple(row["name"] for row in rows), tuple(tuple(row["words"]) for row in rows)
    training, held_out = (tiles(folder / name, facts["size"]) for name in (TRAINING, HELD_OUT))
    return Objects(names, words, training, held_out, poses["training"], poses["held_out"], facts["fov"])


def tiles(path: Path, size: int) -> Tensor:
    """The pictures of a sheet with a row an object, uint8 RGBA [K,V,4,size,size]."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGBA")))
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    return pixels.view(rows, size, columns, size, 4).permute(0, 2, 4, 1, 3).contiguous()


def vectors(prompts: Sequence[str]) -> Tensor:
    """Sentence embeddings [B,384] of prompts; articles and case make no difference."""
    return sentences()([plain(prompt) for prompt in prompts])[0]


class ObjectData:
    """The slot `data`: training views in [-1, 1] on white, their words, and their cameras (some of them untold)."""

    def __init__(self, cameraless: float) -> None:
        self.cameraless, self.set = cameraless, objects()

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """x [b,3,H,W] with `camera` [b,15]; a row of zeros says that the camera is not known."""
        which = torch.randint(len(self.set.names), (n,), generator=gen)
        view = torch.randint(self.set.training.shape[1], (n,), generator=gen)
        untold = torch.rand(n, generator=gen) < self.cameraless
        texts = self.texts(which, gen)[rows]
        which, view, untold = which[rows], view[rows], untold[rows]
        camera = self.set.cameras(self.set.training_pose[which, view]).rows()
        pixels = self.set.training[which, view, :3].float() / 127.5 - 1
        return Batch(pixels, texts, {"camera": torch.where(untold[:, None], 0.0, camera)})

    def prompts(self, n: int, gen: Generator, rows: slice) -> list[str]:
        """Words of uniformly drawn objects."""
        return self.texts(torch.randint(len(self.set.names), (n,), generator=gen), gen)[rows]

    def texts(self, which: Tensor, gen: Generator) -> list[str]:
        """Names of objects [n], or now and then other words for them."""
        chance = torch.rand(len(which), 2, generator=gen).tolist()
        out = []
        for i, (named, other) in zip(which.tolist(), chance, strict=True):
            words = self.set.words[i]
            out.append(self.set.names[i] if named < NAMED else words[int(other * len(words))])
        return out


def data(config: settings.Objects, build: Build) -> ObjectData:
    """Factory of the data `threed.objects`."""
    return ObjectData(config.cameraless)
