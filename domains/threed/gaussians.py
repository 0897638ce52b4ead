"""A scene of 3D Gaussians: a fixed number of rows, some of them dead, shown by gsplat on CUDA or by our own tiles.

Colours are spherical harmonics of degree 0 as splat files hold them: pixel = clamp(2 * .2821 * raw) in [-1, 1]; latent
channels are shown as they are. Legend: V views, N rows (the capacity), n living ones, C channels, P points.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from limbeck.core.diffusion.denoiser import Model
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.rasteriser import BLUR, NEAR, Picture, Splats, render, rotation
from limbeck.domains.threed.scene import SceneStudent, Views

HARMONIC = 0.28209479177387814  # the spherical harmonic of degree 0: 1 / (2 sqrt(pi))
FULL = 0.5 / HARMONIC * (1 - 1e-6)  # a raw colour just inside the range, where it still has a gradient
DEAD, ALIVE = -100.0, -50.0  # the opacity logit of a dead row, and what a living one's is above
SMALLEST, LARGEST = -5.0, math.log(0.2)  # log scales
PARTS = ("means", "scales", "quats", "opacity", "colours")
BLOCKS, REACH, PAIRS = 16, 4.0, 2**21  # of a field: blocks along a side, sigmas of a splat, pairs at a time


class Gaussians(nn.Module):
    """A Scene of means [N,3], log scales [N,3], quaternions [N,4] (w x y z), opacity logits [N] and raw colours [N,C].

    Shapes never change: a row whose opacity logit is below -50 is dead, is not shown and has no gradient.
    """

    means: nn.Parameter
    scales: nn.Parameter
    quats: nn.Parameter
    opacity: nn.Parameter
    colours: nn.Parameter

    def __init__(self, splats: Splats, capacity: int | None = None, radius: float = 1.0) -> None:
        """Rows beyond the splats' are dead."""
        super().__init__()
        count, self.radius, self.channels = len(splats.means), radius, splats.colours.shape[1]
        more = max(0, (capacity or count) - count)
        grown = {name: F.pad(getattr(splats, name), (0, 0, 0, more)) for name in PARTS if name != "opacity"}
        grown["quats"][count:, 0] = 1.0
        for name, value in grown.items():
            setattr(self, name, nn.Parameter(value))
        self.opacity = nn.Parameter(F.pad(splats.opacity, (0, more), value=DEAD))

    @classmethod
    def ball(cls, config: settings.Gaussians, channels: int, gen: Generator) -> Gaussians:
        """Splats at random places of a ball, round, faint and of almost one grey."""
        n = config.count
        way = F.normalize(torch.randn(n, 3, generator=gen), dim=1)
        means = way * config.radius * torch.rand(n, 1, generator=gen) ** (1 / 3)
        quats = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(n, 1)
        scales, opacity = torch.full((n, 3), math.log(config.scale)), torch.full((n,), config.opacity).logit()
        colours = 0.1 * torch.randn(n, channels, generator=gen)
        return cls(Splats(means, scales, quats, opacity, colours), config.capacity)

    @property
    def alive(self) -> Tensor:
        """Which rows are alive, bool [N]."""
        return self.opacity.detach() > ALIVE

    def living(self) -> tuple[Splats, Tensor]:
        """The splats that are alive with colours as they are shown, and their rows [n]."""
        rows = self.alive.nonzero()[:, 0]
        means, scales, quats, opacity, raw = (
            value.index_select(0, rows) for value in (self.means, self.scales, self.quats, self.opacity, self.colours)
        )
        colours = (2 * HARMONIC * raw).clamp(-1, 1) if self.channels == 3 else raw
        return Splats(means, scales, quats, opacity, colours), rows

    @torch.no_grad()
    def constrain(self) -> None:
        """Keep log scales in [-5, log .2] and colours where they have a gradient; to be called between steps."""
        self.scales.clamp_(SMALLEST, LARGEST)
        if self.channels == 3:
            self.colours.clamp_(-FULL, FULL)

    @torch.no_grad()
    def at(self, step: int) -> None:
        """A step begins: what the last one pushed out of its range comes back."""
        self.constrain()

    def render(self, cameras: Cameras, background: Tensor, jitter: Tensor | None = None) -> Views:
        """Pictures over background [V,C]; splats have no samples to jitter. Normals come from the depth.

        With gradients, aux has `screen` [V,n,2], whose gradient is that of splats' places in pixels, and their `rows`.
        """
        splats, rows = self.living()
        fast = splats.means.is_cuda and splats.means.dtype == torch.float32 and importlib.util.find_spec("gsplat")
        picture, screen = (by_gsplat if fast else by_tiles)(splats, cameras.to(splats.means))
        aux = {"screen": screen, "rows": rows} if screen.requires_grad else {}
        image = picture.colour + (1 - picture.alpha) * background.to(picture.colour)[..., None, None]
        normals = picture.alpha * facing(picture, cameras.to(picture.depth))
        return Views(image, picture.alpha, picture.depth, normals, aux)

    def field(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P], the sum of opacity exp(-d^T Sigma^-1 d / 2), and its mean colour [P,C] at points [P,3]."""
        return field(self.living()[0], points)


def by_tiles(splats: Splats, cameras: Cameras) -> tuple[Picture, Tensor]:
    """Our own rasteriser; the second is `screen` [V,n,2], offsets of zero."""
    size = (len(cameras), len(splats.means), 2)
    screen = splats.means.new_zeros(size).requires_grad_(torch.is_grad_enabled() and splats.means.requires_grad)
    return render(splats, cameras, screen), screen


def by_gsplat(splats: Splats, cameras: Cameras) -> tuple[Picture, Tensor]:
    """The same by gsplat (CUDA, float32); the second is the splats' places [V,n,2] in pixels, with their gradient."""
    from gsplat import rasterization

    turn, shift = cameras.view()
    pose = F.pad(torch.cat([turn, shift[..., None]], 2), (0, 0, 0, 1))
    pose[:, 3, 3] = 1.0
    lens = torch.diag_embed(torch.stack([cameras.focal, cameras.focal, torch.ones_like(cameras.fov)], 1))
    lens[:, 0, 2], lens[:, 1, 2] = cameras.width / 2, cameras.height / 2
    values, alpha, info = rasterization(
        splats.means, splats.quats, splats.scales.exp(), splats.opacity.sigmoid(), splats.colours, pose, lens,
        cameras.width, cameras.height, near_plane=NEAR, eps2d=BLUR, packed=False, render_mode="RGB+D",
    )  # fmt: skip
    screen: Tensor = info["means2d"]
    if screen.requires_grad:
        screen.retain_grad()
    return Picture.of(torch.cat([values, alpha], -1).movedim(-1, 1)), screen


