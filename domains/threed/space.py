"""The space of assets: what a run shows while it makes one, its turntable, and its export."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from limbeck.core.diffusion.denoiser import Model
from limbeck.core.pictures import slug, stacked, to_pictures
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.scheduled import at
from limbeck.domains.threed import asset, cameras, turntable
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.scene import Scene, SceneStudent, seen

CELL = 128  # pixels a picture on a sheet
VIEWS = 4
SHOWN = 8  # scenes of a run with many


def shown(build: Build) -> list[tuple[str, Scene]]:
    """The run's scenes, each with its prompt: one, a particle each, or one a prompt."""
    student: SceneStudent = build.piece("student")
    return student.made(texts(build))


def scenes(build: Build) -> list[Scene]:
    """The run's scenes alone."""
    return [scene for _, scene in shown(build)]


def texts(build: Build) -> list[str]:
    """What the assets are to be."""
    data = build.recipe.data
    found: list[str] = getattr(data, "prompts", None) or [getattr(data, "prompt", "")]
    return found


def titles(build: Build) -> list[str]:
    """What tells the scenes of a run apart, in the order of `shown`: nothing, the particle, or the prompt."""
    made = shown(build)
    if len(texts(build)) > 1:
        return [text for text, _ in made]
    return [f"particle {i}" for i in range(len(made))] if len(made) > 1 else [""]


def strip(image: Tensor) -> Image.Image:
    """Pictures [V,3,H,W] in [-1, 1] side by side, small ones enlarged."""
    (picture,) = to_pictures(torch.cat(list(image), 2)[None])
    scale = max(1, CELL // image.shape[-1])
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


class Assets:
    """Shows four sides of each scene (above them those of the known object), draws turntables, exports files."""

    formats = asset.FORMATS

    def __init__(self, config: settings.Assets) -> None:
        self.config = config

    def ring(self, build: Build, count: int) -> cameras.Cameras:
        """Cameras around the asset as the recipe's law has them."""
        law, last = build.config("data"), build.recipe.steps
        size = self.config.size or int(at(law.size, last))
        distance = max(at(end, last) for end in law.distance)
        return cameras.ring(count, size, distance=distance)

    def show(self, build: Build, step: int, folder: Path) -> list[Path]:
        """Writes the sheet of this step."""
        strips, before = [], None
        for text, scene in shown(build)[:SHOWN]:
            known, around = Known.of(build, text), self.ring(build, VIEWS)
            if known is not None:  # every other one of eight around it
                around = known.cameras.pick(slice(0, 2 * VIEWS, 2))
                strips += [] if text == before else [strip(known.image[: 2 * VIEWS : 2])]
            before, found = text, seen(scene, around)
            strips.append(strip(self.pixels(build, found.image)))
            strips += [] if found.normals is None else [strip(found.normals)]
        path = folder / f"step-{step:08d}.png"
        stacked(strips).save(path)
        return [path]

    def subject(self, build: Build) -> str:
        """The run's first prompt."""
        return texts(build)[0]

    def pixels(self, build: Build, image: Tensor) -> Tensor:
        """Pictures of a scene as RGB: latent ones are decoded."""
        model: Model = build.piece("teacher")
        return image if image.shape[1] == 3 else model.codec.decode(image.to(build.device)).cpu()

    def sample(
        self, build: Build, prompts: list[str], seed: int, folder: Path, which: str = "student",
        steps: int | None = None, guidance: float | None = None,
    ) -> list[Path]:  # fmt: skip
        """Writes a turntable of each scene as GIF; a run has its own prompts."""
        if which == "teacher":
            raise BadInput("a teacher of 3D shows pictures, not assets; sample the student")
        wanted, own = [text for text in prompts if text], texts(build)
        if strange := [text for text in wanted if text not in own]:
            raise BadInput(
                f"this run made {own[0]!r}{' and others' * (len(own) > 1)}, not {strange[0]!r}; start another run"
            )
        folder.mkdir(parents=True, exist_ok=True)
        files = self.config.files
        around = self.ring(build, files.frames).sized(files.size, files.size)
        made = [scene for text, scene in shown(build) if not wanted or text in wanted]
        return [turntable.gif(scene, around, folder / f"turntable-{i}.gif") for i, scene in enumerate(made)]

    def export(self, build: Build, path: Path, format: str) -> list[Path]:
        """Writes the scene in one of `formats`, with its facts beside it; of several particles a folder each."""
        found = []
        for (text, scene), title in zip(shown(build), titles(build), strict=True):
            facts = {
                "prompt": text,
                "seed": build.seed,
                "steps": build.step or build.recipe.steps,
                "recipe": build.recipe.name,
            }
            found += asset.export(scene, path / slug(title) if title else path, format, self.config.files, facts)
        return found


def build(config: settings.Assets, build: Build) -> Assets:
    """Factory of the space `threed.assets`."""
    return Assets(config)
