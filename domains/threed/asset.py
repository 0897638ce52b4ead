"""Assets as files that artists open, each with a JSON of what it is and what it was made from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.domains.threed import bake, glb, objfile, surface, transforms, turntable
from limbeck.domains.threed.bake import Textured
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.scene import Meshed, Scene
from limbeck.domains.threed.shape import decimated

MESHES = {"glb": ".glb", "obj": ".obj", "ply": ".ply", "usdz": ".usdz"}
SPLATS = {"splat-ply": ".ply", "splat": ".splat"}
MOVIES = {"mp4": ".mp4", "gif": ".gif", "sheet": ".png"}
DATA = {"transforms": ".png"}  # pictures, beside their transforms.json
SUFFIXES = {**MESHES, **SPLATS, **MOVIES, **DATA}
FORMATS = tuple(SUFFIXES)
# From a scene's axes (z up, front +x) to +Y up with the front at +Z, and to what Blender makes of that (front at -Y).
TURNS = {"y": np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]), "z": np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])}


@dataclass(frozen=True)
class Made:
    """A mesh with its texture in a scene's axes, and what is known of it; a user's own mesh `stays` where it is."""

    asset: Textured
    facts: dict[str, Any]
    stays: bool = False

    def standing(self, height: float, up: str) -> Textured:
        """On its base at the origin, `height` metres tall, `up` upwards; what stays is only turned."""
        if self.stays:
            return self.asset.moved(TURNS[up], 1.0, np.zeros(3))
        low, high = self.asset.mesh.bounds
        scale, turn = height / max(float(high[2] - low[2]), 1e-12), TURNS[up]
        base = np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
        return self.asset.moved(turn, scale, -scale * turn @ base)


def make(scene: Scene, options: Files) -> Made:
    """Surface and texture of a scene, with the seconds that both took; a scene that is a mesh gives its own."""
    if isinstance(scene, Meshed):
        return scene.asset(options)  # type: ignore[no-any-return]
    start = time.perf_counter()
    fine, facts = surface.whole(scene, options)
    mesh = decimated(fine, options.faces, options.watertight)
    middle = time.perf_counter()
    asset, source = bake.textured(scene, mesh, options)
    if options.normals:
        asset = replace(asset, relief=bake.relief(asset, fine))
    shape = {"faces": len(mesh.faces), "vertices": len(mesh.vertices), "watertight": mesh.watertight}
    topology = {"components": mesh.components()[0], "euler": mesh.euler()}
    seconds = {"surface": round(middle - start, 3), "texture": round(time.perf_counter() - middle, 3)}
    return Made(asset, {**shape, **topology, **facts, "colours": source, "seconds": seconds})


def export(scene: Scene, path: Path, format: str, options: Files, facts: dict[str, Any]) -> list[Path]:
    """Writes the scene in one of FORMATS and the JSON of its facts beside it; returns all files.

    `path` is a file with the format's suffix, else a folder. Raises BadInput for an empty scene.
    """
    if format not in SUFFIXES:
        raise BadInput(
            f"{clean(format)} is no format of assets{did_you_mean(format, FORMATS)}; they are {', '.join(FORMATS)}"
        )
    target = path if path.suffix == SUFFIXES[format] else path / f"asset{SUFFIXES[format]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    kinds = ((MESHES, write_mesh), (SPLATS, write_splats), (MOVIES, write_movie), (DATA, write_data))
    write = next(write for names, write in kinds if format in names)
    paths, found = write(scene, target, format, options)
    beside = target.with_suffix(".json")
    names = [one.name for one in paths]
    beside.write_text(
        json.dumps({**facts, "format": format, "files": names, **found}, indent=2) + "\n", encoding="utf-8"
    )
    return [*paths, beside]


Written = tuple[list[Path], dict[str, Any]]


def write_mesh(scene: Scene, path: Path, format: str, options: Files) -> Written:
    """A textured mesh; GLB and USDZ are +Y up whatever the options say."""
    made = make(scene, options)
    up = options.up if format in ("obj", "ply") else "y"
    asset = made.standing(options.height, up)
    writers: dict[str, Callable[[], list[Path]]] = {
        "glb": lambda: [glb.write(asset, path)],
        "obj": lambda: objfile.write_obj(asset, path, up),
        "ply": lambda: [objfile.write_ply(asset, path)],
        "usdz": lambda: [objfile.write_usdz(asset, path)],
    }
    bounds = asset.mesh.bounds.round(6).tolist()
    return writers[format](), {**made.facts, "texture": len(asset.image), "up": up, "unit": "metre", "bounds": bounds}


def write_splats(scene: Scene, path: Path, format: str, options: Files) -> Written:
    """The Gaussians themselves, in scene units."""
    from limbeck.domains.threed import splats
    from limbeck.domains.threed.gaussians import Gaussians

    if not isinstance(scene, Gaussians):
        raise BadInput(f"{format} holds Gaussians, and this scene has none; ask for glb, obj or ply")
    write = splats.write_ply if format == "splat-ply" else splats.write_splat
    return [write(scene, path, options.up)], {"splats": int(scene.alive.sum()), "up": options.up, "unit": "scene"}


def write_movie(scene: Scene, path: Path, format: str, options: Files) -> Written:
    """A turntable."""
    distance = 3 * float(scene.radius)
    if format == "sheet":
        return [turntable.sheet(scene, ring(8, options.size, distance=distance), path)], {"views": 8}
    cameras = ring(options.frames, options.size, distance=distance)
    paths = [turntable.gif(scene, cameras, path)] if format == "gif" else turntable.videos(scene, cameras, path)
    return paths, {"frames": options.frames, "size": options.size}


def write_data(scene: Scene, path: Path, format: str, options: Files) -> Written:
    """A data set of pictures with their cameras in nerfstudio's format, in the folder of `path`; scene units, z up."""
    cameras = transforms.around(options.frames, options.size, 3 * float(scene.radius))
    return transforms.write(scene, cameras, path.parent), {"views": options.frames, "size": options.size, "up": "z"}
