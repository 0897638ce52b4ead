"""HED as a frozen edge detector: [B,3,H,W] pictures in [-1,1] to edges [B,1,H,W] in [0,1], and the reward on them.

Xie & Tu 2015 (Holistically-Nested Edge Detection). Weights: assets/hed, a retraining of that paper's recipe from an
ImageNet VGG16 with padding "same", so that nothing is cropped as in the first release.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.image.config import Edges

ASSET = Path(__file__).parent / "assets" / "hed"
CHANNELS = (64, 128, 256, 512, 512)  # of the five blocks of VGG16 and of their taps
CONVS = (2, 2, 3, 3, 3)  # 3x3 convolutions a block
MEAN_BGR = (104.00699, 116.66877, 122.67892)  # on values 0 to 255, as Caffe's VGG16 expects them


class Hed(nn.Module):
    """The five blocks of VGG16, one logit map from the end of each, and a weighted sum of the five; frozen."""

    mean: Tensor

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        inputs = (3, *CHANNELS[:-1])
        rows = zip(inputs, CHANNELS, CONVS, strict=True)
        self.blocks = nn.ModuleList(nn.ModuleList(_convs(i, o, n)) for i, o, n in rows)
        self.sides = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in CHANNELS)
        self.fuse = nn.Conv2d(len(CHANNELS), 1, 1)
        self.register_buffer("mean", torch.tensor(MEAN_BGR).view(1, 3, 1, 1), persistent=False)
        weights = load_file(ASSET / "model.safetensors")
        self.load_state_dict({name: value.float() for name, value in weights.items()})
        self.requires_grad_(False).eval().to(device)

    def forward(self, x: Tensor) -> Tensor:
        """[B,3,H,W] in [-1,1] -> edge probabilities [B,1,H,W]; differentiable in x."""
        return self.logits(x)[:, -1:].sigmoid()

    def logits(self, x: Tensor) -> Tensor:
        """[B,3,H,W] in [-1,1] -> [B,6,H,W]: the five side outputs, fine to coarse, and their weighted sum."""
        maps = [side(tap) for side, tap in zip(self.sides, self.taps(x), strict=True)]
        sides = torch.cat([F.interpolate(m, x.shape[-2:], mode="bilinear", align_corners=False) for m in maps], 1)
        return torch.cat([sides, self.fuse(sides)], 1)

    def taps(self, x: Tensor) -> list[Tensor]:
        """[B,3,H,W] in [-1,1] -> the ends of the five blocks after their ReLU, [B,C,H/2^i,W/2^i], sides rounded up."""
        h, taps = x.flip(1) * 127.5 + 127.5 - self.mean, []
        for i, block in enumerate(self.blocks):
            h = F.max_pool2d(h, 2, ceil_mode=True) if i else h
            for conv in block.children():
                h = F.relu(conv(h))
            taps.append(h)
        return taps


def _convs(inputs: int, outputs: int, count: int) -> list[nn.Conv2d]:
    return [nn.Conv2d(outputs if i else inputs, outputs, 3, padding=1) for i in range(count)]


def edges(config: Edges, build: Build) -> Reward:
    """Minus the distance between the edges of x and those of cond["image"], or cond["edges"]: 0 is the best.

    ControlNet++ (Li et al. 2024) takes the mean squared distance as its consistency reward.
    """
    net = Hed(build.device)
    distance = {"squared": squared, "overlap": overlap}[config.distance]

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        factor = max(1.0, config.least / min(x.shape[-2:]))
        x = resized(x.float(), [round(side * factor) for side in x.shape[-2:]], -1.0)
        return -distance(net(x), wanted(net, cond, x))

    return Reward(score, "edges", "pixels", differentiable=True, chunk=config.chunk)


@torch.no_grad()
def wanted(net: Hed, cond: Condition, like: Tensor) -> Tensor:
    """The edges [B,1,H,W] that the condition asks for, at the height and width of `like`."""
    if "edges" in cond:
        return resized(rows(cond["edges"], 1, "edges").to(like), like.shape[-2:], 0.0)
    if "image" not in cond:
        text = 'needs the condition "image" [B,3,H,W] in [-1,1], or "edges" [B,1,H,W] in [0,1]; or use another reward'
        raise BadInput(f"image.edges {text}")
    edges: Tensor = net(resized(rows(cond["image"], 3, "image").to(like), like.shape[-2:], -1.0))
    return edges


def rows(value: Any, channels: int, key: str) -> Tensor:
    """A tensor [B,C,H,W], or a list of B tensors [C,H,W], as a tensor."""
    found = value if isinstance(value, Tensor) else torch.stack(list(value))
    if found.ndim != 4 or found.shape[1] != channels:
        raise BadInput(f'the condition "{key}" must be [B,{channels},H,W], not {list(found.shape)}')
    return found


def resized(x: Tensor, shape: Sequence[int], low: float) -> Tensor:
    """Antialiased bicubic resize to this height and width, values cut to [low, 1]."""
    same = tuple(x.shape[-2:]) == tuple(shape)
    return (x if same else F.interpolate(x, list(shape), mode="bicubic", antialias=True)).clamp(low, 1)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of maps [B,1,H,W]: [B]."""
    return (a - b).square().flatten(1).mean(1)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """1 - 2 sum(ab) / sum(a^2 + b^2) of maps [B,1,H,W], a soft F-score that few edges do not make small: [B]."""
    both, either = (a * b).flatten(1).sum(1), (a.square() + b.square()).flatten(1).sum(1)
    return 1 - (2 * both + 1e-6) / (either + 1e-6)
