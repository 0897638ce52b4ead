"""Textured OBJ models and their pictures: the small software rasteriser that embedded views are built with.

It needs no graphics driver, so that the same pictures come out on every machine. Legend: T triangles, N vertices,
V cameras, S pixels along a side, P pairs of a triangle and a pixel that its box covers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from limbeck.domains.threed.cameras import Cameras

LIGHT = (0.5, -0.4, 0.77)  # where the fixed soft light comes from, front, right and above
AMBIENT = 0.45
TEXTURE = 256  # pixels along a side, at most: more would only alias
PAIRS = 2_000_000  # looked at in one go
INVISIBLE = 0.1  # materials with less opacity are left out


@dataclass(frozen=True)
class Mesh:
    """Corners [T,3,3], uv [T,3,2], and a texture [4,H,W] in [0,1] a material."""

    corners: Tensor
    uv: Tensor
    material: Tensor  # [T]
    textures: list[Tensor]

    def turned(self, turn: Tensor) -> Mesh:
        """Turned by a matrix [3,3] and normalised: centred, its bounding sphere having radius 1."""
        corners = self.corners @ turn.T
        points = torch.unique(corners.reshape(-1, 3), dim=0)
        centre, radius = bounding_sphere(points)
        return replace(self, corners=(corners - centre) / radius)


def bounding_sphere(points: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [3] and radius of a small ball around points [N,3] (Badoiu and Clarkson 2003)."""
    centre = (points.amax(0) + points.amin(0)) / 2
    for step in range(2, 500):
        centre = centre + (points[(points - centre).square().sum(1).argmax()] - centre) / step
    return centre, (points - centre).norm(dim=1).amax()


def load_obj(path: Path) -> Mesh:
    """Reads an OBJ with its MTL; polygons become fans of triangles, colours and pictures become textures."""
    lists: dict[str, list[list[float]]] = {"v": [], "vt": []}
    faces: list[tuple[list[str], str]] = []
    material, names = "", set()
    for line in path.read_text(encoding="latin-1").splitlines():
        key, *rest = line.split() or [""]
        if key in lists:
            lists[key].append([float(value) for value in rest[: 2 if key == "vt" else 3]])
        elif key == "usemtl":
            material = " ".join(rest)
        elif key == "mtllib":
            names.add(" ".join(rest))
        elif key == "f":
            faces += [([rest[0], rest[i], rest[i + 1]], material) for i in range(1, len(rest) - 1)]
    found = {k: v for name in sorted(names) for k, v in load_mtl(path.parent / name).items()}
    kept = [(corners, name) for corners, name in faces if name not in found or found[name] is not None]
    return _mesh(lists, kept, {name: picture for name, picture in found.items() if picture is not None})


def _mesh(lists: dict[str, list[list[float]]], faces: list[tuple[list[str], str]], found: dict[str, Tensor]) -> Mesh:
    index = np.array([[_numbers(corner, lists) for corner in corners] for corners, _ in faces])
    order = {name: i for i, name in enumerate(dict.fromkeys(name for _, name in faces))}
    part = {key: torch.tensor([*rows, [0.0] * (2 if key == "vt" else 3)]) for key, rows in lists.items()}
    grey = torch.tensor([0.7, 0.7, 0.7, 1.0])[:, None, None]
    return Mesh(
        part["v"][index[..., 0]],
        part["vt"][index[..., 1]],
        torch.tensor([order[name] for _, name in faces]),
        [found.get(name, grey) for name in order],
    )


def _numbers(corner: str, lists: dict[str, list[list[float]]]) -> list[int]:
    """Rows of v and vt of "7/1": from 1, or from the end where negative; the last row, a zero, where absent."""
    given = (corner.split("/") + [""])[:2]
    out = []
    for text, rows in zip(given, lists.values(), strict=True):
        number = int(text) if text else 0
        out.append(number - 1 if number > 0 else len(rows) + number)
    return out


