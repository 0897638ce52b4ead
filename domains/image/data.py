"""The embedded captioned pictures: 1599 names with alpha, composited on random plain grounds (B batch, N pictures)."""

import difflib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limbeck.core.run.errors import BadInput

FOLDER = Path(__file__).parent / "assets" / "fluent"
Captions = Literal["name", "mixed"]
COARSE = 1 / 3  # share of the mixed captions at the level of a group or a keyword
SCALES = (0.75, 1.0)

# Group -> (caption, keyword or word of the name that it needs; "" holds for the whole group), first match wins.
GROUP_CAPTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "Smileys & Emotion": (("a face", "face"), ("a cat face", "cat"), ("a heart", "heart"), ("an emotion", "")),
    "People & Body": (("a hand", "hand"), ("a person", "")),
    "Animals & Nature": (("a flower", "flower"), ("plant", "plant"), ("animal", "")),
    "Food & Drink": (("a drink", "drink"), ("fruit", "fruit"), ("food", "")),
    "Travel & Places": (("a vehicle", "vehicle"), ("a building", "building"), ("weather", "weather"), ("a place", "")),
    "Activities": (("sports", "sports"), ("an activity", "")),
    "Objects": (("clothing", "clothing"), ("an object", "")),
    "Symbols": (("a symbol", ""),),
}

# A mirrored picture of these would be wrong: writing, numbers, clocks, directions, moon phases, charts.
UNMIRRORED = re.compile(
    r"(?i)\b(left|right|leftwards|rightwards|facing|arrow|clocks?|watch|o’clock|thirty|timer|hourglass|numbers?|letters?"
    r"|alphabet|text|written|moon|quarter|crescent|chart|calendar|newspaper|place medal|keyboard|atm|hundred points"
    r"|input|button|sign|banknote|receipt|passport|label|card|bank|hospital|hotel|school|post office|store|cinema"
    r"|dice|die|slot machine|8 ball|music|musical|score|note|notes|saxophone|guitar|violin|globe|map|zzz|page)\b"
)


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


def mirrorable(name: str, group: str, keywords: list[str]) -> bool:
    """Whether the mirrored picture still shows what its name says."""
    written = {"alphabet", "number", "numbers", "clock"}
    return group != "Symbols" and not UNMIRRORED.search(name) and not written.intersection(keywords)


def group_caption(name: str, group: str, keywords: list[str]) -> str:
    """The caption of a picture at the level of its group ("animal", "a face", "food")."""
    words = {*name.lower().split(), *keywords}
    return next(text for text, need in GROUP_CAPTIONS[group] if not need or need in words)


def grounds(n: int, gen: torch.Generator) -> Tensor:
    """Plain ground colours [n,3] in [0,1]: any hue, from pastel (high value, low saturation) to saturated."""
    u = torch.rand(n, 3, generator=gen)
    hue, saturation, value = u[:, :1], 0.1 + 0.8 * u[:, 1:2] ** 1.5, 0.55 + 0.45 * u[:, 2:]
    wheel = (hue * 6 + torch.tensor([[5.0, 3.0, 1.0]])) % 6
    return value * (1 - saturation * torch.minimum(wheel, 4 - wheel).clamp(0, 1))


