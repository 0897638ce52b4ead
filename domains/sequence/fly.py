"""The embedded fly regions: 2000 bases upstream of every transcription start of five chromosome arms.

The arms are shared out once (`SPLIT`): no oracle sees the arm that another one learned from, and none saw X.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

ASSET = Path(__file__).parent / "assets" / "fly-upstream"
FILE = "regions.safetensors"
ARMS = ("chr2L", "chr2R", "chr3L", "chr3R", "chrX")
LENGTH = 2000  # bases a region; the last one is next to the transcription start
WINDOW = 200
Role = Literal["generator", "oracle-a", "oracle-b", "test"]

# who learns from which arm; X is everybody's test and where natural sequences are compared with
SPLIT: dict[Role, tuple[str, ...]] = {
    "generator": ("chr2L", "chr2R", "chr3L", "chr3R"),
    "oracle-a": ("chr2L", "chr3R"),
    "oracle-b": ("chr2R", "chr3L"),
    "test": ("chrX",),
}


@dataclass(frozen=True)
class Regions:
    """Bases [N,2000] uint8 in transcript direction, the arm's number, the first base on the chromosome, the strand."""

    bases: Tensor
    arm: Tensor
    start: Tensor
    reverse: Tensor

    def of(self, role: Role) -> Regions:
        """The regions of the arms that this role learns from or is tested on."""
        wanted = torch.tensor([ARMS.index(arm) for arm in SPLIT[role]])
        return self.pick(torch.isin(self.arm, wanted))

    def pick(self, index: Tensor) -> Regions:
        """Some rows."""
        return Regions(self.bases[index], self.arm[index], self.start[index], self.reverse[index])


@cache
def regions() -> Regions:
    """All regions, unpacked."""
    found = load_file(ASSET / FILE)
    packed = found["bases"]
    four = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    return Regions(four.flatten(1), found["arm"], found["start"], found["reverse"])


def windows(role: Role) -> Tensor:
    """Every tile of 200 bases of a role's regions, each once, ids [M,200] uint8."""
    tiles = regions().of(role).bases.reshape(-1, WINDOW)
    found: Tensor = torch.unique(tiles, dim=0)
    return found


def interval(found: Regions, low: int, high: int) -> Tensor:
    """Where bases low:high of each region lie on the chromosome, as (first, last + 1) [N,2]."""
    forward = torch.stack([found.start + low, found.start + high], 1)
    backward = torch.stack([found.start + LENGTH - high, found.start + LENGTH - low], 1)
    return torch.where(found.reverse[:, None] > 0, backward, forward)


def labelled(role: Role) -> tuple[Tensor, Tensor]:
    """Start-proximal windows (label 1: the last 200 bases) and distal ones (0: bases 200 to 400): ids [M,200], [M].

    Distal windows that overlap any transcript's proximal window are left out.
    """
    found = regions().of(role)
    near, far = found.bases[:, -WINDOW:], found.bases[:, WINDOW : 2 * WINDOW]
    clear = ~overlapping(found)
    ids = torch.cat([near, far[clear]])
    labels = torch.cat([torch.ones(len(near)), torch.zeros(int(clear.sum()))])
    return ids, labels


def overlapping(found: Regions) -> Tensor:
    """Whether each region's distal window touches a proximal window of the same arm, [N] bool."""
    near, far = interval(found, LENGTH - WINDOW, LENGTH), interval(found, WINDOW, 2 * WINDOW)
    out = torch.zeros(len(far), dtype=torch.bool)
    for arm in range(len(ARMS)):
        here = found.arm == arm
        first = near[here, 0].sort().values  # windows have one length: the next start tells of any overlap
        place = torch.searchsorted(first, far[here, 0] - WINDOW, right=True).clamp(max=len(first) - 1)
        out[here] = (first[place] < far[here, 1]) & (first[place] > far[here, 0] - WINDOW)
    return out
