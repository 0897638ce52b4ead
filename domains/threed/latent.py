"""Scenes of a teacher's latent channels (Latent-NeRF), the codec that makes latents of patches, and a guide of shape.

Legend: V views, H and W pixels, C latent channels, P points, M faces, K sides of a patch, D = 3 K K numbers of one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Codec
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Output, Prediction
from limbeck.core.distillation.source import Source, plain
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player, Single
from limbeck.core.run.rng import generator
from limbeck.domains.threed import config as settings
from limbeck.domains.threed import textured
from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.objects import objects
from limbeck.domains.threed.scene import Growing, SceneStudent, Views, like

PLAIN, SMALL, MOVED = 64, 8, 4  # pixels and latents along a side of plain pictures, how often each latent is moved
BANK = 64  # pictures of noise
FINE = 2**20  # steps of the tables in a unit
POOL, SURFACE = 2**13, 2**12  # places that a guide is asked at, places on its surface
SURE = 0.01  # an indicator counts as this far from 0 and 1


class LatentScene(nn.Module):
    """A Scene of RGB around one of latent channels: latents are composited, a linear map makes colours of the sum.

    Until step `rgb` the latents themselves are what the teacher judges (`aux["latent"]`) and the map is fixed; from
    then on it is the picture, which the codec encodes, and the map learns too (Latent-NeRF, section 3.3; a map of each
    point and of the sum are the same). A scene that is not in training is in its last state.
    """

    channels = 3
    to_latent: Tensor

    def __init__(self, inner: Any, codec: Codec, device: torch.device, rgb: int | None) -> None:
        super().__init__()
        self.inner, self.rgb, self.latent = inner, rgb, rgb is None
        self.radius: float = inner.radius
        to_latent, to_rgb = colour_maps(codec, inner.channels, device)
        self.register_buffer("to_latent", to_latent, persistent=False)
        self.to_rgb = nn.Parameter(to_rgb)

    @property
    def body(self) -> Any:
        """The field inside, for what regularises it."""
        return self.inner.body

    def at(self, step: int) -> None:
        """A step begins: latents before `rgb`, pictures afterwards."""
        self.latent = self.rgb is None or step < self.rgb
        if isinstance(self.inner, Growing):
            self.inner.at(step)

    def render(self, cameras: Cameras, background: Tensor, jitter: Tensor | None = None) -> Views:
        """Pictures over background [V,3]; with aux `latent` [V,C,H,W] as long as the latents are what is judged."""
        ground = affine(self.to_latent, background.to(self.to_rgb)[..., None, None])
        views: Views = self.inner.render(cameras, ground[..., 0, 0], jitter)
        aux = views.aux | ({"latent": views.image} if self.latent else {})
        return Views(affine(self.to_rgb, views.image), views.alpha, views.depth, views.normals, aux)

    def field(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P] and colour [P,3] at points [P,3]."""
        density, latent = self.inner.field(points)
        return density, affine(self.to_rgb, latent[..., None, None])[..., 0, 0].clamp(-1, 1)


def affine(by: Tensor, x: Tensor) -> Tensor:
    """Channels [V,A,H,W] as [V,B,H,W] by a table [A+1,B], whose last row is added."""
    found: Tensor = torch.einsum("vahw,ab->vbhw", x, by[:-1]) + by[-1][:, None, None]
    return found


