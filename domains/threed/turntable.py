"""Turntables: a scene seen from all around as MP4, GIF or sheet; colours, depth and normals. Legend: V views."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from limbeck.core import film
from limbeck.core.pictures import to_bytes
from limbeck.core.run.errors import BadInput
from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.scene import Scene, Views, seen

What = Literal["image", "normals", "depth"]
RATE = 24  # pictures a second


def frames(views: Views, what: What = "image") -> Tensor:
    """Pictures uint8 [V,H,W,3]: colours, normals (x, y, z as red, green, blue), or depth from white (near) to black."""
    if what == "normals" and views.normals is None:
        raise BadInput("this scene knows no normals; ask for the picture or its depth")
    value = views.image if what == "image" else views.normals if what == "normals" else nearness(views)
    assert value is not None
    return to_bytes(value.expand(-1, 3, -1, -1))


def nearness(views: Views) -> Tensor:
    """Depth as [V,1,H,W] in [-1, 1], the nearest at 1, over all views alike; what is not opaque is -1."""
    solid = views.alpha > 0.5
    depth = views.depth / views.alpha.clamp_min(1e-6)
    if not bool(solid.any()):
        return torch.full_like(depth, -1.0)
    low, high = depth[solid].min(), depth[solid].max()
    return torch.where(solid, 1 - 1.8 * (depth - low) / (high - low).clamp_min(1e-6), -1.0)


def around(scene: Scene, cameras: Cameras) -> Views:
    """The scene's views on white."""
    if scene.channels != 3:
        raise BadInput(f"the scene shows {scene.channels} latent channels, not colours; refine it to RGB before export")
    return seen(scene, cameras)


def gif(scene: Scene, cameras: Cameras, path: Path) -> Path:
    """An endless GIF of the scene's colours."""
    return film.write(around(scene, cameras).image, path, RATE)


def videos(scene: Scene, cameras: Cameras, path: Path) -> list[Path]:
    """An MP4 of the colours at `path`, and beside it of the depth and, where the scene knows them, the normals."""
    views = around(scene, cameras)
    kinds: list[What] = ["image", "depth", *(["normals"] if views.normals is not None else [])]  # type: ignore[list-item]
    names = [path if kind == "image" else path.with_stem(f"{path.stem}-{kind}") for kind in kinds]
    return [film.write(frames(views, kind).movedim(-1, 1), name, RATE) for kind, name in zip(kinds, names, strict=True)]


def sheet(scene: Scene, cameras: Cameras, path: Path) -> Path:
    """A PNG with a column a camera: colours, depth and, where the scene knows them, normals below each other."""
    views = around(scene, cameras)
    kinds: list[What] = ["image", "depth", *(["normals"] if views.normals is not None else [])]  # type: ignore[list-item]
    rows = [torch.cat(list(frames(views, kind)), 1) for kind in kinds]
    Image.fromarray(torch.cat(rows, 0).numpy()).save(path)
    return path
