"""The closed-form teacher of 3D: eight known objects whose pictures at any camera are normal around their true view.

Every azimuth of an object differs (front and back colour, stripes, a patch on the front alone), so that a wrong camera,
sign or mirror costs decibels. Legend: V views, H and W pixels, N points, K objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Output
from limbeck.core.diffusion.process import Process, process
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, did_you_mean
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.cameras import Cameras, orbit
from limbeck.domains.threed.known import Known

SAMPLES = 64  # along a ray
SHARP = 0.02  # scene units over which a surface rises
DENSE = 80.0


@dataclass(frozen=True)
class Solid:
    """A shape and its colours in [0, 1]: front (x > 0), back, and the patch on the front."""

    shape: str
    front: tuple[float, float, float]
    back: tuple[float, float, float]
    patch: tuple[float, float, float]

    def distance(self, p: Tensor) -> Tensor:
        """Signed distance [N] of points [N,3], negative inside; all shapes fit into a ball of radius .75."""
        x, y, z = p.unbind(-1)
        flat = torch.hypot(x, y)
        if self.shape in ("sphere", "torus"):
            centre = torch.hypot(flat, z) if self.shape == "sphere" else torch.hypot(flat - 0.45, z)
            return centre - (0.55 if self.shape == "sphere" else 0.2)
        sides = [flat - 0.4] if self.shape == "cylinder" else [x.abs() - 0.42, y.abs() - 0.42]
        away = torch.stack([*sides, z.abs() - (0.5 if self.shape == "cylinder" else 0.42)], -1)
        outside: Tensor = away.clamp_min(0).norm(dim=-1)
        return outside + away.amax(-1).clamp_max(0)

    def colour(self, p: Tensor) -> Tensor:
        """Colour [N,3] in [0, 1] at points [N,3]."""
        x, y, z = p.unbind(-1)
        front, back, patch = (p.new_tensor(value) for value in (self.front, self.back, self.patch))
        base = torch.where((x > 0)[..., None], front, back)
        base = base * torch.where(torch.sin(z * 14) > 0, 1.0, 0.65)[..., None]
        here = (torch.atan2(y, x).abs() < 0.45) & (z.abs() < 0.35)
        return torch.where(here[..., None], patch, base)


RED, BLUE, GREEN, YELLOW = (0.9, 0.15, 0.1), (0.1, 0.2, 0.9), (0.1, 0.75, 0.2), (0.95, 0.85, 0.1)
SOLIDS = {
    "a red and blue sphere with a green patch": Solid("sphere", RED, BLUE, GREEN),
    "a red and blue cube with a green patch": Solid("cube", RED, BLUE, GREEN),
    "a red and blue torus with a green patch": Solid("torus", RED, BLUE, GREEN),
    "a red and blue cylinder with a green patch": Solid("cylinder", RED, BLUE, GREEN),
    "a green and yellow sphere with a red patch": Solid("sphere", GREEN, YELLOW, RED),
    "a green and yellow cube with a red patch": Solid("cube", GREEN, YELLOW, RED),
    "a green and yellow torus with a red patch": Solid("torus", GREEN, YELLOW, RED),
    "a green and yellow cylinder with a red patch": Solid("cylinder", GREEN, YELLOW, RED),
}
PROMPTS = list(SOLIDS)


@torch.no_grad()
def truth(solid: Solid, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """The object's pictures [V,3,H,W] in [-1, 1] on white, and alpha [V,1,H,W], by volume rendering its distance."""
    origin, ray = cameras.rays()
    middle = cameras.position.norm(dim=1)[:, None, None, None]
    depth = middle - 0.85 + 1.7 * (torch.arange(SAMPLES, device=ray.device) + 0.5) / SAMPLES
    points = origin[..., None, :] + ray[..., None, :] * depth[..., None]
    density = DENSE * torch.sigmoid(-solid.distance(points) / SHARP)
    passed = torch.exp(-density * 1.7 / SAMPLES)
    light = torch.cumprod(torch.cat([torch.ones_like(passed[..., :1]), passed], -1), -1)
    weight = light[..., :-1] * (1 - passed)
    alpha = weight.sum(-1, keepdim=True)
    colour = (weight[..., None] * solid.colour(points)).sum(-2) + 1 - alpha
    return colour.movedim(-1, 1) * 2 - 1, alpha.movedim(-1, 1)


class Posed(Denoiser):
    """x0 of p(x | object, camera) = N(view, std^2); without an object the equal mixture of all at the same camera."""

    prompts = tuple(SOLIDS)

    def __init__(self, law: Process, std: float, size: int = 32) -> None:
        super().__init__(law, "x0")
        self.std, self.size = std, size

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        """The exact x0 [B,3,H,W]; cond has object [B] (-1: none) and camera [B,15]."""
        alpha, sigma = self.process.coefficients(t, x_t)
        variance = (alpha * self.std) ** 2 + sigma**2
        means, cameras = torch.empty_like(x_t), Cameras.of(cond["camera"])
        known = cond["object"].tolist()
        for kind in set(known):
            rows = torch.tensor([i for i, other in enumerate(known) if other == kind], device=x_t.device)
            some = cameras.pick(rows)
            if kind >= 0:
                means[rows] = truth(SOLIDS[PROMPTS[kind]], some)[0].to(x_t)
            else:
                means[rows] = self._mixed(x_t[rows], alpha[rows], variance[rows], some)
        return means + alpha * self.std**2 / variance * (x_t - alpha * means)

    def known(self, prompt: str) -> Known | None:
        """The object's pictures at the held-out cameras."""
        if prompt not in SOLIDS:
            return None
        cameras = held_out(self.size)
        return Known(cameras, *truth(SOLIDS[prompt], cameras))

    def _mixed(self, x_t: Tensor, alpha: Tensor, variance: Tensor, cameras: Cameras) -> Tensor:
        """The expected view [B,3,H,W] of the object that x_t may show, all being as likely before."""
        views = torch.stack([truth(solid, cameras)[0] for solid in SOLIDS.values()]).to(x_t)
        misfit = (x_t - alpha * views).square().flatten(2).sum(2) / (2 * variance.flatten()[None])
        share = torch.softmax(-misfit, 0)
        return torch.einsum("kb,kbchw->bchw", share, views)


def encode(prompts: list[str]) -> Encoded:
    """object [B]: -1 for the empty prompt."""
    for prompt in prompts:
        if prompt and prompt not in SOLIDS:
            raise BadInput(f"there is no solid {prompt!r}{did_you_mean(prompt, PROMPTS)}; known: {'; '.join(PROMPTS)}")
    return {"object": torch.tensor([PROMPTS.index(prompt) if prompt else -1 for prompt in prompts])}


def build(config: settings.Solids, build: Build) -> Model:
    """Factory of the teacher `threed.solids`."""
    shape = (3, config.size, config.size)
    return Model(Posed(process(config.process), config.std, config.size).to(build.device), shape, Identity(),
                 lambda prompts: {k: v.to(build.device) for k, v in encode(prompts).items()}, "solids")  # fmt: skip


def held_out(size: int, distance: float = 2.6) -> Cameras:
    """Twelve cameras that no law draws exactly: eight at elevation 15, four at 35."""
    low, high = 8, 4
    azimuth = torch.cat([torch.arange(low) * (2 * math.pi / low) + math.pi / 8, torch.arange(high) * math.pi / 2 + 0.3])
    elevation = torch.cat([torch.full((low,), 15.0), torch.full((high,), 35.0)]) * math.pi / 180
    one = torch.ones(low + high)
    return orbit(azimuth, elevation, one * distance, one * math.radians(40), size, size)
