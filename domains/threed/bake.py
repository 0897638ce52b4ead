"""Textures: a mesh is unwrapped, and every texel gets the colour of the place that it covers.

A scene's colours are what a screen shows (sRGB), and so are the texture's bytes: nothing is converted. Textures have
their first row at the top, and v runs down as in glTF. Legend: N vertices, M faces, S texels along a side, K texels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from limbeck.core.run.errors import BadInput
from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.raster import cover, look, project
from limbeck.domains.threed.scene import Scene, seen
from limbeck.domains.threed.shape import Mesh, load
from limbeck.domains.threed.surface import around, colours

Array = np.ndarray
PADDING = 4  # texels between charts
FINER = 8  # times smaller than the texture are the views that colours are taken from
SLANT = 0.2  # cosine: a view sees less of a face that is turned further away
NEAREST = 4  # vertices of the fine mesh that a texel's normal is taken from
LEAST = 0.05  # of a mapped normal points outwards
SOLID = 0.95  # alpha from which a pixel is not mixed with the background
NEAR = 0.02  # of the ball's radius: what lies deeper behind the surface that a view sees is hidden


@dataclass(frozen=True)
class Textured:
    """A mesh with a texture: vertices are doubled along the seams of its charts."""

    mesh: Mesh
    normals: Array  # float64 [N,3]
    uv: Array  # float64 [N,2] in [0, 1], v down
    image: Array  # uint8 [S,S,3], sRGB
    relief: Array | None = None  # uint8 [S,S,3], a map of normals in the frames of `tangents`

    @property
    def tangents(self) -> Array:
        """glTF's frames [N,4]: a unit vector along u at right angles to the normal, and w = 1 or -1.

        The third axis, w (normal x tangent), runs up the texture, against v.
        """
        corners, uv = self.mesh.corners, self.uv[self.mesh.faces]
        (a, b), (p, q) = ((x[:, 1:] - x[:, :1]).swapaxes(0, 1) for x in (corners, uv))
        area = q[:, 1:] * p[:, :1] - p[:, 1:] * q[:, :1]
        along, down = (a * q[:, 1:] - b * p[:, 1:]) * np.sign(area), (b * p[:, :1] - a * q[:, :1]) * np.sign(area)
        total = np.zeros((2, len(self.uv), 3))
        for i in range(3):
            for way, face in zip(total, (along, down), strict=True):
                np.add.at(way, self.mesh.faces[:, i], face)
        along = total[0] - (total[0] * self.normals).sum(1, keepdims=True) * self.normals
        along = along / np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-30)
        turn = -(np.cross(self.normals, along) * total[1]).sum(1, keepdims=True)
        return np.concatenate([along, np.where(turn < 0, -1.0, 1.0)], 1)

    def moved(self, turn: Array, scale: float, shift: Array) -> Textured:
        """scale * (turn v) + shift at each vertex."""
        return replace(self, mesh=self.mesh.moved(turn, scale, shift), normals=self.normals @ turn.T)

    def at(self, uv: Array) -> Array:
        """Colours [K,3] in [0, 255] at uv [K,2], between texels."""
        size = np.array(self.image.shape[1::-1])
        place = np.clip(uv * size - 0.5, 0, size - 1)
        low = np.minimum(place.astype(np.int64), np.maximum(size - 2, 0))
        (x, y), (u, v) = low.T, (place - low).T[..., None]
        right, down = np.minimum(x + 1, size[0] - 1), np.minimum(y + 1, size[1] - 1)
        picture = self.image.astype(np.float64)
        top = picture[y, x] * (1 - u) + picture[y, right] * u
        low_row = picture[down, x] * (1 - u) + picture[down, right] * u
        found: Array = top * (1 - v) + low_row * v
        return found


def unwrap(mesh: Mesh, size: int) -> Textured:
    """The mesh in charts (xatlas) for a white texture of `size` texels; equal corners are one vertex."""
    xatlas = load("xatlas")
    pack = xatlas.PackOptions()
    pack.padding, pack.resolution, pack.bilinear = PADDING, size, True
    while True:
        atlas = xatlas.Atlas()
        points, normals = (values.astype(np.float32) for values in (mesh.vertices, mesh.normals))
        atlas.add_mesh(points, mesh.faces.astype(np.uint32), normals)
        atlas.generate(xatlas.ChartOptions(), pack)
        if atlas.atlas_count == 1:
            break
        pack.texels_per_unit = 0.9 * atlas.texels_per_unit  # too much for one page
    origin, faces, uv = atlas[0]
    return joined(mesh, origin.astype(np.int64), faces.astype(np.int64), np.clip(uv.astype(np.float64), 0, 1), size)


def joined(mesh: Mesh, origin: Array, faces: Array, uv: Array, size: int) -> Textured:
    """Corners that share a vertex of the mesh (origin [N]) and their uv [N,2] are one vertex."""
    keys = np.concatenate([origin[:, None], np.round(uv * 2**24).astype(np.int64)], 1)
    _, first, name = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    own = origin[first]
    white = np.full((size, size, 3), 255, np.uint8)
    return Textured(Mesh(mesh.vertices[own], name.reshape(-1)[faces]), mesh.normals[own], uv[first], white)


@dataclass(frozen=True)
class Texels:
    """The texels that charts cover: their index [K] as row * S + column, places and normals [K,3].

    Each lies in a face with these corners [K,3], whose shares are [K,3].
    """

    index: Array
    place: Array
    normal: Array
    corner: Array
    share: Array
    size: int

    @classmethod
    def of(cls, asset: Textured) -> Texels:
        """By rasterising the charts."""
        size, faces = len(asset.image), asset.mesh.faces
        face, weights = np.full(size * size, -1), np.zeros((size * size, 3))
        for found, pixel, share in cover(asset.uv[faces] * size, size, size):
            face[pixel], weights[pixel] = found, share
        index = np.flatnonzero(face >= 0)
        corner, share = faces[face[index]], weights[index][..., None]
        place, normal = ((values[corner] * share).sum(1) for values in (asset.mesh.vertices, asset.normals))
        return cls(index, place, unit(normal), corner, weights[index], size)

    def blend(self, values: Array) -> Array:
        """Values [N,D] of vertices at the texels [K,D]."""
        found: Array = (values[self.corner] * self.share[..., None]).sum(1)
        return found

    def filled(self, colour: Array) -> Array:
        """The texture uint8 [S,S,3] of colours [K,3] in [-1, 1]; all other texels take the nearest one's."""
        from scipy.ndimage import distance_transform_edt

        image = np.zeros((self.size * self.size, 3), np.uint8)
        image[self.index] = np.round((np.clip(colour, -1, 1) + 1) * 127.5).astype(np.uint8)
        empty = np.ones(self.size * self.size, bool)
        empty[self.index] = False
        square = empty.reshape(self.size, self.size)
        rows, columns = distance_transform_edt(square, return_distances=False, return_indices=True)
        found: Array = image.reshape(self.size, self.size, 3)[rows, columns]
        return found


