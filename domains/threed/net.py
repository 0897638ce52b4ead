"""The small text- and camera-conditioned U-Net that knows the embedded objects.

Pixels enter as 2x2 blocks (12x16x16). The condition acts twice: it scales and shifts every block's features (FiLM), and
a linear layer writes it as maps at all three resolutions, since a picture from almost pure noise is made of the
condition alone. Legend: B batch, H and W pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT = 384  # numbers of a sentence
TURNS = 5  # multiples of azimuth and elevation
WAVES = 16  # frequencies of time
FACTOR = 2
MAPS = (4, 12, 64)  # channels that the condition writes at 16x16, 8x8 and 4x4


def turns(camera: Tensor) -> Tensor:
    """sin and cos of 1 to 5 times azimuth and elevation [B,20] of camera rows [B,15]."""
    x, y, z = camera[:, 3], camera[:, 7], camera[:, 11]
    angles = torch.stack([torch.atan2(y, x), torch.atan2(z, torch.hypot(x, y))], 1)
    many = angles[..., None] * torch.arange(1, TURNS + 1, device=camera.device)
    return torch.cat([many.sin(), many.cos()], 2).flatten(1)


def waves(time: Tensor) -> Tensor:
    """Features [B,32] of t [B] in [0,1]."""
    rate = torch.exp(torch.linspace(0.0, math.log(1000.0), WAVES, device=time.device))
    angle = time[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)


class Block(nn.Module):
    """Two convolutions, the first followed by FiLM of the condition [B,D], around a shortcut."""

    def __init__(self, inside: int, outside: int, cond: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inside), nn.GroupNorm(4, outside)
        self.conv1, self.conv2 = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        self.film = nn.Linear(cond, 2 * outside)
        self.shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """[B,inside,h,w] -> [B,outside,h,w]."""
        scale, shift = self.film(cond)[..., None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        out: Tensor = self.shortcut(x) + h
        return out


class ViewNet(nn.Module):
    """v [B,3,H,W] of a view x [B,3,H,W] of an object at time t; H and W are multiples of 8.

    `meta` describes the net for its files.
    """

    meta: dict[str, Any]

    def __init__(self, size: int = 32, widths: tuple[int, int, int] = (48, 96, 96), hidden: int = 192) -> None:
        super().__init__()
        self.size = size
        fine, middle, coarse = widths
        self.unseen = nn.Parameter(torch.zeros(4 * TURNS))  # stands for the camera where none is given
        self.text = nn.Linear(TEXT, hidden)
        self.place = nn.Linear(4 * TURNS + 2 * WAVES, hidden)
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        side = size // FACTOR
        self.shapes = [(channels, side >> level, side >> level) for level, channels in enumerate(MAPS)]
        self.maps = nn.ModuleList(nn.Linear(hidden, math.prod(shape)) for shape in self.shapes)
        pixels = 3 * FACTOR**2
        self.enter = nn.Conv2d(pixels + MAPS[0], fine, 3, padding=1)
        self.down1 = Block(fine, fine, hidden)
        self.down2 = Block(fine + MAPS[1], middle, hidden)
        self.down3 = Block(middle + MAPS[2], coarse, hidden)
        self.bottom = Block(coarse, coarse, hidden)
        self.up2 = Block(coarse + middle, middle, hidden)
        self.up1 = Block(middle + fine, fine, hidden)
        self.last = Block(fine, fine, hidden)
        self.leave = nn.Sequential(nn.GroupNorm(4, fine), nn.SiLU(), nn.Conv2d(fine, pixels, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, text: Tensor, camera: Tensor | None = None) -> Tensor:
        """text [B,384]; camera rows [B,15], those of zeros (or None) being unknown."""
        cond = self.condition(time, text, camera)
        maps = [layer(cond).view(-1, *shape) for layer, shape in zip(self.maps, self.shapes, strict=True)]
        one = self.down1(self.enter(torch.cat([F.pixel_unshuffle(x, FACTOR), maps[0]], 1)), cond)
        two = self.down2(torch.cat([F.avg_pool2d(one, 2), maps[1]], 1), cond)
        low = self.bottom(self.down3(torch.cat([F.avg_pool2d(two, 2), maps[2]], 1), cond), cond)
        mid = self.up2(torch.cat([twice(low), two], 1), cond)
        top = self.last(self.up1(torch.cat([twice(mid), one], 1), cond), cond)
        return F.pixel_shuffle(self.leave(top), FACTOR)

    def condition(self, time: Tensor, text: Tensor, camera: Tensor | None) -> Tensor:
        """What FiLM and the maps are made of [B,hidden]."""
        where = self.unseen.expand(len(text), -1)
        if camera is not None:
            where = torch.where(camera[:, 12:13] > 0, turns(camera.float()).to(where), where)
        scaled = text.to(where) * math.sqrt(TEXT)  # unit vectors: entries of mean square one
        both = torch.cat([where, waves(time.float()).to(where)], 1)
        out: Tensor = self.mix(self.text(scaled) + self.place(both))
        return out


def twice(x: Tensor) -> Tensor:
    """Nearest upsampling by 2 [B,C,2h,2w], by copying: its gradient is a sum in a fixed order."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
