"""A scene that is a mesh with a texture: its geometry is given, what is learned are texels and perhaps small offsets.

Which face a pixel shows is found without gradient; where on the face it looks, and the texels there, keep theirs.
Outlines give the vertices no gradient. Legend: V views, H and W pixels, N vertices, M faces, S texels along a side,
P pixels (of the finer pictures) that show something.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Model
from limbeck.core.run import job
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean
from limbeck.domains.threed import asset, fields, meshfile
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.asset import Made
from limbeck.domains.threed.bake import Texels, Textured, unwrap
from limbeck.domains.threed.build_mesh import barycentric, bounding_sphere
from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.scene import SceneStudent, Views
from limbeck.domains.threed.shape import Mesh
from limbeck.domains.threed.volume import spread

PAIRS = 2**21  # of a face and a pixel, looked at in one go
NEAR = 1e-3  # scene units: faces that come nearer to the camera are not shown
EDGE = 1e-4  # of a face's area: pixels on an edge belong to both sides
FULL = 0.99  # of the range of colours, beyond which a given texel would have hardly any gradient
ROUND = 24  # rings of the ball


class TexturedMesh(nn.Module):
    """A Scene without a field: what its files hold is the mesh itself."""

    channels = fields.RGB
    places: Tensor
    weld: Tensor
    faces: Tensor
    uv: Tensor

    def __init__(
        self, given: Textured, config: settings.Mesh, scale: float = 1.0, centre: np.ndarray | None = None
    ) -> None:
        """Scene coordinates are (vertex of `given` - centre) / scale; without a centre it is in a scene's already."""
        super().__init__()
        self.given, self.config, self.scale, self.centre = given, config, scale, centre
        places = (given.mesh.vertices - (0.0 if centre is None else centre)) / scale
        self.radius = float(np.linalg.norm(places, axis=1).max())
        step = max(self.radius, 1e-30) * 1e-6
        _, first, weld = np.unique(np.round(places / step), axis=0, return_index=True, return_inverse=True)
        tensors = {"places": places[first], "weld": weld.reshape(-1), "faces": given.mesh.faces, "uv": given.uv}
        for name, value in tensors.items():
            kind = torch.float32 if value.dtype.kind == "f" else torch.int64
            self.register_buffer(name, torch.as_tensor(value, dtype=kind), persistent=False)
        self.texture = nn.Parameter(self._start())
        self.offsets = nn.Parameter(torch.zeros(len(first), 3)) if config.offsets else None

    def _start(self) -> Tensor:
        """Raw texels [3,S,S]: middle grey, or the mesh's own picture."""
        size = self.config.texture
        if self.config.start == "grey":
            return torch.zeros(3, size, size)
        picture = Image.fromarray(self.given.image).resize((size, size), Image.Resampling.BOX)
        colour = torch.from_numpy(np.array(picture)).movedim(-1, 0).contiguous() / 127.5 - 1
        return 2 * torch.atanh(colour.clamp(-FULL, FULL))

    def points(self) -> Tensor:
        """Vertices [N,3] in the scene."""
        places = self.places if self.offsets is None else self.places + self.offsets
        return places.index_select(0, self.weld)

    def laplacian(self) -> Tensor:
        """Mean squared distance of offsets from the mean of their neighbours': bending costs, moving does not."""
        if self.offsets is None:
            raise BadInput("losses: laplacian is for a mesh that moves; set student.offsets: true")
        corner = self.weld.index_select(0, self.faces.flatten()).view(-1, 3)
        ahead, back = corner.flatten(), corner.roll(1, 1).flatten()
        near = self.offsets.index_select(0, torch.cat([back, ahead]))
        zero = torch.zeros_like(self.offsets)
        total = zero.index_add(0, torch.cat([ahead, back]), near)
        count = zero[:, :1].index_add(0, torch.cat([ahead, back]), torch.ones_like(near[:, :1])).clamp_min(1)
        return (self.offsets - total / count).square().sum(1).mean()

    def colours(self, uv: Tensor) -> Tensor:
        """Colours [3,P] at uv [P,2], between texels."""
        size = self.texture.shape[1]
        place = (uv.flip(1).T * size - 0.5).clamp(0, size - 1)
        found = fields.lookup(self.texture.flatten(1), *fields.corners(place, size))
        return fields.squashed(found.T, self.channels).T

    def render(self, cameras: Cameras, background: Tensor, jitter: Tensor | None = None) -> Views:
        """Pictures over background [V,3], each pixel the mean of `samples` x `samples`; there is nothing to jitter."""
        fine = cameras.sized(self.config.samples * cameras.height, self.config.samples * cameras.width)
        corners = self.points().index_select(0, self.faces.flatten()).view(-1, 3, 3)
        pixel, face = nearest(corners.detach(), fine)
        share, point, ahead = met(corners.index_select(0, face), pixel, fine)
        corner = self.faces.index_select(0, face)
        uv = (share[..., None] * self.uv.index_select(0, corner.flatten()).view(-1, 3, 2)).sum(1)
        a, b, c = corners.index_select(0, face).unbind(1)
        normal = F.normalize(torch.linalg.cross(b - a, c - a), dim=1, eps=1e-12)
        seen = torch.cat([self.colours(uv), torch.ones_like(ahead)[None], ahead[None], normal.T])
        count = len(cameras) * fine.height * fine.width
        whole = spread(seen, pixel, count).view(-1, len(cameras), fine.height, fine.width).transpose(0, 1)
        pooled = F.avg_pool2d(whole, self.config.samples)
        colour, alpha, depth, normals = torch.split(pooled, [3, 1, 1, 3], 1)
        image = colour + (1 - alpha) * background.to(colour)[..., None, None]
        return Views(image, alpha, depth, normals)

    @torch.no_grad()
    def asset(self, options: Files) -> Made:
        """The mesh with its texture; a file's own stands where the file has it. Options of geometry do not count."""
        mesh = self.given.mesh
        if self.offsets is not None:
            moved = self.scale * self.offsets.index_select(0, self.weld)
            mesh = Mesh(mesh.vertices + moved.cpu().double().numpy(), mesh.faces)
        colour = fields.squashed(self.texture.flatten(1).T, self.channels).cpu().numpy()
        blank = np.zeros((self.config.texture,) * 2 + (3,), np.uint8)
        texels = Texels.of(replace(self.given, image=blank))
        made = Textured(mesh, self.given.normals, self.given.uv, texels.filled(colour[texels.index]))
        whole = mesh.welded()
        facts = {"faces": len(mesh.faces), "vertices": len(mesh.vertices), "watertight": whole.watertight,
                 "components": whole.components()[0], "colours": "texture"}  # fmt: skip
        return Made(made, facts, stays=self.centre is not None)


