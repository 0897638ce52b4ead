"""Density and colour at points: voxels, three planes, and a multi-resolution hash grid.

Everything learned is read by `index_select` along a table's last axis and weighted by plain products, so that gradients
are the same bits at every run and can be differentiated again (normals need that; grid_sample has no second
derivative). Legend: N points, C channels, F features, S grid points along an axis, d axes, M entries of a table.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.scheduled import Scheduled, at
from limbeck.domains.threed import config as settings

PRIMES = (1, 2654435761, 805459861)  # of the spatial hash, Instant NGP equation 4
RGB = 3  # channels: these are squashed to [-1, 1], latent ones are not


class Body(Protocol):
    """A module that answers for points inside the box [-radius, radius]^3; outside it goes on as at the border."""

    channels: int
    radius: float

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] >= 0 a scene unit and colour [N,C] at points [N,3]."""

    def density(self, points: Tensor) -> Tensor:
        """The density alone."""

    def grids(self) -> list[Tensor]:
        """What total variation may smooth: [F,S,S] or [F,S,S,S] each."""


def corners(place: Tensor, size: int, mask: int | None = None) -> tuple[Tensor, Tensor]:
    """Entries and weights [2^d,N] of the grid points around places [d,N], which are in cells from 0 to size - 1.

    Entries count row by row; with a mask (2^k - 1) they are hashed to 0..mask.
    """
    low = place.detach().floor().clamp(0, size - 2)
    part = place - low
    weights = torch.stack([1 - part, part])
    factors = PRIMES if mask is not None else (1, size, size * size)[: len(place)][::-1]
    codes = torch.stack([low, low + 1]).long() * torch.tensor(factors[: len(place)], device=place.device)[:, None]
    entry, weight = codes[:, 0], weights[:, 0]
    for axis in range(1, len(place)):
        other = codes[:, axis]
        entry = (entry[:, None] + other if mask is None else entry[:, None] ^ other).flatten(0, 1)
        weight = (weight[:, None] * weights[:, axis]).flatten(0, 1)
    return entry if mask is None else entry & mask, weight


def lookup(table: Tensor, entry: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums [F,N] of entries [K,N] of a table [F,M]."""
    rows = table.index_select(1, entry.reshape(-1)).view(len(table), *entry.shape)
    return (rows * weight).sum(1)


def cells(points: Tensor, radius: float, size: int) -> Tensor:
    """Points [N,3] as places [3,N] in cells of a grid of `size` points along each side of the box."""
    return ((points.T / radius + 1) * (0.5 * (size - 1))).clamp(0, size - 1)


def blob(points: Tensor, config: settings.Blob) -> Tensor:
    """What is added to the raw density [N]: Magic3D's cone, height (1 - |p| / reach), so that something is there."""
    away = points.square().sum(1).clamp_min(1e-12).sqrt()  # a norm has no second derivative at the origin
    return config.height * (1 - away / config.reach)


def squashed(colour: Tensor, channels: int) -> Tensor:
    """Raw colours [N,C] as the teacher has them: RGB in [-1, 1], latent channels as they are."""
    return torch.tanh(colour / 2) if channels == RGB else colour  # 2 sigmoid(c) - 1


class Voxels(nn.Module):
    """Raw density and colour on a dense grid, trilinear between its points; density = sharp * softplus(raw + blob)."""

    def __init__(self, config: settings.Voxels, channels: int, radius: float) -> None:
        super().__init__()
        self.config, self.channels, self.radius = config, channels, radius
        self.raw = nn.Parameter(torch.zeros(1, *3 * (config.size,)))  # axes x, y, z
        self.colour = nn.Parameter(torch.zeros(channels, *3 * (config.size,)))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] and colour [N,C] at points [N,3]."""
        found = corners(cells(points, self.radius, self.config.size), self.config.size)
        colour = lookup(self.colour.flatten(1), *found).T
        return self.opened(points, *found), squashed(colour, self.channels)

    def density(self, points: Tensor) -> Tensor:
        """Density [N] at points [N,3]."""
        return self.opened(points, *corners(cells(points, self.radius, self.config.size), self.config.size))

    def opened(self, points: Tensor, entry: Tensor, weight: Tensor) -> Tensor:
        """Density [N] from the corners around points."""
        raw = lookup(self.raw.flatten(1), entry, weight)[0]
        return self.config.sharp * F.softplus(raw + blob(points, self.config))

    def grids(self) -> list[Tensor]:
        """Raw density and colour."""
        return [self.raw, self.colour]


class Head(nn.Module):
    """A small net from features to density and colour; it starts as the blob in grey."""

    def __init__(self, features: int, config: settings.Netted, channels: int) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        self.net = nn.Sequential(nn.Linear(features, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1 + channels))

    def forward(self, features: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] and colour [N,C] from features [F,N]."""
        raw = self.net(features.T)
        density = self.config.sharp * F.softplus(raw[:, 0] + blob(points, self.config))
        return density, squashed(raw[:, 1:], self.channels)


