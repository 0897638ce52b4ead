"""A scene's surface as a mesh: densities on a grid, marching cubes where views stop, and the debris swept away.

Legend: N points. Lengths in scene units. The grid is laid twice: over the scene's ball for the box of what is there,
then over that box and a tenth more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.run.errors import BadInput
from limbeck.domains.threed.cameras import Cameras, ring
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.scene import Scene, like, seen
from limbeck.domains.threed.shape import Mesh, decimated, load, smoothed

Array = np.ndarray
Facts = dict[str, float | int | bool | str]
POINTS = 2**17  # asked of a field at a time
COARSE = 48  # cells along the first grid
MARGIN = 0.1  # of the box, on all sides
CRUMB = 0.01  # of all faces: smaller components are debris
FAINT = 1e-6  # of the highest density: less is nothing
FULL = 0.5  # of the cube around the scene's ball, of which the ball itself is 0.52
LOOK = 48  # pixels along a side of the views that the level is taken from
SHEET = 0.06  # of the height: the thickest ground
WIDER = 2.0  # times the object above it: how far the ground reaches, at least


@torch.no_grad()
def ask(scene: Scene, points: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Density [n] and colour [n,C] of points [N,3], some at a time and back on the CPU."""
    for some in torch.split(points, POINTS):
        density, colour = scene.field(some.to(like(scene)))
        yield density.float().cpu(), colour.float().cpu()


def colours(scene: Scene, points: Array) -> Array:
    """Colour float32 [N,C] of the field at points [N,3]."""
    return torch.cat([colour for _, colour in ask(scene, torch.as_tensor(points, dtype=torch.float32))]).numpy()


