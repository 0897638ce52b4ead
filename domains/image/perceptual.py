"""LPIPS's heads on the VGG16 of the edge detector: how different two pictures look.

Zhang et al. 2018 (The Unreasonable Effectiveness of Deep Features as a Perceptual Metric). Weights: assets/lpips, the
authors' heads for VGG16 (version 0.1). Deviation: the VGG16 is HED's, fine-tuned to edges from the ImageNet weights, so
that distances are ordered like LPIPS's but not its numbers: they are named by their backbone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.image.config import Perceptual
from limbeck.domains.image.hed import Hed, resized, rows

ASSET = Path(__file__).parent / "assets" / "lpips"
FILE = "heads.safetensors"


class Heads(nn.Module):
    """A frozen VGG16 and a non-negative weight for each channel of the ends of its five blocks."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.net = Hed()
        found = load_file(ASSET / FILE)
        self.weights = nn.ParameterList(found[name] for name in sorted(found))
        self.requires_grad_(False).to(device)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [B] of pictures [B,3,H,W] in [-1,1]; differentiable in both.

        Eq. 1: at each place, features of unit length are compared channel by channel; the mean over places, the sum
        over blocks.
        """
        pairs = zip(self.net.taps(a), self.net.taps(b), self.weights, strict=True)
        each = [torch.einsum("bchw,c->bhw", (unit(x) - unit(y)).square(), w).mean((1, 2)) for x, y, w in pairs]
        return torch.stack(each).sum(0)


def unit(x: Tensor) -> Tensor:
    """Features [B,C,H,W] of length one over C."""
    return F.normalize(x, dim=1, eps=1e-10)


def reward(config: Perceptual, build: Build) -> Reward:
    """Minus the distance between x and cond["image"]: 0 is the best."""
    net = Heads(build.device)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        if "image" not in cond:
            raise BadInput('image.perceptual needs the condition "image" [B,3,H,W] in [-1,1]; or use another reward')
        factor = max(1.0, config.least / min(x.shape[-2:]))
        shape = [round(side * factor) for side in x.shape[-2:]]
        a, b = (resized(one.float().to(build.device), shape, -1.0) for one in (x, rows(cond["image"], 3, "image")))
        distance: Tensor = net(a, b)
        return -distance.to(x.device)

    return Reward(score, "LPIPS (HED VGG16)", "pixels", differentiable=True, chunk=config.chunk)