def load_mtl(path: Path) -> dict[str, Tensor | None]:
    """Textures [4,H,W] in [0,1] by material, one pixel where it has a colour alone; None for invisible ones.

    A picture replaces the colour (exporters leave Kd black or grey beside one). Values are taken as they are shown.
    """
    entries: dict[str, dict[str, list[str]]] = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        key, *rest = line.split() or [""]
        if key == "newmtl":
            entries[" ".join(rest)] = current = {}
        elif entries:
            current[key] = rest
    return {name: _texture(entry, path.parent) for name, entry in entries.items()}


def _texture(entry: dict[str, list[str]], folder: Path) -> Tensor | None:
    if float(entry.get("d", ["1"])[-1]) < INVISIBLE:
        return None
    picture = folder / " ".join(entry.get("map_Kd", []))
    if not picture.is_file():
        return torch.tensor([*map(float, entry.get("Kd", ["0.7"] * 3)[:3]), 1.0]).clamp(0, 1)[:, None, None]
    with Image.open(picture) as image:
        rgba = image.convert("RGBA")
    scale = min(1.0, TEXTURE / max(rgba.size))
    small = rgba.convert("RGBa").resize([max(1, round(side * scale)) for side in rgba.size], Image.Resampling.BOX)
    return torch.from_numpy(np.array(small.convert("RGBA"))).permute(2, 0, 1).float() / 255


def render(mesh: Mesh, cameras: Cameras, supersample: int = 4) -> Tensor:
    """Premultiplied RGBA [V,4,H,W] in [0,1]: rasterised finer by `supersample`, then averaged."""
    fine = cameras.sized(cameras.height * supersample, cameras.width * supersample)
    views = torch.stack([_view(mesh, fine.pick(slice(i, i + 1))) for i in range(len(fine))])
    return F.avg_pool2d(views, supersample)


def _view(mesh: Mesh, camera: Cameras) -> Tensor:
    """Premultiplied RGBA [4,S,S] of one camera."""
    turn, shift = camera.view()
    local = mesh.corners @ turn[0].T + shift[0]
    screen = local[..., :2] / local[..., 2:] * camera.focal + 0.5 * camera.width
    triangle, pixel, inside = nearest(mesh, screen, 1 / local[..., 2], camera.width)
    share = inside / local[triangle, :, 2]  # perspective: linear in 1/z
    share = share / share.sum(1, keepdim=True)
    rgb = texels(mesh, triangle, torch.einsum("pk,pkd->pd", share, mesh.uv[triangle]))[:, :3]
    light = shade(mesh, triangle, share, camera.position[0])
    out = torch.zeros(4, camera.height * camera.width)
    out[:, pixel] = torch.cat([rgb * light[:, None], torch.ones_like(light)[:, None]], 1).T
    return out.view(4, camera.height, camera.width)


