"""What a motion consistency loss compares: maps m of clips that keep motion and drop (some of) the appearance.

Zhai et al. 2024, "Motion Consistency Model" (arXiv 2406.06890), section 3.2; defaults of its code. Their targets are
compared element by element, so that a constant factor or a constant element changes the loss's scale alone.
Legend: B clips, C channels, F frames, H and W pixels (of the latents, where the teacher has any), P = H W.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.diffusion.process import working_dtype
from limbeck.core.run.errors import BadInput
from limbeck.domains.video import config as settings
from limbeck.domains.video.metrics import frames

Map = Callable[[Tensor], Tensor]
GROUPS = 32


def clips(pictures: Tensor, batch: int) -> Tensor:
    """Pictures [B*F,C,H,W] as clips [B,C,F,H,W]: the inverse of `frames`."""
    return pictures.view(batch, -1, *pictures.shape[1:]).transpose(1, 2)


def raw(x: Tensor) -> Tensor:
    """The clips [B,C,F,H,W] themselves: plain consistency."""
    return x


def diff(x: Tensor) -> Tensor:
    """Differences of neighbouring frames [B,C,F-1,H,W]; blind to whatever all frames share."""
    return x.diff(dim=2)


def radius2(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Squared distance from the constant component on a grid of three frequencies, 1 at the highest one of an axis.

    In the order of the FFT. Of an even size it is (2f/F - 1)^2 + (2h/H - 1)^2 + (2w/W - 1)^2 of the shifted spectrum
    (the paper's code); of an odd size those miss the centre by 1/F, these do not.
    """
    axes = [(2 * torch.fft.fftfreq(n, device=device)).square() for n in shape]
    total: Tensor = axes[0][:, None, None] + axes[1][:, None] + axes[2]
    return total


def low(x: Tensor, cutoff: float, order: int) -> Tensor:
    """The part of slow change in time and space [B,C,F,H,W]: Butterworth 1/(1 + (d^2/cutoff^2)^order) on the FFT."""
    mask = 1 / (1 + (radius2(tuple(x.shape[2:]), x.device) / cutoff**2) ** order)
    value = x.to(working_dtype(x))  # half precision has no FFT of every size
    slow: Tensor = torch.fft.ifftn(torch.fft.fftn(value, dim=(2, 3, 4)) * mask, dim=(2, 3, 4)).real
    return slow.to(x.dtype)


def high(x: Tensor, cutoff: float, order: int) -> Tensor:
    """What `low` leaves out [B,C,F,H,W]."""
    return x - low(x, cutoff, order)


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every frame but the last, and the one after it, both [B*(F-1),C,H,W]."""
    return frames(x[:, :, :-1]), frames(x[:, :, 1:])


def gcor(x: Tensor) -> Tensor:
    """<x_p, x_q>/sqrt(C) of every pixel p with every q of the next frame [B,F-1,P,P]: F P^2 numbers, so for latents."""
    here, there = (part.flatten(2) for part in neighbours(x))
    found: Tensor = here.mT @ there / x.shape[1] ** 0.5
    return found.view(len(x), -1, *found.shape[1:])


def sgcor(x: Tensor) -> Tensor:
    """`gcor` times sqrt(H) [B,F-1,P,P]."""
    found: Tensor = gcor(x) * x.shape[3] ** 0.5
    return found


def lcor(x: Tensor, radius: int) -> Tensor:
    """`gcor` of each pixel with the window of 2 radius + 1 around it in the next frame [B,F-1,N,P], N window places.

    Places outside the frame are 0 on both sides of the loss; the paper's code has -1e9 on both.
    """
    here, there = neighbours(x)
    window = F.unfold(there, 2 * radius + 1, padding=radius).view(len(here), x.shape[1], -1, x.shape[3] * x.shape[4])
    found: Tensor = (here.flatten(2)[:, :, None] * window).sum(1) / x.shape[1] ** 0.5
    return found.view(len(x), -1, *found.shape[1:])


class Learned(nn.Module):
    """x + Conv(SiLU(GroupNorm(Conv(SiLU(x))))), 1x1 and frame by frame, the last one 0 at first: then it is raw.

    Without x beside the branch a loss on its output alone is least where it says nothing.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(channels, width, 1), nn.GroupNorm(GROUPS, width)
        self.outer = nn.Conv2d(width, channels, 1)
        for parameter in self.outer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Clips [B,C,F,H,W] -> [B,C,F,H,W]."""
        picture = frames(x)
        branch: Tensor = self.outer(F.silu(self.norm(self.inner(F.silu(picture)))))
        return clips(picture + branch, len(x))


PLAIN: dict[str, Map] = {"raw": raw, "diff": diff, "gcor": gcor, "sgcor": sgcor}


def build(config: settings.MotionMap, shape: tuple[int, ...]) -> Map | Learned:
    """The map of these settings for samples of this shape [C,F,H,W]; `learn` has weights, on the CPU.

    BadInput where the samples are no clips of two frames or more.
    """
    if len(shape) != 4 or shape[1] < 2:
        raise BadInput(f"motion needs clips of two frames or more; the teacher's samples have shape {list(shape)}")
    if isinstance(config, settings.LearnedMap):
        return Learned(shape[0], config.width)
    if isinstance(config, settings.FrequencyMap):
        return partial(low if config.kind == "freql" else high, cutoff=config.cutoff, order=config.order)
    return partial(lcor, radius=config.radius) if isinstance(config, settings.LocalMap) else PLAIN[config.kind]