@torch.no_grad()
def colour_maps(codec: Codec, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables [4,C] from colours to latents and [C+1,3] back, by least squares.

    There: plain pictures of 27 colours, encoded. Back: those latents, moved at random, each plain over a picture, and
    decoded. Latent-NeRF has a table for Stable Diffusion alone.
    """
    level = torch.linspace(-0.9, 0.9, 3, device=device)
    colour = torch.cartesian_prod(level, level, level)
    latent = codec.encode(plain_picture(colour, PLAIN)).flatten(2).mean(2)
    if latent.shape[1] != channels:
        raise BadInput(f"the teacher's codec makes {latent.shape[1]} channels, and the scene has {channels}")
    stray = torch.randn(MOVED, len(latent), channels, generator=generator(0, "threed.colour_maps", 0)).to(latent)
    moved = (latent + latent.std() * stray).flatten(0, 1)
    back = codec.decode(plain_picture(moved, SMALL)).flatten(2).mean(2)
    return table(colour, latent), table(moved, back)


def plain_picture(values: Tensor, side: int) -> Tensor:
    """[V,C] as pictures [V,C,side,side]."""
    return values[..., None, None].expand(-1, -1, side, side)


def table(x: Tensor, y: Tensor) -> Tensor:
    """The affine map [A+1,B] that is nearest to taking x [V,A] to y [V,B]."""
    rows = F.pad(x.double(), (0, 1), value=1.0)
    found: Tensor = torch.linalg.lstsq(rows, y.double()).solution
    return (found * FINE).round().div(FINE).float()  # what should be 0 comes out as another 1e-17 at every call


def build(config: settings.Latent, build: Build) -> SceneStudent:
    """Factory of the student `threed.latent`: scenes of the student `of`, in the teacher's latent channels."""
    if "latent" not in type(config.of).model_fields:
        raise BadInput(f"student.of: {config.of.kind} has no latent channels; use threed.nerf or threed.gaussians")
    model: Model = build.piece("teacher")
    inner: SceneStudent = build.part("student", config.of.model_copy(update={"latent": True}))
    rgb = None if config.rgb is None else int(config.rgb)
    scenes = [LatentScene(scene, model.codec, build.device, rgb) for scene in inner.scenes]
    return SceneStudent(scenes, model.codec).to(build.device)


class Patches(nn.Module):
    """A codec of patches [K,K] of pixels: their mean colour and the first C - 3 principal components of the rest.

    Components of whole patches would spend three of four on light and its slopes, and all would be brown. latent =
    rows (patch - mean); decoding gives the nearest patch that the latent can say. Directions are orthonormal, so that
    noise of variance 1 in pixels has variance 1 in latents.
    """

    rows: Tensor
    mean: Tensor

    def __init__(self, rows: Tensor, mean: Tensor) -> None:
        """rows [C,D] and mean [D]."""
        super().__init__()
        self.side = math.isqrt(rows.shape[1] // 3)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("mean", mean, persistent=False)

    @classmethod
    def of(cls, pictures: Tensor, side: int, channels: int) -> Patches:
        """Fitted to pictures [V,3,H,W]; a direction's largest entry is positive."""
        patch = F.pixel_unshuffle(pictures, side).movedim(1, -1).reshape(-1, 3 * side * side).double()
        mean = patch.mean(0)
        colour = torch.eye(3, dtype=mean.dtype, device=mean.device).repeat_interleave(side * side, 1) / side
        rest = (patch - mean) - (patch - mean) @ colour.T @ colour
        vectors = torch.linalg.eigh(rest.T @ rest).eigenvectors.T.flip(0)[: channels - 3]
        signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
        return cls(torch.cat([colour, vectors * signs]).float(), mean.float())

    def encode(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        """Pixels [V,3,H,W] to latents [V,C,H/K,W/K]."""
        return self.down(F.pixel_unshuffle(x, self.side) - self.mean[:, None, None])

    def decode(self, z: Tensor) -> Tensor:
        """Latents to pixels."""
        return F.pixel_shuffle(self.up(z) + self.mean[:, None, None], self.side)

    def read(self, z: Tensor, space: str) -> Tensor:
        """Pixels, whatever they are called."""
        return self.decode(z)

    def down(self, patch: Tensor) -> Tensor:
        """[V,D,h,w] along the directions."""
        return torch.einsum("cd,vdhw->vchw", self.rows, patch)

    def up(self, z: Tensor) -> Tensor:
        """[V,C,h,w] as patches."""
        return torch.einsum("cd,vchw->vdhw", self.rows, z)


class PatchDenoiser(Denoiser):
    """A teacher of pixels seen through `Patches`: x0 of latents, exact where pictures have no other components.

    x_t of pixels = up(z_t) + alpha mean + sigma (noise of the other directions), which is one of BANK fixed pictures,
    chosen by the last bits of t: a net without draws of its own that is given fresh noise at each t all the same.
    """

    noise: Tensor

    def __init__(self, inner: Any, codec: Patches, noise: Tensor) -> None:
        """noise [BANK,D,h,w] along the directions that the codec drops."""
        super().__init__(inner.process, "x0")
        self.inner, self.codec = inner, codec
        self.register_buffer("noise", noise, persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        """x0 [V,C,h,w]; cameras are told the size of the pixels."""
        alpha, sigma = self.process.coefficients(t, x_t)
        which = (t.double() * 2**24).long() % BANK
        whole = self.codec.up(x_t) + alpha * self.codec.mean[:, None, None]
        whole = whole + sigma * self.noise.index_select(0, which)
        pixels = F.pixel_shuffle(whole, self.codec.side)
        if "camera" in cond:
            size = cond["camera"].new_tensor(pixels.shape[2:]).expand(len(pixels), 2)
            cond = {**cond, "camera": torch.cat([cond["camera"][:, :13], size], 1)}
        found: Prediction = self.inner.predict(pixels, t, cond)
        return self.codec.encode(found.x0)

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the inner teacher knows."""
        found: tuple[str, ...] = self.inner.prompts
        return found

    def known(self, prompt: str) -> Known | None:
        """The object's pictures, as the inner teacher has them."""
        found: Known | None = self.inner.known(prompt)
        return found


def patches(config: settings.Patches, build: Build) -> Model:
    """Factory of the teacher `threed.patches`: the codec is fitted to the training views of the embedded objects."""
    inner: Model = build.part("teacher", config.of)
    pixels = objects().training[:, ::4, :3].flatten(0, 1).float() / 127.5 - 1
    codec = Patches.of(pixels, config.side, config.channels)
    shape = (config.channels, *(side // config.side for side in inner.shape[1:]))
    noise = torch.randn(BANK, 3 * config.side**2, *shape[1:], generator=generator(build.seed, "threed.patches", 0))
    denoiser = PatchDenoiser(inner.denoiser, codec, noise - codec.up(codec.down(noise))).to(build.device)
    return Model(denoiser, shape, denoiser.codec, inner.encode, f"{inner.name} in patches", inner.uncond)


def winding(corners: Tensor, points: Tensor) -> Tensor:
    """How often faces [M,3,3] go around points [P,3]: solid angles over 4 pi (Van Oosterom and Strackee 1983)."""
    a, b, c = corners.unbind(1)
    volume = (a * torch.linalg.cross(b, c)).sum(1)
    flux = torch.linalg.cross(a, b) + torch.linalg.cross(b, c) + torch.linalg.cross(c, a)
    found = []
    for p in torch.split(points, 512):
        ab, bc, ca, aa, bb, cc = (dots(p, x, y) for x, y in ((a, b), (b, c), (c, a), (a, a), (b, b), (c, c)))
        la, lb, lc = (x.clamp_min(0).sqrt() for x in (aa, bb, cc))
        angle = torch.atan2(volume - p @ flux.T, la * lb * lc + ab * lc + bc * la + ca * lb)
        found.append(angle.sum(1) / (2 * math.pi))
    return torch.cat(found)


def dots(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(x - p) . (y - p) of points p [P,3] and corners x, y [M,3], as [P,M]."""
    return (x * y).sum(1) - p @ (x + y).T + p.square().sum(1, keepdim=True)


class Guide:
    """A coarse mesh as a guide of shape: places [P,3], whether they are inside [P], and how much they count [P]."""

    def __init__(self, corners: Tensor, sigma: float, radius: float, gen: torch.Generator) -> None:
        """Faces [M,3,3] of scene units; weight = 1 - exp(-d^2 / (2 sigma^2)), d to the nearest of SURFACE places."""
        self.points = (2 * torch.rand(POOL, 3, generator=gen) - 1) * radius
        area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1)
        face = torch.multinomial(area, SURFACE, replacement=True, generator=gen)
        share = -(torch.rand(SURFACE, 3, generator=gen).clamp_min(1e-12).log())
        surface = (corners[face] * (share / share.sum(1, keepdim=True))[..., None]).sum(1)
        away = torch.cat([torch.cdist(some, surface).amin(1) for some in torch.split(self.points, 1024)])
        self.inside = (winding(corners, self.points).abs() > 0.5).float()  # whichever way its faces look
        self.weight = 1 - torch.exp(-away.square() / (2 * sigma**2)) if sigma else torch.ones_like(away)


def sketched(density: Tensor, inside: Tensor, weight: Tensor, length: float) -> Tensor:
    """Sketch-Shape (Latent-NeRF, equation 3): weighted cross-entropy of occupancies 1 - exp(-length s) [P], the mean.

    Linear in the occupancy, the clamped indicator being under the logarithm, as in the authors' code. Deviation: a
    mean over places of space, not a sum over the samples of rays.
    """
    filled, sure = -torch.expm1(-length * density), inside.clamp(SURE, 1 - SURE)
    return -(weight * (filled * sure.log() + (1 - filled) * (1 - sure).log())).mean()


class Sketch(Single):
    """The loss `threed.sketch`: each step asks the scene at some of the guide's places."""

    def __init__(self, source: Source, config: settings.Sketch, player: Player, guide: Guide) -> None:
        super().__init__(player)
        self.source, self.config, self.guide = source, config, guide

    def terms(self, ctx: Context) -> dict[str, Tensor]:
        """The loss at this step's places."""
        student: Any = self.source.student
        scene = student.particle(self.source.sampled(ctx).cond)
        some = torch.randint(POOL, (self.config.points,), generator=ctx.draws.gen("threed.sketch"))
        points, inside, weight = (x[some].to(like(scene)) for x in vars(self.guide).values())
        return {"sketch": sketched(scene.field(points)[0], inside, weight, self.config.length)}


def sketch(config: settings.Sketch, build: Build) -> Sketch:
    """Factory of the loss `threed.sketch`; it shares the student's player, and so its `optim`, with the others."""
    source = Source.of(build)
    mesh = textured.scene(settings.Mesh(of=config.guide, up=config.up), build)
    corners = config.size * mesh.places[mesh.weld[mesh.faces]]
    scenes: Any = source.student.scenes
    guide = Guide(corners, config.sigma, float(scenes[0].radius), generator(build.seed, "threed.sketch", 0))
    return Sketch(source, config, build.player("student", source.student, plain(config.optim)), guide)