def nearest(mesh: Mesh, screen: Tensor, inverse: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every covered pixel: its foremost triangle [Q], its number [Q], and barycentric weights [Q,3].

    screen [T,3,2] in pixels, inverse depth [T,3]. Where triangles tie the first one wins.
    """
    found = [_candidates(mesh, screen, inverse, side, part) for part in _parts(screen, side)]
    triangle, pixel, share, depth = (torch.cat(values) for values in zip(*found, strict=True))
    best = torch.full((side * side,), -math.inf).scatter_reduce(0, pixel, depth, "amax")
    front = (depth == best[pixel]).nonzero()[:, 0]
    first = torch.full((side * side,), len(triangle)).scatter_reduce(0, pixel[front], front, "amin")
    keep = first[first < len(triangle)]
    return triangle[keep], pixel[keep], share[keep]


def _boxes(screen: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """First pixel [T,2] and size [T,2] of the boxes whose pixel centres a triangle may cover."""
    low = (screen.amin(1) - 0.5).ceil().clamp(0, side).long()
    high = (screen.amax(1) - 0.5).floor().clamp(-1, side - 1).long() + 1
    return low, (high - low).clamp_min(0)


def _parts(screen: Tensor, side: int) -> list[Tensor]:
    """Triangles [T] in groups of about PAIRS candidate pixels."""
    count = _boxes(screen, side)[1].prod(1)
    visible = count.nonzero()[:, 0]
    group = count[visible].cumsum(0) // PAIRS
    return [visible[group == i] for i in range(int(group[-1]) + 1)] if len(visible) else [visible]


def _candidates(
    mesh: Mesh, screen: Tensor, inverse: Tensor, side: int, part: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """triangle [P], pixel [P], weights [P,3] and 1/z [P] of all pixels that triangles of `part` cover."""
    low, size = _boxes(screen[part], side)
    count = size.prod(1)
    which = torch.repeat_interleave(torch.arange(len(part)), count)
    place = torch.arange(len(which)) - (count.cumsum(0) - count)[which]
    x, y = low[which, 0] + place % size[which, 0], low[which, 1] + place // size[which, 0]
    triangle = part[which]
    share = barycentric(screen[triangle], torch.stack([x, y], 1) + 0.5)
    inside = (share >= 0).all(1)
    triangle, share, pixel = triangle[inside], share[inside], (y * side + x)[inside]
    depth = (share * inverse[triangle]).sum(1)
    solid = opaque(mesh, triangle, share * inverse[triangle])
    return triangle[solid], pixel[solid], share[solid], depth[solid]


def barycentric(triangle: Tensor, point: Tensor) -> Tensor:
    """Weights [P,3] of points [P,2] in triangles [P,3,2]; negative outside, and for triangles without area."""
    a, b, c = triangle.unbind(1)
    area = _cross(b - a, c - a)
    parts = torch.stack([_cross(c - b, point - b), _cross(a - c, point - c), _cross(b - a, point - a)], 1)
    return torch.where(area[:, None].abs() > 1e-9, parts / area[:, None], -1.0)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def opaque(mesh: Mesh, triangle: Tensor, share: Tensor) -> Tensor:
    """Whether the texture is solid there [P] (leaves are cut out of pictures); share [P,3] need not sum to one."""
    cut = torch.tensor([bool((texture[3] < 0.5).any()) for texture in mesh.textures])[mesh.material[triangle]]
    solid = torch.ones(len(triangle), dtype=torch.bool)
    if cut.any():
        weight = share[cut] / share[cut].sum(1, keepdim=True)
        uv = torch.einsum("pk,pkd->pd", weight, mesh.uv[triangle[cut]])
        solid[cut] = texels(mesh, triangle[cut], uv)[:, 3] >= 0.5
    return solid


def texels(mesh: Mesh, triangle: Tensor, uv: Tensor) -> Tensor:
    """RGBA [P,4] of the nearest texel, pictures being repeated; v points up."""
    out = torch.empty(len(triangle), 4)
    for number, texture in enumerate(mesh.textures):
        here = (mesh.material[triangle] == number).nonzero()[:, 0]
        height, width = texture.shape[1:]
        column = (uv[here, 0].remainder(1) * width).long().clamp(max=width - 1)
        row = ((-uv[here, 1]).remainder(1) * height).long().clamp(max=height - 1)
        out[here] = texture[:, row, column].T
    return out


def shade(mesh: Mesh, triangle: Tensor, share: Tensor, eye: Tensor) -> Tensor:
    """Light [P] in [AMBIENT, 1]: half Lambert, which is soft; faces have two sides."""
    corners = mesh.corners[triangle]
    normal = F.normalize(torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), dim=1)
    place = torch.einsum("pk,pkd->pd", share, corners)
    normal = torch.where(((eye - place) * normal).sum(1, keepdim=True) < 0, -normal, normal)
    toward = F.normalize(torch.tensor(LIGHT), dim=0)
    return AMBIENT + (1 - AMBIENT) * (0.5 + 0.5 * normal @ toward)
