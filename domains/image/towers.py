"""Image towers: pictures and captions as vectors of one space, whose cosine says how well they fit; the reward on it.

Radford et al. 2021 (CLIP). Deviations: the text side is frozen MiniLM, centred and whitened; of the picture's side only
a linear head on the features of a frozen net is trained. Legend: B pictures, N captions, D features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.lite0 import Lite0, resize
from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.text import WIDTH, sentences
from limbeck.domains.image.config import TextReward
from limbeck.domains.image.hed import Hed

FOLDERS = {"a": "reward-clip", "b": "reward-clip-b"}
FILE = "tower.safetensors"
FLOOR = 3.0  # added to each variance of the captions before whitening, in units of their mean
RARE = 0.3  # added to the deviation of features, in units of their mean: those that hardly ever fire stay small
CHUNK = 64  # pictures at a time


class Lite0Features(nn.Module):
    """Means of six depths of EfficientNet-lite0 and the maxima of the last: D = 3304, at 96 pixels a side."""

    side, width = 96, 3304
    depths = (4, 7, 10, 14, 15)  # the last block of five stages

    def __init__(self) -> None:
        super().__init__()
        self.net = Lite0(self.side)

    def forward(self, x: Tensor) -> Tensor:
        """[B,3,96,96] in [-1,1] -> [B,3304]; differentiable in x."""
        h, found = F.relu6(self.net.stem(x)), []
        for depth, block in enumerate(self.net.blocks):
            h = block(h)
            if depth in self.depths:
                found.append(h.mean((2, 3)))
        h = F.relu6(self.net.head(h))
        return torch.cat([*found, h.mean((2, 3)), h.amax((2, 3))], 1)


class HedFeatures(nn.Module):
    """Means of the last three blocks of the edge detector's VGG16 and maxima of two: D = 2304, at 48 pixels a side."""

    side, width = 48, 2304

    def __init__(self) -> None:
        super().__init__()
        self.net = Hed()

    def forward(self, x: Tensor) -> Tensor:
        """[B,3,48,48] in [-1,1] -> [B,2304]; differentiable in x."""
        third, fourth, fifth = self.net.taps(x)[2:]
        means = [h.mean((2, 3)) for h in (third, fourth, fifth)]
        return torch.cat([*means, *(h.amax((2, 3)) for h in (fourth, fifth))], 1)


TRUNKS: dict[str, type[Lite0Features] | type[HedFeatures]] = {"lite0": Lite0Features, "hed": HedFeatures}


class Tower(nn.Module):
    """A frozen trunk, its features standardised by fixed numbers, a linear head, and where captions lie."""

    mean: Tensor  # [D]
    rate: Tensor  # [D], one over the deviation
    origin: Tensor  # [384]
    whitening: Tensor  # [384,384]

    def __init__(self, trunk: str) -> None:
        super().__init__()
        self.name, self.trunk = trunk, TRUNKS[trunk]().requires_grad_(False)
        width = self.trunk.width
        self.head = nn.Linear(width, WIDTH)
        nn.init.zeros_(self.head.bias)
        nn.init.normal_(self.head.weight, std=1e-3)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("rate", torch.ones(width))
        self.register_buffer("origin", torch.zeros(WIDTH))
        self.register_buffer("whitening", torch.eye(WIDTH))

    def raw(self, x: Tensor) -> Tensor:
        """Pictures [B,3,H,W] in [-1,1] of any size -> the trunk's features [B,D]; values outside are cut off."""
        found: Tensor = self.trunk(resize(x.float().clamp(-1, 1), self.trunk.side))
        return found

    def features(self, x: Tensor) -> Tensor:
        """Standardised features [B,D]."""
        return (self.raw(x) - self.mean) * self.rate

    def embed(self, features: Tensor) -> Tensor:
        """Standardised features [B,D] -> unit vectors [B,384]."""
        return F.normalize(self.head(features), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [B,3,H,W] in [-1,1] -> unit vectors [B,384]; differentiable in x."""
        return self.embed(self.features(x))

    def captions(self, prompts: list[str]) -> Tensor:
        """Unit vectors [N,384] of captions."""
        found = sentences()(prompts)[0].to(self.origin.device)
        return F.normalize((found - self.origin) @ self.whitening, dim=-1)

    @torch.no_grad()
    def fit(self, pictures: Tensor, prompts: list[str]) -> None:
        """Takes the fixed numbers from pictures [B,3,H,W] and captions: standardised features, whitened sentences."""
        found = torch.cat([self.raw(part) for part in torch.split(pictures, CHUNK)])
        self.mean.copy_(found.mean(0))
        spread = found.std(0)
        self.rate.copy_(1 / (spread + RARE * spread.mean()))
        known = sentences()(prompts)[0].double()
        values, vectors = torch.linalg.eigh(torch.cov(known.T, correction=0))
        self.origin.copy_(known.mean(0))
        self.whitening.copy_(vectors * (values + FLOOR * values.mean()).rsqrt() @ vectors.T)


def save(tower: Tower, path: Path) -> None:
    """Writes everything but the trunk, the head in float16, the fixed numbers in float32."""
    kept = {name: value for name, value in tower.state_dict().items() if not name.startswith("trunk.")}
    halves = {n: v.half() if n.startswith("head.") else v for n, v in kept.items()}
    save_file({name: value.detach().cpu().contiguous() for name, value in halves.items()}, path, {"trunk": tower.name})


def load(path: Path) -> Tower:
    """What `save` wrote, frozen."""
    if not path.exists():
        raise BadInput(f"{path} is missing: export it from a run of image/reward-clip with --format tower")
    with safe_open(path, "pt") as file:
        tower = Tower((file.metadata() or {})["trunk"])
        found = {name: file.get_tensor(name).float() for name in file.keys()}
    tower.load_state_dict(found, strict=False)
    if missing := [n for n in tower.state_dict() if not n.startswith("trunk.") and n not in found]:
        raise BadInput(f"{path} lacks {missing[0]}; export it anew from a run of image/reward-clip")
    return tower.requires_grad_(False).eval()


def embedded(model: str) -> Tower:
    """The tower `a` (the one that is trained on) or `b` (another net and another seed: the held-out judge)."""
    return load(Path(__file__).parent / "assets" / FOLDERS[model] / FILE)


def text_reward(config: TextReward, build: Build) -> Reward:
    """Cosine of picture and caption cond["prompt"], within [-1, 1]; TextReward has the values of real pictures."""
    tower = embedded(config.model).to(build.device)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        fit: Tensor = (tower(x.to(build.device)) * tower.captions(list(cond["prompt"]))).sum(-1)
        return fit.to(x.device)

    return Reward(score, f"image.text {config.model}", "pixels", differentiable=True, chunk=CHUNK)
