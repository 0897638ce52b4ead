"""Volume rendering: a field seen by cameras, with depth, normals, shading, and what regularisers read.

Rays are looked at inside the scene's ball alone; a ray's alpha does not depend on where its samples lie as long as the
density is constant between them. Legend: V cameras, H and W pixels, R rays (V*H*W, in the pictures' order), S samples
along a ray, P samples that are looked at, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Model
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.threed import config as settings
from limbeck.domains.threed import fields
from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.scene import SceneStudent, Views

Shading = Literal["albedo", "diffuse", "textureless"]
GOLDEN = 0.6180339887498949
SAMPLES = 2**18  # looked at in one go where there is no graph
FAINT = 0.02  # optical depth of the whole ball's width below which a cell counts as empty
FLOOR = 0.02  # share of a ray's proposals that is spread evenly
AMBIENT, DIFFUSE = 0.1, 0.9


@dataclass(frozen=True)
class Rays:
    """R rays: origin, direction [R,3], where they enter and leave the ball [R], and what goes with their pixel."""

    origin: Tensor
    ray: Tensor
    near: Tensor  # near = far where the ball is missed
    far: Tensor
    ahead: Tensor  # depth along the axis of view of one unit along the ray
    offset: Tensor  # of samples, in shares of the distance between them
    light: Tensor | None  # where the lamp stands [R,3]

    @classmethod
    def of(cls, cameras: Cameras, radius: float, jitter: Tensor | None, light: Tensor | None) -> Rays:
        """The rays of all pixels; a view's jitter moves each ray's samples in a way of its own (golden ratio)."""
        origin, ray = (x.reshape(-1, 3) for x in cameras.rays())
        near, far = ball(origin, ray, radius)
        pixels = cameras.height * cameras.width
        ahead = (ray * cameras.forward.repeat_interleave(pixels, 0)).sum(1)
        offset = torch.full_like(near, 0.5)
        if jitter is not None:
            turn = torch.arange(pixels, device=near.device, dtype=torch.float64) * GOLDEN  # a float's bits run out
            offset = ((jitter.double()[:, None] + turn) % 1).flatten().to(near)
        lamp = None if light is None else light.to(near).repeat_interleave(pixels, 0)
        return cls(origin, ray, near, far, ahead, offset, lamp)

    def split(self, count: int) -> list[Rays]:
        """Some rays at a time."""
        cuts = [slice(start, start + count) for start in range(0, len(self.near), count)]
        known = {name: value for name, value in vars(self).items() if value is not None}
        return [replace(self, **{name: value[cut] for name, value in known.items()}) for cut in cuts]


def ball(origin: Tensor, ray: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Distances [R] at which rays [R,3] of unit length enter and leave the ball; both the same where they miss it."""
    middle = -(origin * ray).sum(1)
    closest = origin + middle[:, None] * ray  # exact for rays that graze, where b^2 - c cancels
    half = (radius**2 - closest.square().sum(1)).clamp_min(0).sqrt()
    near = (middle - half).clamp_min(0)
    return near, torch.maximum(middle + half, near)


def absorbed(depths: Tensor) -> Tensor:
    """Compositing weights [R,S] of optical depths [R,S]: light that comes so far and is stopped there (Max 1995)."""
    before = F.pad(depths.cumsum(1)[:, :-1], (1, 0))
    return torch.exp(-before) * -torch.expm1(-depths)


def refined(edges: Tensor, weight: Tensor, count: int) -> Tensor:
    """Edges [R,count+1] between equal shares of the weights [R,S] of intervals [R,S+1], from first to last.

    Importance sampling as of NeRF, section 5.2, over histograms widened by one interval as of mip-NeRF (section 3.1).
    """
    wide = F.max_pool1d(weight[:, None], 3, 1, 1)[:, 0]
    share = wide + FLOOR * wide.sum(1, keepdim=True).clamp_min(1e-3) / wide.shape[1]
    total = F.pad((share / share.sum(1, keepdim=True)).cumsum(1), (1, 0))
    aim = torch.linspace(0, 1, count + 1, device=edges.device, dtype=edges.dtype).expand(len(edges), -1).contiguous()
    right = torch.searchsorted(total, aim, right=True).clamp(1, weight.shape[1])
    low, high, start, end = (x.gather(1, i) for x in (total, edges) for i in (right - 1, right))
    return start + (end - start) * ((aim - low) / (high - low)).clamp(0, 1)


def spread(values: Tensor, place: Tensor, count: int) -> Tensor:
    """Values [...,P] at places [P] of zeros [...,count]."""
    return values.new_zeros(*values.shape[:-1], count).index_copy(-1, place, values)