def densities(scene: Scene, low: Array, step: float, counts: tuple[int, ...]) -> Array:
    """Density float32 [X,Y,Z] at low + step * (i, j, k); zero outside the scene's ball."""
    axes = [torch.as_tensor(a + step * np.arange(n), dtype=torch.float32) for a, n in zip(low, counts, strict=True)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    found = torch.cat([density for density, _ in ask(scene, points)])
    if not bool(torch.isfinite(found).all()):
        bad = int((~torch.isfinite(found)).sum())
        raise BadInput(f"the scene's density is NaN or infinite at {bad} of {len(found)} points: it broke in training; "
                       "export an earlier checkpoint")  # fmt: skip
    found[points.norm(dim=1) > scene.radius] = 0.0
    return found.view(counts).numpy()


def extract(scene: Scene, options: Files) -> tuple[Mesh, Facts]:
    """The cleaned mesh in scene units with few enough faces, and what `whole` found."""
    mesh, found = whole(scene, options)
    return decimated(mesh, options.faces, options.watertight), found


def whole(scene: Scene, options: Files) -> tuple[Mesh, Facts]:
    """The cleaned mesh with all its faces, and what was found: the level, the highest density, what was swept away.

    Raises BadInput where there is no surface, with the highest density and a level that would give one.
    """
    radius = float(scene.radius)
    step = 2 * radius / (COARSE - 1)
    coarse = Grid(densities(scene, np.full(3, -radius), step, (COARSE,) * 3), np.full(3, -radius), step)
    mask = Mask.of(scene) if options.level is None else None
    level = mask.level(coarse) if mask else options.level or 0.0
    check(coarse, level, FULL)
    low, high = coarse.box(level)
    edge = np.maximum(MARGIN * (high - low), step)
    low, high = low - edge, high + edge
    step = float((high - low).max()) / (options.resolution - 1)
    counts = tuple(int(n) for n in np.ceil((high - low) / step - 1e-6).astype(int) + 1)
    grid = Grid(densities(scene, low, step, counts), low, step)
    level = mask.level(grid) if mask else level
    check(grid, level, 1.0)
    sheet = 0 if options.ground else ground(grid.values > level)
    grid.values[:, :, :sheet] = 0.0
    mesh, crumbs = swept(marched(grid, level))
    found: Facts = {
        "level": level,
        "highest density": grid.highest,
        "components dropped": crumbs,
        "ground dropped": sheet > 0,
    }
    return smoothed(mesh, options.smooth), found


@dataclass(frozen=True)
class Grid:
    """Densities [X,Y,Z] at low + step * (i, j, k)."""

    values: Array
    low: Array
    step: float

    @property
    def highest(self) -> float:
        """The highest density."""
        return float(self.values.max())

    @property
    def log(self) -> Array:
        """Log densities float32, along which the edges of fields are straighter; all that is FAINT alike."""
        found: Array = np.log(np.maximum(self.values, max(FAINT * self.highest, 1e-30)))
        return found

    def box(self, level: float) -> tuple[Array, Array]:
        """The lowest and highest corner of what lies above a level, or above half the highest density."""
        filled = np.argwhere(self.values > min(level, self.highest / 2))
        if not len(filled):
            raise BadInput(f"the scene is empty: its highest density is {self.highest:.3g}; train it longer")
        return filled.min(0) * self.step + self.low, filled.max(0) * self.step + self.low

    def along(self, origin: Tensor, ray: Tensor, near: float, far: float) -> Tensor:
        """The highest density [N] that rays [N,3] meet between two distances, in steps of a cell."""
        count = math.ceil((far - near) / self.step)
        log = torch.as_tensor(self.log)[None, None]
        size = (torch.tensor(self.values.shape) - 1) * self.step
        found = log.min().expand(len(ray))
        for i in range(count):
            point = origin + ray * (near + (i + 0.5) * (far - near) / count)
            place = (point - torch.as_tensor(self.low, dtype=torch.float32)) / size * 2 - 1
            value = F.grid_sample(log, place.flip(-1)[None, None, None], align_corners=True)[0, 0, 0, 0]
            found = torch.maximum(found, torch.where((place.abs() <= 1).all(-1), value, log.min()))
        return found.exp()


@dataclass(frozen=True)
class Mask:
    """Where views are opaque [V*H*W], and the rays [V*H*W,3] through those pixels."""

    opaque: Tensor
    origin: Tensor
    ray: Tensor
    span: tuple[float, float]  # the distances between which the scene's ball lies
    highest: float  # alpha

    @classmethod
    def of(cls, scene: Scene) -> Mask:
        """From views all around."""
        radius = float(scene.radius)
        cameras = around(radius, LOOK)
        alpha = seen(scene, cameras).alpha.float()
        origin, ray = (x.reshape(-1, 3) for x in cameras.rays())
        return cls(alpha.flatten() > 0.5, origin, ray, (2 * radius, 4 * radius), float(alpha.max()))

    def level(self, grid: Grid) -> float:
        """The density above which the grid's outlines agree best with those of the views.

        The mean of all positive densities, as threestudio has it, or a depth's density give meshes that are thinner
        or thicker than the scene looks: a soft edge that a view grazes is opaque where density is low.
        """
        if not bool(self.opaque.any()):
            raise BadInput(
                f"the scene is empty: views are nowhere opaque (at most {self.highest:.2f}) and the highest density is "
                f"{grid.highest:.3g}; train it longer or set the level to {grid.highest / 2:.3g}"
            )
        density, order = grid.along(self.origin, self.ray, *self.span).sort(descending=True, stable=True)
        common = self.opaque[order].cumsum(0)
        union = self.opaque.sum() + torch.arange(1, len(order) + 1) - common
        best = int((common / union).argmax())
        here, below = density[best], density[min(best + 1, len(density) - 1)]
        return float((here * torch.maximum(below, here / 4)).sqrt())


def around(radius: float, size: int, offset: float = 0.0) -> Cameras:
    """Cameras that see the scene's ball whole: eight at elevation 0, eight at 30 between them."""
    low, high = (ring(8, size, e, 3 * radius, 40.0, offset + o) for e, o in ((0.0, 0.0), (30.0, 22.5)))
    return Cameras(torch.cat([low.pose, high.pose]), torch.cat([low.fov, high.fov]), size, size)


def check(grid: Grid, level: float, full: float) -> None:
    """Raises BadInput unless a surface runs through the grid at this level; at most `full` of its cells exceed it."""
    advice = f"set the level to {grid.highest / 2:.3g}"
    if grid.highest <= level:
        raise BadInput(f"no surface at level {level:.3g}: the highest density is {grid.highest:.3g}; {advice}")
    if level <= FAINT * grid.highest or (grid.values > level).mean() > full:
        raise BadInput(f"at level {level:.3g} the scene fills all of its space: the highest density is "
                       f"{grid.highest:.3g}; {advice}, or train it longer")  # fmt: skip


def ground(filled: Array) -> int:
    """How many of the lowest layers of cells [X,Y,Z] are a thin sheet that reaches far beyond all above it."""
    layers = np.flatnonzero(filled.any((0, 1)))
    first, last = layers[0], layers[-1] + 1
    for top in range(first + 1, first + 1 + math.ceil(SHEET * (last - first))):
        sheet, rest = (np.asarray(part.any(2)) for part in (filled[:, :, first:top], filled[:, :, top:]))
        if rest.any() and bool((extent(sheet) > WIDER * extent(rest)).all()):
            return int(top)
    return 0


def extent(filled: Array) -> Array:
    """Along both axes, the cells from the first to the last filled one of [X,Y]."""
    places = np.argwhere(filled)
    found: Array = np.ptp(places, axis=0) + 1
    return found


def marched(grid: Grid, level: float) -> Mesh:
    """Marching cubes (Lewiner et al. 2003) of log densities; closed at the grid's rim, and looking outwards."""
    log = grid.log
    closed = np.pad(log, 1, constant_values=float(log.min()))
    measure = load("skimage.measure")
    vertices, faces, _, _ = measure.marching_cubes(closed, math.log(level), gradient_direction="ascent")
    return Mesh((vertices.astype(np.float64) - 1) * grid.step + grid.low, faces.astype(np.int64)).welded()


def swept(mesh: Mesh) -> tuple[Mesh, int]:
    """The mesh without crumbs and without cavities, which nobody sees from outside; how many parts went."""
    count, part = mesh.components()
    faces, volume = np.bincount(part), np.bincount(part, mesh.volumes)
    keep = (faces >= CRUMB * len(mesh.faces)) & (volume > 0)
    if not keep.any():
        raise BadInput(
            f"the surface is {count} crumbs of at most {faces.max()} faces; try a lower level or train longer"
        )
    return mesh.pick(keep[part]), count - int(keep.sum())