def cubic(x: Tensor) -> Tensor:
    """The Catmull-Rom kernel."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def resampling(scale: Tensor, shift: Tensor, flip: Tensor, size: int) -> Tensor:
    """Antialiased cubic weights [B,size,size] from source to output pixels, for scale, shift (in pixels), mirror [B].

    Scaling and shifting are separable: two small matrix products are ten times faster than a bicubic grid lookup.
    """
    margin = size // 2  # weights sum to one over a lattice that every output pixel lies on; outside all is transparent
    centre = (size - 1) / 2
    out = torch.arange(size) - centre
    source = (torch.where(flip, -1.0, 1.0)[:, None] * (out - shift[:, None])) / scale[:, None] + centre
    lattice = torch.arange(-margin, size + margin)
    weights = cubic((source[:, :, None] - lattice) * scale[:, None, None])
    return (weights / weights.sum(2, keepdim=True))[:, :, margin:-margin]


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
    out = rows[:, None] @ pictures @ columns[:, None].transpose(2, 3)
    alpha = out[:, 3:].clamp(0, 1)  # the kernel overshoots at edges
    return torch.cat([torch.minimum(out[:, :3].clamp(min=0), alpha), alpha], 1)


def composite(premultiplied: Tensor, ground: Tensor) -> Tensor:
    """Premultiplied RGBA [B,4,H,W] over colours [B,3] -> pictures [B,3,H,W] in [-1,1]."""
    over = premultiplied[:, :3] + (1 - premultiplied[:, 3:]) * ground[:, :, None, None]
    return over * 2 - 1


class FluentData:
    """Pictures, names, groups and keywords, and random draws of (picture on a ground, caption)."""

    def __init__(self, size: int = 32, folder: Path = FOLDER) -> None:
        rows = captions_file()["pictures"]
        self.size = size
        self.names: list[str] = [r["name"] for r in rows]
        self.groups: list[str] = [r["group"] for r in rows]
        self.keywords: list[list[str]] = [r["keywords"] for r in rows]
        self.group_captions = [group_caption(r["name"], r["group"], r["keywords"]) for r in rows]
        self.mirror = torch.tensor([mirrorable(r["name"], r["group"], r["keywords"]) for r in rows])
        self.index = {name: i for i, name in enumerate(self.names)}
        self.eval_names = EVAL_NAMES
        self.known = frozenset(self.texts())
        self.rgba = load_sheet(size, folder)
        pixels = self.rgba.float() / 255
        self.premultiplied = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)

    def __len__(self) -> int:
        return len(self.names)

    def texts(self) -> list[str]:
        """Every caption that `batch` can give, each once (for caches of text states)."""
        coarse = [k for keywords in self.keywords for k in keywords]
        return list(dict.fromkeys([*self.names, *self.group_captions, *coarse]))

    def caption(self, indices: Tensor, gen: torch.Generator, captions: Captions) -> list[str]:
        """Names; with "mixed", a third at the level of the group (half of these) or of a keyword."""
        u = torch.rand(len(indices), 2, generator=gen).tolist()
        out = []
        for i, (level, which) in zip(indices.tolist(), u, strict=True):
            words = self.keywords[i]
            if captions == "name" or level >= COARSE:
                out.append(self.names[i])
            elif level < COARSE / 2 or not words:
                out.append(self.group_captions[i])
            else:
                out.append(words[int(which * len(words))])
        return out

    def batch(
        self, which: int | Tensor, gen: torch.Generator, captions: Captions = "mixed", vary: float = 1.0
    ) -> tuple[Tensor, list[str], Tensor]:
        """Draws pictures (a number: uniform; or given indices [B]) -> x [B,3,H,W] in [-1,1], captions, indices [B]."""
        indices = torch.randint(len(self), (which,), generator=gen) if isinstance(which, int) else which
        texts = self.caption(indices, gen, captions)
        pictures = placed(self.premultiplied[indices], self.mirror[indices], gen, vary)
        return composite(pictures, grounds(len(indices), gen)), texts, indices

    def prompts(self, n: int, gen: torch.Generator, captions: Captions = "mixed") -> list[str]:
        """n captions of uniformly drawn pictures, without the pictures."""
        return self.caption(torch.randint(len(self), (n,), generator=gen), gen, captions)

    def reference(self, n: int, gen: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
        """n pictures under their full names, spread as evenly as n allows over all names (for evaluation)."""
        rounds = [torch.randperm(len(self), generator=gen) for _ in range(-(-n // len(self)))]
        return self.batch(torch.cat(rounds)[:n], gen, "name")

    def knows(self, prompt: str) -> bool:
        """Whether the prompt is among the captions of the set."""
        return prompt in self.known

    def nearest(self, prompt: str, k: int = 3) -> list[str]:
        """The k names nearest to a prompt by shared words, then by spelling (for did-you-mean)."""
        wanted = prompt.lower()
        words = set(re.findall(r"\w+", wanted))

        def score(i: int) -> float:
            name = self.names[i].lower()
            own = set(re.findall(r"\w+", name))
            shared = len(words & own) / max(len(words | own), 1) + 0.5 * (len(words & set(self.keywords[i])) > 0)
            return shared + difflib.SequenceMatcher(None, wanted, name).ratio()

        return [self.names[i] for i in sorted(range(len(self)), key=score, reverse=True)[:k]]
