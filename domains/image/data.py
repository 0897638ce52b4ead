"""The embedded captioned pictures: 1599 names with alpha, composited on random plain grounds (B batch, N pictures)."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limbeck.core.captioned import Captioned, Captions
from limbeck.core.compositing import colours, resampled, resampling
from limbeck.core.run.errors import BadInput

FOLDER = Path(__file__).parent / "assets" / "fluent"
SCALES = (0.75, 1.0)


@cache
def captions_file() -> dict[str, Any]:
    """The committed names, groups and keywords."""
    data: dict[str, Any] = json.loads((FOLDER / "captions.json").read_text(encoding="utf-8"))
    return data


EVAL_NAMES: tuple[str, ...] = tuple(captions_file()["eval_names"])


def load_sheet(size: int = 32, folder: Path = FOLDER) -> Tensor:
    """The pictures of one art style as uint8 RGBA [N,4,size,size], alpha not premultiplied."""
    path = folder / f"pictures-{size}.webp"
    if not path.exists():
        raise BadInput(f"pictures of size {size} are not built: run `limbeck assets build {folder.name}-{size}`")
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGBA")))
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    tiles = pixels.view(rows, size, columns, size, 4).permute(0, 2, 4, 1, 3).reshape(-1, 4, size, size)
    return tiles[: len(captions_file()["pictures"])].contiguous()


def placed(pictures: Tensor, mirror: Tensor, gen: torch.Generator, vary: float = 1.0) -> Tensor:
    """Premultiplied pictures [B,4,S,S], each scaled by .75 to 1, shifted within the frame, and mirrored with p = .5.

    `vary` less than 1 keeps them nearer to their own place; at 0 they stay as they are.
    """
    u = torch.rand(len(pictures), 4, generator=gen)
    size = pictures.shape[-1]
    scale = SCALES[1] - vary * (SCALES[1] - SCALES[0]) * (1 - u[:, 0])
    shift = (2 * u[:, 1:3] - 1) * ((1 - scale) * size / 2)[:, None]
    columns = resampling(scale, shift[:, 0], mirror & (u[:, 3] < 0.5 * vary), size)
    rows = resampling(scale, shift[:, 1], torch.zeros_like(mirror), size)
    return resampled(pictures, rows, columns)


def composite(premultiplied: Tensor, ground: Tensor) -> Tensor:
    """Premultiplied RGBA [B,4,H,W] over colours [B,3] -> pictures [B,3,H,W] in [-1,1]."""
    over = premultiplied[:, :3] + (1 - premultiplied[:, 3:]) * ground[:, :, None, None]
    return over * 2 - 1


def grounds(n: int, gen: torch.Generator) -> Tensor:
    """Plain ground colours [n,3] in [0,1]."""
    return colours(torch.rand(n, 3, generator=gen))


class FluentData(Captioned):
    """Pictures, names, groups and keywords, and random draws of (picture on a ground, caption)."""

    def __init__(self, size: int = 32, folder: Path = FOLDER) -> None:
        super().__init__(captions_file()["pictures"])
        self.size = size
        self.eval_names = EVAL_NAMES
        self.rgba = load_sheet(size, folder)
        pixels = self.rgba.float() / 255
        self.premultiplied = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)

    def batch(
        self, which: int | Tensor, gen: torch.Generator, captions: Captions = "mixed", vary: float = 1.0
    ) -> tuple[Tensor, list[str], Tensor]:
        """Draws pictures (a number: uniform; or given indices [B]) -> x [B,3,H,W] in [-1,1], captions, indices [B]."""
        indices = torch.randint(len(self), (which,), generator=gen) if isinstance(which, int) else which
        texts = self.caption(indices, gen, captions)
        pictures = placed(self.premultiplied[indices], self.mirror[indices], gen, vary)
        return composite(pictures, grounds(len(indices), gen)), texts, indices

    def reference(self, n: int, gen: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
        """n pictures under their full names, spread as evenly as n allows over all names (for evaluation)."""
        return self.batch(self.spread(n, gen), gen, "name")
