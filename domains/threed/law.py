"""The slot `data` of a run that makes an asset: its prompt, and the cameras, light and ground of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.run.build import Batch, Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.cameras import UP, Cameras, direction, lamp, look_at, orbit
from limbeck.domains.threed.objects import vectors
from limbeck.domains.threed.scene import SHADINGS


@dataclass(frozen=True)
class Law:
    """One prompt, or one of several at each step, and the law of cameras (DreamFusion)."""

    config: settings.Law

    def prompts(self, n: int, gen: Generator, rows: slice) -> list[str]:
        """The step's prompt, the same for all views."""
        some = self.config.prompts
        chosen = some[int(torch.randint(len(some), (1,), generator=gen))] if some else self.config.prompt
        return [chosen] * len(range(n)[rows])

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """Prompts alone: a scene is made without pictures."""
        return Batch(None, self.prompts(n, gen, rows))

    def ask(self, ctx: Context, prompts: list[str]) -> tuple[list[str], Encoded]:
        """Prompts, with their view in words where asked for, and the rows camera, background, jitter and particle."""
        cameras = self.cameras(ctx)
        asked = {"camera": cameras.rows(), "background": self.background(ctx)}
        asked |= {"jitter": ctx.draws.uniform("threed.jitter")}
        asked["particle"] = self.shared(ctx, "threed.particle").expand(ctx.batch)
        asked["step"] = torch.full((ctx.batch,), ctx.step)
        if self.config.prompts:
            asked["sentence"] = vectors(prompts).to(ctx.device)
        return self.worded(prompts, cameras), asked | self.lamp(ctx, cameras)

    def shared(self, ctx: Context, stream: str) -> Tensor:
        """One uniform number [1] for all views and processes."""
        return torch.rand(1, generator=ctx.draws.gen(stream))

    def lamp(self, ctx: Context, cameras: Cameras) -> Encoded:
        """The rows light [b,3] and shading [b] of steps with a lamp, half of them without colour (DreamFusion)."""
        share = ctx.at(self.config.albedo)
        drawn = float(self.shared(ctx, "threed.shading"))
        if drawn < share:
            return {}
        near = ctx.draws.uniform("threed.lamp_distance", lo=0.8, hi=1.5)
        place = lamp(cameras.position, ctx.draws.normal("threed.lamp", (3,)), near)
        kind = SHADINGS.index("diffuse" if drawn < (1 + share) / 2 else "textureless")
        return {"light": place, "shading": torch.full((ctx.batch,), kind)}

    def cameras(self, ctx: Context) -> Cameras:
        """This process's cameras of the step: azimuths share the circle, the rest is uniform."""
        size, law = int(ctx.at(self.config.size)), self.config
        count = ctx.global_batch
        turn = float(self.shared(ctx, "threed.turn"))
        place = torch.arange(count)[ctx.draws.rows].to(ctx.device)
        stray = ctx.at(law.spread) * ctx.draws.uniform("threed.azimuth", lo=-1.0, hi=1.0)
        low, high = (ctx.at(end) for end in law.azimuth)
        azimuth = low + (high - low) * ((turn + place + stray) / count % 1)
        elevation, distance, fov = (self.uniform(ctx, name) for name in ("elevation", "distance", "fov"))
        radians = math.pi / 180
        found = orbit(azimuth * radians, elevation * radians, distance, fov * radians, size, size)
        shake = ctx.at(law.jitter)
        if shake == 0:
            return found
        moved = found.position + shake * ctx.draws.uniform("threed.shake", (3,), -1.0, 1.0)
        up = moved.new_tensor(UP).expand_as(moved)
        return Cameras(look_at(moved, torch.zeros_like(moved), up), found.fov, size, size)

    def uniform(self, ctx: Context, name: str) -> Tensor:
        """One of the law's spans, [b]."""
        low, high = (ctx.at(end) for end in getattr(self.config, name))
        if low > high:
            raise BadInput(f"data.{name}: {low:g} is above {high:g} at step {ctx.step}; give the smaller one first")
        return ctx.draws.uniform(f"threed.{name}", lo=low, hi=high)

    def background(self, ctx: Context) -> Tensor:
        """Colours behind the object, [b,3] in [-1, 1]."""
        if self.config.background == "random":
            return ctx.draws.uniform("threed.background", (3,), -1.0, 1.0)
        return torch.tensor(self.config.background, device=ctx.device).expand(ctx.batch, 3)

    def worded(self, prompts: list[str], cameras: Cameras) -> list[str]:
        """Prompts that say from where one looks, where the recipe asks for that."""
        if not self.config.words:
            return prompts
        azimuth, elevation = (torch.rad2deg(angle).tolist() for angle in cameras.angles())
        views = (direction(a, e, self.config.front) for a, e in zip(azimuth, elevation, strict=True))
        return [f"{prompt}, {view} view" for prompt, view in zip(prompts, views, strict=True)]


def build(config: settings.Law, build: Build) -> Law:
    """Factory of the data `threed.law`."""
    if not all(prompt.strip() for prompt in config.prompts or [config.prompt]):
        raise BadInput("there is no prompt; say what the asset is to be: --prompt 'a horse'")
    return Law(config)
