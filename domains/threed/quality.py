"""The table of an asset run: every scene against its known object at cameras that training never drew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Model, repeat_cond
from limbeck.core.run.build import Build
from limbeck.core.run.rng import generator
from limbeck.domains.threed import config as settings
from limbeck.domains.threed import known as metrics
from limbeck.domains.threed import space
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.scene import Scene, seen

Row = dict[str, float | str]
LATE = 0.98  # the time at which the teacher's one-step prediction is taken: hardly anything of x is left


def build(config: settings.Quality, build: Build) -> Callable[[], list[Row]]:
    """Factory of the metric `threed.quality`."""
    return lambda: list(rows(config, build))


def rows(config: settings.Quality, build: Build) -> Iterator[Row]:
    """A row a scene; where the object is known also the teacher's own answer and a white picture."""
    for format in config.formats:
        build.note(f"writing {format}")
        build.piece("space").export(build, build.folder / "exports" / format, format)
    many = len(space.texts(build)) > 1
    for (prompt, scene), title in zip(space.shown(build), space.titles(build), strict=True):
        truth = Known.of(build, prompt)
        yield {"what": title or "scene", **facts(scene), **(compared(build, scene, truth) if truth else {})}
    for prompt in space.texts(build):
        if truth := Known.of(build, prompt):
            of = f" of {prompt}" * many
            answer, white = one_step(build, truth, prompt), torch.ones_like(truth.image)
            yield {"what": f"teacher in one step at t = {LATE}{of}", "PSNR": metrics.psnr(answer, truth.image),
                   "SSIM": metrics.ssim(answer, truth.image)}  # fmt: skip
            yield {"what": f"a white picture{of}", "PSNR": metrics.psnr(white, truth.image)}


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
    image = build.piece("space").pixels(build, found.image) if build.has("space") else found.image
    best, other = retrieved(build, image)
    return {
        "PSNR": metrics.psnr(image, truth.image),
        "SSIM": metrics.ssim(image, truth.image),
        "silhouette IoU": metrics.overlap(found.alpha, truth.alpha),
        "nearest object": best,
        "own prompt": float(torch.equal(other, truth.image)),
    }


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