def shaded(colour: Tensor, normal: Tensor, to_light: Tensor, shading: Shading) -> Tensor:
    """Lambert's law on colours [P,3] in [-1, 1]: (c + 1) (.1 + .9 max(0, n.l)) - 1 of albedo c, or of white."""
    lit = AMBIENT + DIFFUSE * (normal * F.normalize(to_light, dim=1)).sum(1, keepdim=True).clamp_min(0)
    albedo = (colour + 1) / 2 if shading == "diffuse" else torch.ones_like(colour)
    return 2 * albedo * lit - 1


@dataclass
class Marched:
    """What comes of R rays: sums [K,R] of colour, alpha, depth and perhaps normals; samples [R,S] with a graph only."""

    sums: Tensor
    samples: dict[str, Tensor]


class Nerf(nn.Module):
    """A scene (see scene.py) whose field `body` is seen by volume rendering."""

    def __init__(
        self, body: fields.Body, sampling: settings.Sampling, oriented: bool = False, step: float | None = None
    ) -> None:
        """`oriented`: normals in training too; `step`: of central differences (null: normals by autograd)."""
        super().__init__()
        self.body, self.sampling, self.oriented, self.step = body, sampling, oriented, step
        self.channels, self.radius, self.lit = body.channels, body.radius, body.channels == fields.RGB

    def field(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [N] and colour [N,C] at points [N,3]."""
        return self.body(points)

    def at(self, step: int) -> None:
        """Tells a field that grows (the hash grid's levels) which step of the stage it is."""
        if isinstance(self.body, fields.HashGrid):
            self.body.at(step)

    def render(
        self, cameras: Cameras, background: Tensor, jitter: Tensor | None = None, shading: Shading = "albedo",
        light: Tensor | None = None,
    ) -> Views:  # fmt: skip
        """Pictures over background [V,C]; `light` [V,3] says where the lamp stands for `shading`.

        With a graph aux has `weights`, `places` (distances along the ray), `widths` of intervals [R,S] and, if
        oriented, `facing` [R,S], the cosine of normal and ray, positive where a surface looks away. Without a graph
        there are normals always, and some rays at a time.
        """
        self._check(shading, light)
        rays = Rays.of(cameras, self.radius, jitter, light)
        full = self._occupied()
        if torch.is_grad_enabled():
            found = self.march(rays, full, shading)
        else:
            parts = [self.march(some, full, shading) for some in rays.split(max(1, SAMPLES // self._most))]
            found = Marched(torch.cat([part.sums for part in parts], 1), {})
        sums = found.sums.view(-1, len(cameras), cameras.height, cameras.width).transpose(0, 1)
        ends = [self.channels, self.channels + 1, self.channels + 2]
        colour, alpha, depth, normals = torch.tensor_split(sums, ends, 1)
        image = colour + (1 - alpha) * background.to(colour)[:, :, None, None]
        return Views(image, alpha, depth, normals if normals.shape[1] else None, found.samples)

    def march(self, rays: Rays, full: Tensor | None, shading: Shading) -> Marched:
        """Looks along rays [R]; `full` says which cells are not empty."""
        edges = self.edges(rays, full)
        width = edges.diff(dim=1)
        place = edges[:, :-1] + rays.offset[:, None] * width
        points, keep = self._looked_at(rays, place, full)
        density, colour, normal = self.look(points, shading)
        whole = place.numel()
        weight = absorbed(spread(density, keep, whole).view_as(place) * width)
        if shading != "albedo":
            away = cast(Tensor, rays.light).index_select(0, keep // place.shape[1]) - points
            colour = shaded(colour, cast(Tensor, normal), away, shading)
        values = [colour.T] if normal is None else [colour.T, normal.T]
        seen = (spread(torch.cat(values), keep, whole).view(-1, *place.shape) * weight).sum(2)
        depth = (weight * place).sum(1) * rays.ahead
        sums = torch.cat([seen[: self.channels], weight.sum(1)[None], depth[None], seen[self.channels :]])
        return Marched(sums, self._samples(rays, weight, place, width, normal, keep))

    def edges(self, rays: Rays, full: Tensor | None) -> Tensor:
        """Intervals [R,S+1] of rays: even ones, or as a first pass without gradient proposes them."""
        first = self.sampling.proposal or self.sampling.samples
        share = torch.linspace(0, 1, first + 1, device=rays.near.device, dtype=rays.near.dtype)
        even = rays.near[:, None] + (rays.far - rays.near)[:, None] * share
        if not self.sampling.proposal:
            return even
        with torch.no_grad():
            width = even.diff(dim=1)
            place = even[:, :-1] + rays.offset[:, None] * width
            points, keep = self._looked_at(rays, place, full)
            density = spread(self.body.density(points), keep, place.numel()).view_as(place)
            return refined(even, absorbed(density * width), self.sampling.samples)

    def look(self, points: Tensor, shading: Shading) -> tuple[Tensor, Tensor, Tensor | None]:
        """Density [P], colour [P,C] and, where they are needed, normals [P,3] at points [P,3], at least in float32."""
        wanted = self.oriented or shading != "albedo" or not torch.is_grad_enabled()
        if wanted and self.step is None:
            return self.sloped(points)
        density, colour = self.body(points)
        return _wide(density), _wide(colour), self.differences(points, cast(float, self.step)) if wanted else None

    def sloped(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Density [P], colour [P,C] and normals [P,3], against the density's gradient; with a graph if there is one."""
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            density, colour = self.body(points)
            (slope,) = torch.autograd.grad(density.sum(), points, create_graph=graph)
        normal = F.normalize(-_wide(slope), dim=1, eps=1e-6)
        if not graph:
            density, colour = density.detach(), colour.detach()
        return _wide(density), _wide(colour), normal

    def differences(self, points: Tensor, step: float) -> Tensor:
        """Normals [P,3] by central differences."""
        moved = points.new_tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1]]) * step
        density = self.body.density((points[None] + moved[:, None]).view(-1, 3)).view(2, 3, -1)
        return F.normalize((density[1] - density[0]).T / (2 * step), dim=1, eps=1e-6)

    @property
    def _most(self) -> int:
        return max(self.sampling.samples, self.sampling.proposal)

    def _check(self, shading: Shading, light: Tensor | None) -> None:
        if shading != "albedo" and self.channels != fields.RGB:
            raise BadInput("latent channels are no colours that a lamp could light; use albedo")
        if shading != "albedo" and light is None:
            raise BadInput(f"shading {shading} needs a lamp; say where it stands")

    def _looked_at(self, rays: Rays, place: Tensor, full: Tensor | None) -> tuple[Tensor, Tensor]:
        """Points [P,3] of samples at places [R,S] that are in the ball and not in empty cells, and their numbers [P].

        The numbers' count has to be known on the host: on a GPU this waits once a pass.
        """
        points = (rays.origin[:, None] + rays.ray[:, None] * place[..., None]).view(-1, 3)
        inside = (rays.far > rays.near)[:, None].expand_as(place).reshape(-1)
        if full is not None:
            side = self.sampling.occupancy
            cell = ((points / self.radius + 1) * (side / 2)).long().clamp(0, side - 1)
            inside = inside & full.index_select(0, (cell[:, 0] * side + cell[:, 1]) * side + cell[:, 2])
        keep = inside.nonzero()[:, 0]
        return points.index_select(0, keep), keep

    @torch.no_grad()
    def _occupied(self) -> Tensor | None:
        """Which cells [side^3] and their neighbours hold something, from the density at the cells' corners.

        It is made anew for every rendering: a grid kept between steps would have to be part of checkpoints.
        """
        side = self.sampling.occupancy
        if not side:
            return None
        like = next(p for p in cast(nn.Module, self.body).parameters() if p.is_floating_point())
        axis = torch.linspace(-self.radius, self.radius, side + 1, device=like.device, dtype=like.dtype)
        points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
        found = torch.cat([self.body.density(some) for some in torch.split(points, SAMPLES)])
        density = found.view(1, 1, *3 * (side + 1,))
        for kernel in ((4, 1, 1), (1, 4, 1), (1, 1, 4)):  # a cell's two corners and one more on both sides
            density = F.max_pool3d(density, kernel, 1, tuple(size // 4 for size in kernel))
        return (density * (2 * self.radius) > FAINT).flatten()

    def _samples(
        self, rays: Rays, weight: Tensor, place: Tensor, width: Tensor, normal: Tensor | None, keep: Tensor
    ) -> dict[str, Tensor]:
        """What regularisers read."""
        if not torch.is_grad_enabled():
            return {}
        found = {"weights": weight, "places": place, "widths": width}
        if normal is None:
            return found
        facing = (normal * rays.ray.index_select(0, keep // place.shape[1])).sum(1)
        return found | {"facing": spread(facing, keep, place.numel()).view_as(place)}


def _wide(x: Tensor) -> Tensor:
    """Compositing in half precision loses thin matter (DreamFusion users' black scenes)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def scene(config: settings.Nerf, channels: int) -> Nerf:
    """A fresh scene of so many channels."""
    body = fields.build(config.field, channels, config.radius)
    return Nerf(body, config.sampling, config.oriented, config.step)


def build(config: settings.Nerf, build: Build) -> SceneStudent:
    """Factory of the student `threed.nerf`: `particles` scenes, seen through the teacher's codec or as its latents."""
    model: Model = build.piece("teacher")
    channels = model.shape[0] if config.latent else fields.RGB
    scenes = [scene(config, channels) for _ in range(config.particles)]
    return SceneStudent(scenes, model.codec, encodes=not config.latent).to(build.device)