def nearest(corners: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """The pixels [P] (counted over [V,H,W]) that show something of faces [M,3,3], and the nearest face there [P].

    Both sides of faces are seen. What wins does not depend on the order of sums: the largest 1/depth, then the first.
    """
    count = len(cameras) * cameras.height * cameras.width
    found = list(_covered(corners, cameras))
    pixel, face, inverse = (torch.cat(parts) for parts in zip(*found, strict=True))
    best = inverse.new_zeros(count).scatter_reduce(0, pixel, inverse, "amax")
    front = (inverse == best.index_select(0, pixel)).nonzero()[:, 0]
    none = len(corners)
    first = face.new_full((count,), none).scatter_reduce(
        0, pixel.index_select(0, front), face.index_select(0, front), "amin"
    )
    shown = (first < none).nonzero()[:, 0]
    return shown, first.index_select(0, shown)


def _covered(corners: Tensor, cameras: Cameras) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """pixel, face and 1/depth [K] of pixel centres inside faces, some faces at a time; the groups wait for the host."""
    turn, shift = cameras.view()
    local = torch.einsum("vij,mkj->vmki", turn, corners) + shift[:, None, None]
    depth = local[..., 2].flatten(0, 1)
    size = depth.new_tensor([cameras.width, cameras.height])
    flat = (local[..., :2] / local[..., 2:] * cameras.focal[:, None, None, None] + size / 2).flatten(0, 1)
    ahead = (depth > NEAR).all(1)
    low = (flat.amin(1) - 0.5).ceil().clamp_min(0).minimum(size).long()
    high = (flat.amax(1) - 0.5).floor().minimum(size - 1).clamp_min(-1).long()
    span = (high - low + 1).clamp_min(0) * ahead[:, None]
    ends = span.prod(1).cumsum(0)
    some = (span.prod(1) > 0).nonzero()[:, 0]
    group = torch.unique_consecutive(ends.index_select(0, some) // PAIRS, return_counts=True)[1]
    for part in torch.split(some, group.tolist() or [0]):
        row, column, triangle = _boxes(low, span, part)
        share = barycentric(flat.index_select(0, triangle), torch.stack([column, row], 1) + 0.5)
        inside = (share >= -EDGE).all(1).nonzero()[:, 0]
        triangle = triangle.index_select(0, inside)
        inverse = (share.index_select(0, inside) / depth.index_select(0, triangle)).sum(1)
        view = triangle // len(corners)
        pixel = (view * cameras.height + row.index_select(0, inside)) * cameras.width + column.index_select(0, inside)
        yield pixel, triangle % len(corners), inverse


def _boxes(low: Tensor, span: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """row, column and triangle [K] of all pixels in the boxes of some triangles."""
    width, count = span.index_select(0, part)[:, 0], span.index_select(0, part).prod(1)
    which = torch.repeat_interleave(torch.arange(len(part), device=part.device), count)
    place = torch.arange(len(which), device=part.device) - (count.cumsum(0) - count).index_select(0, which)
    triangle, wide = part.index_select(0, which), width.index_select(0, which)
    first = low.index_select(0, triangle)
    return first[:, 1] + place // wide, first[:, 0] + place % wide, triangle


def met(corners: Tensor, pixel: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """Where pixels' rays meet the planes of faces [P,3,3]: corner weights [P,3], place [P,3], depth [P]; with gradient.

    A ray o + t d meets the corner weights d . ((b - o) x (c - o)) and so on, up to their sum.
    """
    origin, ray = (x.reshape(-1, 3).index_select(0, pixel) for x in cameras.rays())
    a, b, c = (corners - origin[:, None]).unbind(1)
    parts = [(ray * torch.linalg.cross(x, y)).sum(1) for x, y in ((b, c), (c, a), (a, b))]
    share = torch.stack(parts, 1)
    share = share / share.sum(1, keepdim=True)
    place = (share[..., None] * corners).sum(1)
    forward = cameras.forward.index_select(0, pixel // (cameras.height * cameras.width))
    return share, place, ((place - origin) * forward).sum(1)


def ball(size: int) -> Textured:
    """A ball of radius 1, unwrapped."""
    up = np.pi * (np.arange(1, ROUND) / ROUND - 0.5)
    turn = np.pi * np.arange(2 * ROUND) / ROUND
    rings = np.stack([np.outer(np.cos(up), np.cos(turn)), np.outer(np.cos(up), np.sin(turn)),
                      np.outer(np.sin(up), np.ones(2 * ROUND))], -1).reshape(-1, 3)  # fmt: skip
    here = np.arange(len(rings)).reshape(ROUND - 1, 2 * ROUND)
    right = np.roll(here, -1, 1)
    a, b, c, d = here[:-1], right[:-1], right[1:], here[1:]
    south, north = np.full(2 * ROUND, len(rings)), np.full(2 * ROUND, len(rings) + 1)
    faces = [np.stack(corners, -1).reshape(-1, 3) for corners in
             ((a, b, c), (a, c, d), (south, right[0], here[0]), (north, here[-1], right[-1]))]  # fmt: skip
    poles = np.array([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]])
    return unwrap(Mesh(np.concatenate([rings, poles]), np.concatenate(faces).astype(np.int64)), size)


def scene(config: settings.Mesh, build: Build) -> TexturedMesh:
    """The mesh that `of` names: the ball, the asset of a run's folder (where it was there), or a file's.

    A file's mesh is moved and scaled into the ball of radius 1, and exported where the file has it.
    """
    if config.of == "ball":
        return TexturedMesh(ball(config.texture), config)
    path = Path(config.of).expanduser()
    if (path / "recipe.yaml").is_file():
        found = job.open_run(path, str(build.device)).piece("student").scenes[0]
        made = asset.make(found, Files(faces=config.faces, texture=256)).asset
        place = (found.scale, found.centre) if isinstance(found, TexturedMesh) else ()
        return TexturedMesh(made, config, *place)
    if path.is_dir():
        raise BadInput(f"student.of: {clean(config.of, 80)} is no run's folder; name a mesh, a run, or ball")
    given = meshfile.read(path, build.note, config.up, config.texture)
    centre, radius = bounding_sphere(torch.as_tensor(given.mesh.vertices))
    return TexturedMesh(given, config, float(radius), centre.numpy())


def build(config: settings.Mesh, build: Build) -> SceneStudent:
    """Factory of the student `threed.mesh`: painted through the teacher's codec."""
    model: Model = build.piece("teacher")
    return SceneStudent([scene(config, build)], model.codec).to(build.device)
