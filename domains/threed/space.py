"""The space of assets: what a run shows while it makes one, its turntable, and its export."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from limbeck.core.diffusion.denoiser import Model
from limbeck.core.pictures import stacked, to_pictures
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.scheduled import at
from limbeck.domains.threed import asset, cameras, turntable
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.scene import Scene, SceneStudent, seen

CELL = 128  # pixels a picture on a sheet
VIEWS = 4


def scenes(build: Build) -> list[Scene]:
    """The run's scenes: one, or a particle each."""
    student: SceneStudent = build.piece("student")
    return list(student.scenes)  # type: ignore[arg-type]


def prompt(build: Build) -> str:
    """What the asset is to be."""
    found: str = getattr(build.recipe.data, "prompt", "")
    return found


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
        law, last = build.recipe.data, build.recipe.steps
        size = self.config.size or int(at(law.size, last))
        distance = max(at(end, last) for end in law.distance)
        return cameras.ring(count, size, distance=distance)

    def show(self, build: Build, step: int, folder: Path) -> list[Path]:
        """Writes the sheet of this step."""
        known, strips = Known.of(build, prompt(build)), []
        around = self.ring(build, VIEWS)
        if known is not None:  # every other one of eight around it
            around = known.cameras.pick(slice(0, 2 * VIEWS, 2))
            strips.append(strip(known.image[: 2 * VIEWS : 2]))
        for scene in scenes(build):
            found = seen(scene, around)
            strips.append(strip(self.pixels(build, found.image)))
            strips += [] if found.normals is None else [strip(found.normals)]
        path = folder / f"step-{step:08d}.png"
        stacked(strips).save(path)
        return [path]

    def subject(self, build: Build) -> str:
        """The run's one prompt."""
        return prompt(build)

    def pixels(self, build: Build, image: Tensor) -> Tensor:
        """Pictures of a scene as RGB: latent ones are decoded."""
        model: Model = build.piece("teacher")
        return image if image.shape[1] == 3 else model.codec.decode(image.to(build.device)).cpu()

    def sample(
        self, build: Build, prompts: list[str], seed: int, folder: Path, which: str = "student",
        steps: int | None = None, guidance: float | None = None,
    ) -> list[Path]:  # fmt: skip
        """Writes a turntable of each scene as GIF; a run has one prompt, its own."""
        if which == "teacher":
            raise BadInput("a teacher of 3D shows pictures, not assets; sample the student")
        if prompts and any(text and text != prompt(build) for text in prompts):
            raise BadInput(f"this run made {prompt(build)!r}; start another run for another prompt")
        folder.mkdir(parents=True, exist_ok=True)
        files = self.config.files
        around = self.ring(build, files.frames).sized(files.size, files.size)
        return [turntable.gif(scene, around, folder / f"turntable-{i}.gif") for i, scene in enumerate(scenes(build))]

    def export(self, build: Build, path: Path, format: str) -> list[Path]:
        """Writes the scene in one of `formats`, with its facts beside it; of several particles a folder each."""
        facts = {
            "prompt": prompt(build),
            "seed": build.seed,
            "steps": build.step or build.recipe.steps,
            "recipe": build.recipe.name,
        }
        made, found = scenes(build), []
        for i, scene in enumerate(made):
            place = path if len(made) == 1 else path / f"particle-{i}"
            found += asset.export(scene, place, format, self.config.files, facts)
        return found


def build(config: settings.Assets, build: Build) -> Assets:
    """Factory of the space `threed.assets`."""
    return Assets(config)