def planar(planes: Tensor, points: Tensor, radius: float) -> list[Tensor]:
    """Features [F,N] that points [N,3] have on each of the planes xy, xz and yz [3,F,S,S]."""
    place, size = cells(points, radius, planes.shape[-1]), planes.shape[-1]
    pairs = (place[:2], place[::2], place[1:])
    return [lookup(plane.flatten(1), *corners(pair, size)) for plane, pair in zip(planes, pairs, strict=True)]


class Triplane(nn.Module):
    """Features on the planes xy, xz and yz, bilinear, summed or side by side, then a small net (EG3D, section 4.1)."""

    def __init__(self, config: settings.Triplane, channels: int, radius: float) -> None:
        super().__init__()
        self.config, self.channels, self.radius = config, channels, radius
        shape = (3, config.features, config.size, config.size)
        self.planes = nn.Parameter(nn.init.normal_(torch.empty(shape), std=0.1))
        joined = config.features * (3 if config.join == "concat" else 1)
        self.head = Head(joined, config, channels)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] and colour [N,C] at points [N,3]."""
        found = planar(self.planes, points, self.radius)
        features = torch.cat(found) if self.config.join == "concat" else found[0] + found[1] + found[2]
        density, colour = self.head(features, points)
        return density, colour

    def density(self, points: Tensor) -> Tensor:
        """Density [N] at points [N,3]."""
        return self(points)[0]  # type: ignore[no-any-return]

    def grids(self) -> list[Tensor]:
        """The planes."""
        return list(self.planes)


class HashGrid(nn.Module):
    """Instant NGP (Mueller et al. 2022, section 3) in plain torch: levels of growing resolution, then a small net.

    A level whose grid fits into the table is dense; finer ones are hashed. Levels that are not yet active give zeros
    and cost nothing (coarse to fine). Deviation: one resolution b^l * base is rounded, as the paper's floor of a float
    power loses a cell at exact powers on some machines.
    """

    def __init__(self, config: settings.HashGrid, channels: int, radius: float) -> None:
        super().__init__()
        self.config, self.channels, self.radius = config, channels, radius
        self.sizes = resolutions(config)
        self.active = config.levels
        most = 2**config.entries
        tables = [torch.empty(config.features, min(size**3, most)) for size in self.sizes]
        self.tables = nn.ParameterList(nn.Parameter(nn.init.uniform_(table, -1e-4, 1e-4)) for table in tables)
        self.head = Head(config.levels * config.features, config, channels)

    def at(self, step: int) -> None:
        """As many levels as the schedule `active` has at this step; all where it says nothing."""
        levels: Scheduled = self.config.levels if self.config.active is None else self.config.active
        self.active = max(1, min(self.config.levels, int(at(levels, step))))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] and colour [N,C] at points [N,3]."""
        levels = list(zip(self.tables, self.sizes, strict=True))[: self.active]
        found = [self.level(table, size, points) for table, size in levels]
        later = (self.config.levels - self.active) * self.config.features
        density, colour = self.head(torch.cat([*found, points.new_zeros(later, len(points))]), points)
        return density, colour

    def level(self, table: Tensor, size: int, points: Tensor) -> Tensor:
        """Features [F,N] of one level."""
        mask = None if size**3 <= table.shape[1] else table.shape[1] - 1
        return lookup(table, *corners(cells(points, self.radius, size), size, mask))

    def density(self, points: Tensor) -> Tensor:
        """Density [N] at points [N,3]."""
        return self(points)[0]  # type: ignore[no-any-return]

    def grids(self) -> list[Tensor]:
        """None: neighbours in a table are no neighbours in space."""
        return []


def resolutions(config: settings.HashGrid) -> list[int]:
    """Grid points along a side of each level: cells grow from `base` to `finest` by one factor a level."""
    growth = (config.finest / config.base) ** (1 / max(1, config.levels - 1))
    return [round(config.base * growth**level) + 1 for level in range(config.levels)]


def build(config: settings.FieldConfig, channels: int, radius: float) -> Body:
    """The field of these settings, its nets drawn from torch's generator as the factories of pieces have it."""
    kinds = {"voxels": Voxels, "triplane": Triplane, "hashgrid": HashGrid}
    return kinds[config.kind](config, channels, radius)  # type: ignore[no-any-return]
