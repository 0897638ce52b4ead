"""A scene that is to look like pictures of one's own, whose cameras a transforms.json tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.distillation.source import Source, plain
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player, Single
from limbeck.domains.threed import config as settings
from limbeck.domains.threed import known, space, transforms
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.scene import Growing, like, seen


def split(config: settings.Photos) -> tuple[Known, Known]:
    """The pictures to learn from, and those held out."""
    whole = transforms.read(Path(config.folder).expanduser(), config.size, config.centred)
    last = torch.arange(len(whole.cameras)) % config.hold == config.hold - 1
    learn, held = (Known(whole.cameras.pick(i), whole.image[i], whole.alpha[i]) for i in (~last, last))
    return learn, held


class Photos(Single):
    """The loss `threed.photos`: squared differences from pictures, summed over a picture, mean over views (NeRF).

    What pictures have no opacity for shows the same drawn colour in both, so that white matter is not taken for none.
    """

    def __init__(self, source: Source, player: Player, pictures: Known) -> None:
        super().__init__(player)
        self.source, self.pictures = source, pictures

    def terms(self, ctx: Context) -> dict[str, Tensor]:
        """The loss at this step's pictures."""
        student: Any = self.source.student
        scene = student.particle({"particle": torch.rand(1, generator=ctx.draws.gen("threed.photos.particle"))})
        if isinstance(scene, Growing):
            scene.at(ctx.step)
        rows = ctx.draws.integers("threed.photos", len(self.pictures.cameras)).cpu()
        ground = ctx.draws.uniform("threed.photos.ground", (3,), -1.0, 1.0)
        jitter = ctx.draws.uniform("threed.photos.jitter")
        cameras, device = self.pictures.cameras.pick(rows).to(like(scene)), ctx.device
        image, alpha = self.pictures.image[rows].to(device), self.pictures.alpha[rows].to(device)
        wanted = image + (1 - alpha) * (ground[:, :, None, None] - 1)
        found = scene.render(cameras, ground, jitter).image
        return {"photos": (found - wanted).square().sum() / ctx.batch}


def build(config: settings.LikePhotos, build: Build) -> Photos:
    """Factory of the loss `threed.photos`; it shares the student's player, and so its `optim`, with the others."""
    source = Source.of(build)
    return Photos(source, build.player("student", source.student, plain(config.optim)), split(config)[0])


def quality(config: settings.Photos, build: Build) -> Callable[[], list[dict[str, float | str]]]:
    """Factory of the metric `threed.photos`: a row a scene, and one of a white picture."""
    return lambda: list(rows(config, build))


def rows(config: settings.Photos, build: Build) -> Iterator[dict[str, float | str]]:
    """Each scene against the pictures that no step showed it."""
    truth = split(config)[1]
    if not len(truth.cameras):
        raise BadInput(f"{config.folder} has fewer than {config.hold} pictures, so that none is held out; lower `hold`")
    for scene, title in zip(space.scenes(build), space.titles(build), strict=True):
        found = seen(scene, truth.cameras)
        yield {
            "what": title or "scene",
            "PSNR": known.psnr(found.image, truth.image),
            "SSIM": known.ssim(found.image, truth.image),
            "silhouette IoU": known.overlap(found.alpha, truth.alpha),
        }
    yield {"what": "a white picture", "PSNR": known.psnr(torch.ones_like(truth.image), truth.image)}