def unit(vectors: Array) -> Array:
    """Vectors [K,3] of length one."""
    found: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return found


def relief(asset: Textured, fine: Mesh) -> Array:
    """A map of the normals of a finer mesh, uint8 [S,S,3], for what an asset's own are too coarse for.

    A texel takes those of the nearest vertices on its side of the surface, in the frame that viewers interpolate from
    `tangents`: red along u, green up the texture, blue outwards.
    """
    from scipy.spatial import cKDTree

    texels, frames = Texels.of(asset), asset.tangents
    away, near = cKDTree(fine.vertices).query(texels.place, k=NEAREST)
    normals = fine.normals[near]
    same = (normals * texels.normal[:, None]).sum(2).clip(0)
    weight = same / np.maximum(away, 1e-12) ** 2
    wanted = (normals * weight[..., None]).sum(1)
    wanted = unit(np.where(weight.sum(1, keepdims=True) > 0, wanted, texels.normal))
    along, way = unit(texels.blend(frames[:, :3])), np.sign(texels.blend(frames[:, 3:]))
    axes = np.stack([along, way * np.cross(texels.normal, along), texels.normal], 2)
    local = np.linalg.solve(axes, wanted[..., None])[..., 0]
    local[:, 2] = np.maximum(local[:, 2], LEAST)
    return texels.filled(unit(local))


def textured(scene: Scene, mesh: Mesh, options: Files) -> tuple[Textured, str]:
    """The mesh with the scene's colours, and where they are from: its `field`, or its `views`."""
    if scene.channels != 3:
        raise BadInput(f"the scene shows {scene.channels} latent channels, not colours; refine it to RGB before export")
    asset = unwrap(mesh, options.texture)
    texels = Texels.of(asset)
    own = colours(scene, texels.place)
    found = {"field": lambda: own, "views": lambda: from_views(scene, mesh, texels, own)}
    names = list(found) if options.colours == "auto" else [options.colours]
    made = {name: replace(asset, image=texels.filled(found[name]())) for name in names}
    best = min(names, key=lambda name: misfit(scene, made[name])) if len(names) > 1 else names[0]
    return made[best], best


@torch.no_grad()
def pictures(scene: Scene, cameras: Cameras) -> Iterator[tuple[Cameras, Array, Array]]:
    """Each camera with the scene's picture [H*W,3] on white and its alpha [H*W]."""
    for i in range(len(cameras)):
        one = cameras.pick(slice(i, i + 1))
        views = seen(scene, one)
        image, alpha = (x[0].flatten(1).T.float().numpy() for x in (views.image, views.alpha))
        yield one, image, alpha[:, 0]


def from_views(scene: Scene, mesh: Mesh, texels: Texels, own: Array) -> Array:
    """Colours [K,3] from the views that see a place, the more squarely the more; `own` [K,3] where none does."""
    total, weight = np.zeros_like(own, np.float64), np.zeros(len(own))
    side = texels.size // FINER
    for camera, picture, alpha in pictures(scene, around(float(scene.radius), side)):
        pixel, depth = project(texels.place, camera)
        column, row = np.floor(pixel).astype(np.int64).T
        inside = (column >= 0) & (row >= 0) & (column < side) & (row < side)
        index = np.where(inside, row * side + column, 0)
        view = look(mesh, camera)
        sight = camera.position[0].numpy() - texels.place
        square = (sight * texels.normal).sum(1) / np.linalg.norm(sight, axis=1)
        near = (view.face[index] >= 0) & (depth < view.depth[index] + NEAR * scene.radius)
        some = np.flatnonzero(inside & near & (square > SLANT) & (alpha[index] > SOLID))
        share = square[some] ** 4
        total[some] += share[:, None] * picture[index[some]]
        weight[some] += share
    return np.where(weight[:, None] > 0, total / np.maximum(weight, 1e-12)[:, None], own)


def misfit(scene: Scene, asset: Textured) -> float:
    """The mean square difference of the mesh's pictures from the scene's where both are opaque, at other cameras."""
    errors = []
    for camera, picture, alpha in pictures(scene, around(float(scene.radius), 64, offset=11.0)):
        view = look(asset.mesh, camera)
        colour = asset.at(view.blend(asset.uv, asset.mesh.faces)) / 127.5 - 1
        hit = view.face >= 0
        errors.append(np.square(colour - picture[hit])[alpha[hit] > SOLID])
    return float(np.concatenate(errors).mean())