def facing(picture: Picture, cameras: Cameras) -> Tensor:
    """Unit normals [V,3,H,W] in the world of the surface that the mean depth shows, towards the camera.

    They are 0 where nothing is. Of the two neighbours along an axis the nearer one in space counts, so that outlines do
    not bend the surface.
    """
    origin, ray = cameras.rays()
    depth = (picture.depth / picture.alpha.clamp_min(1e-6)).movedim(1, -1)
    point = origin + ray * depth / (ray * cameras.forward[:, None, None]).sum(-1, keepdim=True)
    right, below = (_slope(point, axis) for axis in (2, 1))
    return F.normalize(torch.linalg.cross(below, right), dim=-1).movedim(-1, 1)


def _slope(point: Tensor, axis: int) -> Tensor:
    """The shorter of the differences of points [V,H,W,3] to the next and from the last one along an axis."""
    step = point.diff(dim=axis)
    if not step.shape[axis]:
        return torch.zeros_like(point)
    first, last = step.narrow(axis, 0, 1), step.narrow(axis, step.shape[axis] - 1, 1)
    ahead, behind = torch.cat([step, last], axis), torch.cat([first, step], axis)
    nearer = ahead.detach().square().sum(-1, keepdim=True) < behind.detach().square().sum(-1, keepdim=True)
    return torch.where(nearer, ahead, behind)


@dataclass(frozen=True)
class Blobs:
    """Splats as a field asks them: places [n,3], half sides of boxes [n,3], whiteners [n,3,3], opacities, colours."""

    means: Tensor
    reach: Tensor
    white: Tensor
    opacity: Tensor
    colours: Tensor

    @classmethod
    def of(cls, splats: Splats) -> Blobs:
        """Beyond REACH sigmas a splat has no density."""
        axes = splats.axes()
        white = rotation(splats.quats) / splats.scales.exp()[:, None]
        reach = REACH * axes.detach().square().sum(2).sqrt()
        return cls(splats.means, reach, white, splats.opacity.sigmoid(), splats.colours)

    def near(self, points: Tensor) -> Tensor:
        """The splats [k] whose boxes meet that of points [P,3]."""
        low, high = points.amin(0), points.amax(0)
        means = self.means.detach()
        return ((means + self.reach >= low) & (means - self.reach <= high)).all(1).nonzero()[:, 0]

    def at(self, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P] and density times colour [P,C] of the splats `index` [k] at points [P,3]."""
        white, means = self.white.index_select(0, index), self.means.index_select(0, index)
        away = (points[:, None] - means).unsqueeze(-2) @ white  # [P,k,1,3]
        square = away.square().sum((-2, -1))
        weight = self.opacity.index_select(0, index) * torch.where(square < REACH**2, (-0.5 * square).exp(), 0.0)
        return weight.sum(1), weight @ self.colours.index_select(0, index)


def field(splats: Splats, points: Tensor) -> tuple[Tensor, Tensor]:
    """Density [P] and mean colour [P,C] at points [P,3], block by block with the splats that reach each."""
    blobs, inside = Blobs.of(splats), points.detach()
    if not len(points):
        return points.new_zeros(0), points.new_zeros(0, splats.colours.shape[1])
    low, high = inside.amin(0), inside.amax(0)
    cell = ((inside - low) / (high - low).clamp_min(1e-12) * BLOCKS).long().clamp_max(BLOCKS - 1)
    block, order = ((cell[:, 0] * BLOCKS + cell[:, 1]) * BLOCKS + cell[:, 2]).sort(stable=True)
    sizes = torch.unique_consecutive(block, return_counts=True)[1].tolist()
    found = []
    for some in torch.split(points.index_select(0, order), sizes):
        index = blobs.near(some.detach())
        found += [blobs.at(few, index) for few in torch.split(some, max(1, PAIRS // max(1, len(index))))]
    density, colour = (torch.cat(parts).index_select(0, order.argsort()) for parts in zip(*found, strict=True))
    return density, colour / density.clamp_min(1e-12)[:, None]


def build(config: settings.Gaussians, build: Build) -> SceneStudent:
    """Factory of the student `threed.gaussians`: `particles` scenes, through the teacher's codec or as its latents."""
    if config.capacity is not None and config.capacity < config.count:
        raise BadInput(f"student: capacity {config.capacity} is below count {config.count}; raise it or lower count")
    model: Model = build.piece("teacher")
    channels = model.shape[0] if config.latent else 3
    gens = [generator(build.seed, "threed.gaussians", i) for i in range(config.particles)]
    scenes = [Gaussians.ball(config, channels, gen) for gen in gens]
    return SceneStudent(scenes, model.codec, encodes=not config.latent).to(build.device)
