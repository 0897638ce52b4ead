"""The slot `data` of a run that makes an asset: its prompt, and the cameras, light and ground of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from limbeck.core.diffusion.denoiser import Encoded, Model
from limbeck.core.run.build import Batch, Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.cameras import OVERHEAD, UP, Cameras, direction, lamp, look_at, orbit
from limbeck.domains.threed.objects import vectors
from limbeck.domains.threed.scene import SHADINGS

VIEWS = ("front", "side", "back", "overhead")


@dataclass(frozen=True)
class Law:
    """One prompt, or one of several at each step, and the law of cameras (DreamFusion)."""

    config: settings.Law
    together: int = 1  # neighbours that the teacher sees together: even azimuths of one elevation, distance and lens

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
        asked |= self.lamp(ctx, cameras)
        if self.config.words == "perp_neg":  # the prompt is the same for all views
            return [f"{prompts[0]}, {view} view" for view in VIEWS], asked | leaning(cameras, self.config.perp_neg)
        return self.worded(prompts, cameras), asked

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
        size, law, n = int(ctx.at(self.config.size)), self.config, self.together
        count = ctx.global_batch
        turn = float(self.shared(ctx, "threed.turn"))
        place = torch.arange(count)[ctx.draws.rows].to(ctx.device)
        stray = self.grouped(ctx.at(law.spread) * ctx.draws.uniform("threed.azimuth", lo=-1.0, hi=1.0))
        low, high = (ctx.at(end) for end in law.azimuth)
        first = (turn + place // n + stray) / (count // n)
        azimuth = low + (high - low) * ((first + place % n) / n % 1)
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
        return self.grouped(ctx.draws.uniform(f"threed.{name}", lo=low, hi=high))

    def grouped(self, drawn: Tensor) -> Tensor:
        """What was drawn for each view [b,...], the first of each group for all of it."""
        return drawn[:: self.together].repeat_interleave(self.together, 0)

    def background(self, ctx: Context) -> Tensor:
        """Colours behind the object, [b,3] in [-1, 1]."""
        if self.config.background == "random":
            return self.grouped(ctx.draws.uniform("threed.background", (3,), -1.0, 1.0))
        return torch.tensor(self.config.background, device=ctx.device).expand(ctx.batch, 3)

    def worded(self, prompts: list[str], cameras: Cameras) -> list[str]:
        """Prompts that say from where one looks, where the recipe asks for that."""
        if not self.config.words:
            return prompts
        azimuth, elevation = (torch.rad2deg(angle).tolist() for angle in cameras.angles())
        views = (direction(a, e, self.config.front) for a, e in zip(azimuth, elevation, strict=True))
        return [f"{prompt}, {view} view" for prompt, view in zip(prompts, views, strict=True)]


def leaning(cameras: Cameras, curves: settings.PerpNeg) -> Encoded:
    """Perp-Neg's rows for `guidance.blended` (arXiv 2304.04968; the default numbers are threestudio's).

    A view is a mix of the two nearest of front, side and back, and leans away from two: in front from both, behind
    from the side and the front. From overhead it is that view alone.
    """
    azimuth, elevation = (torch.rad2deg(angle) for angle in cameras.angles())
    away = azimuth.abs() / 90  # 0 front, 1 side, 2 back
    high, none = elevation > OVERHEAD, torch.zeros_like(away)
    shares = torch.stack([(1 - away).clamp_min(0), 1 - (1 - away).abs(), (away - 1).clamp_min(0), none], 1)
    overhead = torch.nn.functional.one_hot(torch.tensor(VIEWS.index("overhead")), len(VIEWS)).to(shares)
    near = torch.stack([decay(curves.front, 1 - away), decay(curves.side, away)], 1)
    far = torch.stack([decay(curves.front_behind, 2 - away), decay(curves.side_behind, 2 - away)], 1)
    weights = torch.where((away < 1)[:, None], near, far)
    return {
        "shares": torch.where(high[:, None], overhead, shares),
        "others": torch.tensor([VIEWS.index("front"), VIEWS.index("side")], device=away.device).expand(len(away), 2),
        "against": torch.where(high[:, None], 0.0, weights),
    }


def decay(curve: settings.Decay, r: Tensor) -> Tensor:
    """-(a exp(-b r) + c)."""
    a, b, c = curve
    return -(a * torch.exp(-b * r) + c)


def build(config: settings.Law, build: Build) -> Law:
    """Factory of the data `threed.law`."""
    if not all(prompt.strip() for prompt in config.prompts or [config.prompt]):
        raise BadInput("there is no prompt; say what the asset is to be: --prompt 'a horse'")
    model: Model = build.piece("teacher")
    if build.recipe.batch % (model.together * build.world * build.recipe.accumulate):
        raise BadInput(f"the teacher sees {model.together} views together: make the batch of each process a multiple")
    return Law(config, model.together)
