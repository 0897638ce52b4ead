"""A user's own mesh, read from GLB, OBJ or PLY by trimesh: one mesh with uv in a scene's axes, or one clear line."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.run.errors import BadInput, clean
from limbeck.domains.threed.asset import TURNS
from limbeck.domains.threed.bake import Textured, unwrap
from limbeck.domains.threed.shape import Mesh, load

FACES = 1_000_000  # that can be painted here
KINDS = (".glb", ".obj", ".ply")
SLACK = 1e-4  # beyond the unit square that rounding explains


def read(path: Path, note: Callable[[str], None], up: str = "y", size: int = 1024) -> Textured:
    """The file's triangles as one mesh, z up and front +x; without uv it is unwrapped for `size` texels, with a note.

    `up` is the axis that points upwards in the file. Raises BadInput for what cannot be read or painted.
    """
    if path.suffix.lower() not in KINDS:
        raise BadInput(f"{path.name}: meshes are read from {', '.join(KINDS)}; save it as one of them")
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
    count = counted(path)
    if count > FACES:
        raise BadInput(f"{path.name} has {count} faces; decimate it to {FACES} at most")
    found = opened(path)
    vertices, faces = np.asarray(found.vertices, np.float64), np.asarray(found.faces, np.int64)
    check(vertices, faces, path.name)
    mesh = Mesh(vertices @ TURNS[up], faces)
    uv = getattr(found.visual, "uv", None)
    if uv is None or len(uv) != len(vertices):
        note(f"{path.name} has no uv: it was unwrapped")
        return unwrap(mesh.welded(), size)
    if not (np.isfinite(uv).all() and uv.min() >= -SLACK and uv.max() <= 1 + SLACK):
        note(f"{path.name} has uv outside of [0, 1], as tiled textures do: it was unwrapped anew, without its texture")
        return unwrap(mesh.welded(), size)
    down = np.clip(np.asarray(uv, np.float64) * [1, -1] + [0, 1], 0, 1)  # trimesh has v upwards whatever the file
    return Textured(mesh, mesh.normals, down, picture(found.visual))


def check(vertices: np.ndarray, faces: np.ndarray, name: str) -> None:
    """Raises BadInput unless vertices [N,3] and faces [M,3] are a surface."""
    if not len(faces):
        raise BadInput(f"{name} has no faces; export triangles, not points or curves")
    if vertices.shape[1] != 3 or faces.min() < 0 or faces.max() >= len(vertices):
        raise BadInput(f"{name} is broken: faces name vertices that are not there or not in space; export it again")
    if not np.isfinite(vertices).all():
        bad = int((~np.isfinite(vertices)).any(1).sum())
        raise BadInput(f"{name}: {bad} of {len(vertices)} vertices are NaN or infinite; repair the mesh first")
    if not np.abs(Mesh(vertices, faces).crossed).max() > 0:
        raise BadInput(f"{name} has no area: all its faces are points or lines")


def opened(path: Path) -> Any:
    """The file as one trimesh mesh; nodes of a GLB stand where their transforms put them."""
    trimesh = load("trimesh")
    try:
        found = trimesh.load_scene(path, process=False)
        parts = [part for part in found.dump() if isinstance(part, trimesh.Trimesh)]
        empty = trimesh.Trimesh()
        return trimesh.util.concatenate(parts) if parts else empty
    except Exception as error:  # a reader of foreign files may raise anything
        kind = path.suffix[1:].upper()
        raise BadInput(f"{path.name} is no {kind} that can be read ({clean(error, 80)}); export it again") from None


def counted(path: Path) -> int:
    """How many faces a file says that it has, before it is read into memory."""
    if path.suffix.lower() == ".obj":
        total, last = 0, b"\n"
        with path.open("rb") as file:
            while block := file.read(2**24):
                total += (last + block).count(b"\nf ")
                last = block[-2:]
        return total
    if path.suffix.lower() == ".ply":
        with path.open("rb") as file:
            found = re.search(rb"^element face (\d+)\s*$", file.read(2**16).partition(b"end_header")[0], re.MULTILINE)
        return int(found[1]) if found else 0
    head = header(path)
    try:
        named = [p["indices"] for m in head.get("meshes", []) for p in m["primitives"] if "indices" in p]
        return sum(int(head["accessors"][i]["count"]) for i in named) // 3
    except (LookupError, TypeError, ValueError, AttributeError):
        raise BadInput(f"{path.name} is broken: its header does not say what its meshes are; export it again") from None


def header(path: Path) -> dict[str, Any]:
    """The JSON of a GLB."""
    with path.open("rb") as file:
        start = file.read(20)
        if len(start) < 20 or start[:4] != b"glTF":
            raise BadInput(f"{path.name} is no GLB: it does not begin with glTF; export it again as binary glTF 2.0")
        version, length, size, _ = struct.unpack("<IIII", start[4:])
        real = path.stat().st_size
        if version != 2 or length > real or size > real:
            raise BadInput(
                f"{path.name} is broken: glTF {version}, {length} bytes announced, {real} there; export it again"
            )
        try:
            return dict(json.loads(file.read(size)))
        except (ValueError, TypeError):
            raise BadInput(f"{path.name} is broken: its header is no JSON; export it again") from None


def picture(visual: Any) -> np.ndarray:
    """The base colour uint8 [H,W,3]: the material's picture, or one texel of its plain colour."""
    material = getattr(visual, "material", None)
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    if image is not None:
        return np.asarray(image.convert("RGB"), np.uint8)
    plain = getattr(material, "main_color", None)
    return np.asarray([200, 200, 200] if plain is None else plain[:3], np.uint8).reshape(1, 1, 3)
