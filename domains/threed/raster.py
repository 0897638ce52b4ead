"""Triangles as pixels, exactly and in any order of memory: for textures, and for what of a mesh a camera sees.

Legend: M faces, H and W pixels, K pixel centres inside triangles. Pixel (row i, column j) has its centre at x = j + .5,
y = i + .5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.shape import Mesh

CHUNK = 2**21  # candidates at a time
EDGE = 1e-9  # of a triangle's area: centres on an edge belong to both sides

Array = np.ndarray
Hits = tuple[Array, Array, Array]  # face [K], pixel [K] as row * W + column, weights of the corners [K,3]


def cover(corners: Array, height: int, width: int) -> Iterator[Hits]:
    """The pixel centres inside triangles [M,3,2] (x, y in pixels), some triangles at a time, in their order."""
    size = np.array([width, height])
    low = np.clip(np.ceil(corners.min(1) - 0.5), 0, size).astype(np.int64)
    high = np.clip(np.floor(corners.max(1) - 0.5), -1, size - 1).astype(np.int64)
    span = np.maximum(high - low + 1, 0)
    ends = span.prod(1).cumsum()
    first = 0
    while first < len(corners):
        done = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, done + CHUNK, "right")), first + 1)
        yield _inside(corners, low, span, np.arange(first, last), width)
        first = last


def _inside(corners: Array, low: Array, span: Array, some: Array, width: int) -> Hits:
    """The centres of the bounding boxes of some triangles that lie inside."""
    count = span[some].prod(1)
    face = np.repeat(some, count)
    place = np.arange(len(face)) - np.repeat(count.cumsum() - count, count)
    column, row = low[face, 0] + place % span[face, 0], low[face, 1] + place // span[face, 0]
    point = np.stack([column, row], 1) + 0.5
    a, b, c = (corners[face, i] for i in range(3))
    area = cross(b - a, c - a)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.stack([cross(c - b, point - b), cross(a - c, point - c), cross(b - a, point - a)], 1)
        weights = weights / area[:, None]
    keep = (weights >= -EDGE).all(1)  # never true where the area is zero
    return face[keep], (row * width + column)[keep], weights[keep]


def cross(a: Array, b: Array) -> Array:
    """The z of the cross product of plane vectors [...,2]."""
    found: Array = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return found


@dataclass(frozen=True)
class Seen:
    """What a camera sees of a mesh: face [H*W] (-1: none), corner weights [H*W,3], depth [H*W] along its axis."""

    face: Array
    weights: Array
    depth: Array

    def blend(self, values: Array, faces: Array) -> Array:
        """Values [N,D] of vertices at the pixels that show something [K,D]."""
        hit = self.face >= 0
        found: Array = (values[faces[self.face[hit]]] * self.weights[hit][..., None]).sum(1)
        return found


def look(mesh: Mesh, camera: Cameras) -> Seen:
    """The nearest face behind each pixel of one camera, both sides of faces being seen; the camera stands outside."""
    place, depth = project(mesh.vertices, camera)
    ahead = np.flatnonzero((depth[mesh.faces] > 1e-6).all(1))
    faces = mesh.faces[ahead]
    count = camera.height * camera.width
    face, weights, nearest = np.full(count, -1), np.zeros((count, 3)), np.full(count, np.inf)
    for found, pixel, flat in cover(place[faces], camera.height, camera.width):
        share = flat / depth[faces[found]]
        away = 1 / share.sum(1)
        order = np.lexsort((away, pixel))  # by pixel, the nearest first
        first = order[np.unique(pixel[order], return_index=True)[1]]
        first = first[away[first] < nearest[pixel[first]]]
        where = pixel[first]
        face[where], nearest[where] = ahead[found[first]], away[first]
        weights[where] = share[first] * away[first][:, None]
    return Seen(face, weights, np.where(face >= 0, nearest, 0.0))


def project(points: Array, camera: Cameras) -> tuple[Array, Array]:
    """Pixels [N,2] (x, y) and depth [N] of points [N,3] before one camera."""
    turn, shift = (x[0].double().cpu().numpy() for x in camera.view())
    local = points @ turn.T + shift
    with np.errstate(divide="ignore", invalid="ignore"):
        flat = local[:, :2] / local[:, 2:] * float(camera.focal[0])
    return flat + np.array([camera.width / 2, camera.height / 2]), local[:, 2]
