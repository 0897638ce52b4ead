"""The table of an asset run: every scene against its known object at cameras that training never drew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Model, repeat_cond
from limbeck.core.rewards.base import Reward
from limbeck.core.rewards.pieces import inner
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.threed import config as settings
from limbeck.domains.threed import known, metrics, space
from limbeck.domains.threed.cameras import Cameras, ring
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.scene import Scene, seen

Row = dict[str, float | str]
RING = 12  # views that a judge sees of an asset whose object is not known
LATE = 0.98  # the time at which the teacher's one-step prediction is taken: hardly anything of x is left


def build(config: settings.Quality, build: Build) -> Callable[[], list[Row]]:
    """Factory of the metric `threed.quality`."""
    return lambda: list(rows(config, build))


def rows(config: settings.Quality, build: Build) -> Iterator[Row]:
    """A row a scene; where the object is known also the teacher's own answer and a white picture."""
    for format in config.formats:
        build.note(f"writing {format}")
        build.piece("space").export(build, build.folder / "exports" / format, format)
    many, judge = len(space.texts(build)) > 1, Judge.of(config, build)
    for (prompt, scene), title in zip(space.shown(build), space.titles(build), strict=True):
        truth = Known.of(build, prompt)
        own = compared(build, scene, truth) if truth else {}
        yield {"what": title or "scene", **facts(scene), **own, **judge(scene, prompt, truth)}
    for prompt in space.texts(build):
        if truth := Known.of(build, prompt):
            of = f" of {prompt}" * many
            answer, white = one_step(build, truth, prompt), torch.ones_like(truth.image)
            yield {"what": f"teacher in one step at t = {LATE}{of}", "PSNR": known.psnr(answer, truth.image),
                   "SSIM": known.ssim(answer, truth.image)}  # fmt: skip
            if judge.judge is not None:
                yield {"what": f"the object itself{of}", **judge.fit(truth.image, prompt)}
            yield {"what": f"a white picture{of}", "PSNR": known.psnr(white, truth.image)}


def facts(scene: Scene) -> Row:
    """What can be said without knowing the object: its size, how much of the views it covers, how sharp it is."""
    found = seen(scene, ring(16, 32))
    count = sum(p.numel() for p in scene.parameters())
    return {"parameters": count, "covered": float(found.alpha.mean()), "sharpness": sharpness(found.image)}


def sharpness(image: Tensor) -> float:
    """The mean absolute difference of neighbouring pixels of pictures [V,C,H,W]."""
    across, down = image.diff(dim=3).abs().mean(), image.diff(dim=2).abs().mean()
    return float((across + down) / 2)


def compared(build: Build, scene: Scene, truth: Known) -> Row:
    """PSNR, SSIM and silhouettes against the true object, and which known object the views resemble most."""
    found = seen(scene, truth.cameras)
    image = pixels(build, found.image)
    best, other = retrieved(build, image)
    faces = metrics.janus(image, truth)
    return {
        "PSNR": known.psnr(image, truth.image),
        "SSIM": known.ssim(image, truth.image),
        "silhouette IoU": known.overlap(found.alpha, truth.alpha),
        "nearest object": best,
        "own prompt": float(torch.equal(other, truth.image)),
        "Janus": "" if faces is None else faces,
    }


def pixels(build: Build, image: Tensor) -> Tensor:
    """Pictures of a scene as RGB."""
    found: Tensor = build.piece("space").pixels(build, image) if build.has("space") else image
    return found


@dataclass(frozen=True)
class Judge:
    """What the recipe's rewards say of an asset's views; nothing without them."""

    build: Build
    judge: Reward | None
    likeness: Reward | None
    among: list[str]  # prompts of which one is to be found
    views: int

    @classmethod
    def of(cls, config: settings.Quality, build: Build) -> Judge:
        """The rewards that the recipe names."""
        judge, likeness = (inner(one, build) if one else None for one in (config.judge, config.likeness))
        denoiser: Any = build.piece("teacher").denoiser
        among = config.prompts or list(getattr(denoiser, "prompts", ()))
        if judge and not {*among} - {*space.texts(build)}:
            raise BadInput("a judge has to find the prompt among others; give some: eval.0.prompts")
        return cls(build, judge, likeness, among, config.views)

    def __call__(self, scene: Scene, prompt: str, truth: Known | None) -> Row:
        """The columns of one scene."""
        found: Row = {}
        if self.judge is not None:
            cameras = truth.cameras if truth else self.ring(RING)
            image = pixels(self.build, seen(scene, cameras).image)
            found |= self.fit(image, prompt)
            if truth is None:
                front, behind = metrics.front_words(self.judge, image, cameras, prompt)
                found |= {'"front" in front': front, '"front" behind': behind}
        if self.likeness is not None:
            image = pixels(self.build, seen(scene, self.ring(self.views)).image)
            found[f"A-{self.likeness.name}"] = metrics.between_neighbours(self.likeness, image)
        return found

    def fit(self, image: Tensor, prompt: str) -> Row:
        """R-precision of pictures [V,3,H,W] beside that of chance."""
        if self.judge is None:
            return {}
        share = metrics.r_precision(self.judge, image, prompt, self.among)
        return {f"R-precision ({self.judge.name})": share, "chance": 1 / len({prompt, *self.among})}

    def ring(self, count: int) -> Cameras:
        """A turntable as the run's own law has it."""
        found: Cameras = self.build.piece("space").ring(self.build, count)
        return found


def retrieved(build: Build, image: Tensor) -> tuple[str, Tensor]:
    """The known object whose pictures at the same cameras are nearest to image [V,3,H,W], and those pictures."""
    denoiser: Any = build.piece("teacher").denoiser
    views: dict[str, Tensor] = {name: denoiser.known(name).image for name in denoiser.prompts}
    best = min(views, key=lambda name: float((image - views[name]).square().mean()))
    return best, views[best]


@torch.no_grad()
def one_step(build: Build, truth: Known, prompt: str) -> Tensor:
    """What the teacher alone says of the held-out cameras [V,3,H,W], from almost pure noise."""
    model: Model = build.piece("teacher")
    count, device = len(truth.cameras), build.device
    noise = torch.randn(count, *model.shape, generator=generator(build.seed, "threed.one_step", 0)).to(device)
    cond = repeat_cond(model.encode([prompt]), count) | {"camera": truth.cameras.rows().to(device)}
    t = torch.full((count,), LATE, device=device)
    x0 = model.denoiser.predict(model.denoiser.process.start(noise, t), t, cond).x0
    return model.codec.decode(x0).clamp(-1, 1).cpu()
