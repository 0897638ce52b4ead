"""Cameras and pictures in nerfstudio's transforms.json, which instant-ngp and NeRF's Blender scenes have too.

Poses there are camera to world in OpenGL axes and the world is z up, as here, so that they are taken as they stand
(`applied_transform` has been applied already). Lenses there are OpenCV's; here both focal lengths are one and the
principal point is the centre, so pictures are resampled to what such a camera sees. Legend: V cameras, H and W pixels.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from torch import Tensor

from limbeck.core.run.errors import BadInput, clean
from limbeck.domains.threed.cameras import UP, Cameras, orbit
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.scene import Scene, seen

NAME = "transforms.json"
BYTES = 2**26  # of the file
PIXELS = 2**26  # of one picture
TOTAL = 2**28  # of all pictures together, as they are kept
RIGID = 1e-3  # by how much a rotation's columns may fail to be orthonormal
FLAT = 1e-3  # of the axes of view: below it they have no point in common
GOLDEN = math.pi * (3 - math.sqrt(5))
LOWEST, HIGHEST = -30.0, 80.0  # degrees of elevation of what is written
UNLIKE = 0.02  # by which the shape of a picture may differ from what is said of it
PLAIN = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV")  # camera models
LAST = (0.0, 0.0, 0.0, 1.0)  # row of a pose

Number = Annotated[FiniteFloat, Field(ge=-1e9, le=1e9)]
Length = Annotated[FiniteFloat, Field(gt=0, le=1e9)]
Angle = Annotated[FiniteFloat, Field(gt=0, lt=math.pi)]
Side = Annotated[int, Field(ge=1, le=10**6)]
Row = tuple[Number, Number, Number, Number]


class Lens(BaseModel):
    """What may be said of all frames, or of one: pixels, radians, and OpenCV's distortion."""

    fl_x: Length | None = None
    fl_y: Length | None = None
    camera_angle_x: Angle | None = None
    camera_angle_y: Angle | None = None
    cx: Length | None = None
    cy: Length | None = None
    w: Side | None = None
    h: Side | None = None
    k1: Number = 0.0
    k2: Number = 0.0
    k3: Number = 0.0
    k4: Number = 0.0
    p1: Number = 0.0
    p2: Number = 0.0


class Frame(Lens):
    """One picture."""

    file_path: Annotated[str, Field(min_length=1, max_length=1000)]
    transform_matrix: Annotated[list[Row], Field(min_length=3, max_length=4)]


class Frames(Lens):
    """The file; what else it has is not needed here."""

    camera_model: str = "OPENCV"
    frames: Annotated[list[Frame], Field(min_length=1, max_length=10_000)]


@dataclass(frozen=True)
class Optics:
    """A picture's size, focal lengths and principal point in pixels, and how it is bent: k1 to k4, p1 and p2."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    bent: tuple[float, ...]

    @classmethod
    def of(cls, whole: Lens, frame: Lens, width: int, height: int, where: str) -> Optics:
        """A frame's own words before those for all; the picture file is `width` x `height`, as w and h may say."""
        said = [part.model_dump(include=set(Lens.model_fields), exclude_unset=True) for part in (whole, frame)]
        lens = Lens(**{**said[0], **said[1]})
        w, h = lens.w or width, lens.h or height
        if abs(w * height - h * width) > UNLIKE * max(w * height, h * width):
            raise BadInput(f"{where} is {width} x {height} pixels, and w and h say {w} x {h}; correct them")
        fx, fy = focal(lens.fl_x, lens.camera_angle_x, w), focal(lens.fl_y, lens.camera_angle_y, h)
        if fx is None and fy is None:
            raise BadInput(f"{where} has no focal length; give fl_x or camera_angle_x")
        cx, cy = lens.cx or w / 2, lens.cy or h / 2
        if cx >= w or cy >= h:
            raise BadInput(f"{where}: the principal point cx {cx:g}, cy {cy:g} is outside of the picture; correct it")
        bent = (lens.k1, lens.k2, lens.k3, lens.k4, lens.p1, lens.p2)
        return cls(w, h, fx or fy or 0.0, fy or fx or 0.0, cx, cy, bent)

    def inner(self, height: int, width: int) -> float:
        """The shortest focal length of a plain picture of this size that lies in this one (bending not counted)."""
        across, down = min(self.cx, self.width - self.cx) / self.fx, min(self.cy, self.height - self.cy) / self.fy
        return max(width / 2 / across, height / 2 / down)

    def places(self, focal: float, height: int, width: int) -> Tensor:
        """Where a plain picture's pixels are in this one, [H,W,2] from -1 to 1 along its sides (OpenCV's model)."""
        rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 - n / 2 for n in (height, width))
        y, x = torch.meshgrid(rows / focal, columns / focal, indexing="ij")
        k1, k2, k3, k4, p1, p2 = self.bent
        r = x.square() + y.square()
        radial = 1 + r * (k1 + r * (k2 + r * (k3 + r * k4)))
        u = x * radial + 2 * p1 * x * y + p2 * (r + 2 * x.square())
        v = y * radial + p1 * (r + 2 * y.square()) + 2 * p2 * x * y
        across, down = (self.fx * u + self.cx) / self.width, (self.fy * v + self.cy) / self.height
        return 2 * torch.stack([across, down], -1) - 1


def focal(told: float | None, angle: float | None, side: int) -> float | None:
    """A focal length in pixels, told as it is or by the angle that a side of the picture spans."""
    return told if told or not angle else side / 2 / math.tan(angle / 2)


def read(path: Path, size: int, centred: bool = False) -> Known:
    """The data set of a folder or file: its cameras and its pictures on white, `size` pixels along the longer side.

    All get the first picture's shape; `centred` brings the world into a scene's ball (see `centre`). Raises BadInput
    with one line for what is missing, broken, not rigid, or outside of the folder.
    """
    path = path / NAME if path.is_dir() else path
    whole = parsed(path)
    poses = rigid(whole, path.name)
    pictures, angles, height, width = [], [], 0, 0
    for i, frame in enumerate(whole.frames):
        where = f"{path.name}, frame {i} ({clean(frame.file_path, 60)})"
        pixels = opened(located(path.parent, frame.file_path, where), where)
        optics = Optics.of(whole, frame, pixels.shape[2], pixels.shape[1], where)
        if i == 0:
            height, width = shape(optics, size, len(whole.frames), path.name)
        focal = optics.inner(height, width)
        pictures.append(resampled(pixels, optics, focal, height, width))
        angles.append(2 * math.atan(height / 2 / focal))
    cameras = Cameras(poses, torch.tensor(angles), height, width)
    colour, alpha = torch.split(torch.stack(pictures), [3, 1], 1)
    return Known(centre(cameras, path.name) if centred else cameras, 2 * (colour + 1 - alpha) - 1, alpha)


def shape(optics: Optics, size: int, count: int, name: str) -> tuple[int, int]:
    """Height and width of `count` pictures, the longer side being `size`; BadInput where they would not fit."""
    share = size / max(optics.height, optics.width)
    height, width = (max(1, round(side * share)) for side in (optics.height, optics.width))
    if count * height * width > TOTAL:
        raise BadInput(f"{name}: {count} pictures of {width} x {height} pixels are too many; ask for a smaller size")
    return height, width


def parsed(path: Path) -> Frames:
    """The file as it is meant, or one line."""
    if not path.is_file():
        raise BadInput(f"{clean(path)}: there is no such file; a data set is a folder with a {NAME}")
    if path.stat().st_size > BYTES:
        raise BadInput(f"{path.name} has {path.stat().st_size} bytes, and {BYTES} is the most; take fewer frames")
    try:
        whole = Frames.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = clean(".".join(map(str, first["loc"])), 100)
        raise BadInput(f"{path.name}: {place}{': ' * bool(place)}{clean(first['msg'])}; correct it") from None
    if whole.camera_model not in PLAIN:
        raise BadInput(f"{path.name}: pictures of the camera model {clean(whole.camera_model, 40)} are not read; "
                       "undistort them first")  # fmt: skip
    return whole


def rigid(whole: Frames, name: str) -> Tensor:
    """Poses [V,3,4]; BadInput where one is not a rotation and a place."""
    poses = torch.tensor([frame.transform_matrix[:3] for frame in whole.frames], dtype=torch.float64)
    turn = poses[:, :, :3]
    stray = (turn.transpose(1, 2) @ turn - torch.eye(3, dtype=poses.dtype)).abs().amax((1, 2))
    below = torch.tensor([frame.transform_matrix[3:] not in ([], [LAST]) for frame in whole.frames])
    wrong = (stray > RIGID) | (torch.linalg.det(turn) < 0) | below
    if bad := wrong.nonzero()[:, 0].tolist():
        raise BadInput(f"{name}, frame {bad[0]}: transform_matrix is no rotation with a place ({len(bad)} such); "
                       "scale places only, and mirror nothing")  # fmt: skip
    return poses.float()


def located(folder: Path, name: str, where: str) -> Path:
    """A picture inside the folder; names without an ending mean PNG, as in NeRF's Blender scenes."""
    place = folder / (name if Path(name).suffix else f"{name}.png")
    if "\0" in name or not place.resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{where} lies outside of the data set's folder; move it inside")
    if not place.is_file():
        raise BadInput(f"{where}: there is no such picture; copy it there")
    return place


def opened(path: Path, where: str) -> Tensor:
    """A picture's colours times alpha, and alpha, [4,H,W] in [0, 1]."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > PIXELS:
                raise BadInput(f"{where} has {image.width} x {image.height} pixels; make it smaller")
            pixels = torch.from_numpy(np.array(image.convert("RGBA"))).movedim(-1, 0).float() / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{where} is no picture that can be read ({clean(error, 80)}); save it as PNG") from None
    return torch.cat([pixels[:3] * pixels[3:], pixels[3:]])


def resampled(pixels: Tensor, optics: Optics, focal: float, height: int, width: int) -> Tensor:
    """What a plain camera sees [4,H,W] of pixels [4,h,w]: each of its pixels the mean of as many as lie in it."""
    zoom = max(1, math.ceil(optics.fx * pixels.shape[2] / optics.width / focal - 1e-6))
    places = optics.places(focal * zoom, height * zoom, width * zoom).float()
    fine = F.grid_sample(pixels[None], places[None], padding_mode="border", align_corners=False)
    return F.avg_pool2d(fine, zoom)[0]


def centre(cameras: Cameras, name: str) -> Cameras:
    """The world turned so that cameras stand upright on the mean, moved so that what they look at is the origin, and
    scaled so that the ball that half of them see whole has radius 1. BadInput where axes of view do not meet.
    """
    pose = cameras.pose.double()
    axis = -pose[:, :, 2]
    across = torch.eye(3, dtype=pose.dtype) - axis[:, :, None] * axis[:, None]
    if torch.linalg.det(across.mean(0)) < FLAT:
        raise BadInput(f"{name}: the cameras look along parallel axes, so that there is no centre; leave out `centred`")
    middle = torch.linalg.solve(across.sum(0), (across @ pose[:, :, 3:]).sum(0))
    wide = torch.atan(torch.tan(cameras.fov.double() / 2) * min(1.0, cameras.width / cameras.height))
    reach = ((pose[:, :, 3:] - middle).norm(dim=1)[:, 0] * wide.sin()).median()
    turn = between(F.normalize(pose[:, :, 1].mean(0), dim=0), pose.new_tensor(UP))
    moved = torch.cat([turn @ pose[:, :, :3], turn @ (pose[:, :, 3:] - middle) / reach], 2)
    return replace(cameras, pose=moved.to(cameras.pose))


def between(a: Tensor, b: Tensor) -> Tensor:
    """The rotation [3,3] by the smaller angle that takes the unit vector a to b (Rodrigues; not from b's opposite)."""
    v = torch.linalg.cross(a, b)
    cross = torch.linalg.cross(v.expand(3, 3), torch.eye(3, dtype=a.dtype)).T
    turn: Tensor = torch.eye(3, dtype=a.dtype) + cross + cross @ cross / (1 + a @ b).clamp_min(1e-9)
    return turn


def around(count: int, size: int, distance: float) -> Cameras:
    """`count` cameras evenly over the sphere between two elevations (a spiral of golden angles), 40 degrees wide."""
    low, high = (math.sin(math.radians(angle)) for angle in (LOWEST, HIGHEST))
    place = torch.arange(count, dtype=torch.float64)
    elevation = torch.asin(low + (high - low) * (place + 0.5) / count)
    one = torch.ones(count)
    return orbit((place * GOLDEN).float(), elevation.float(), one * distance, one * math.radians(40), size, size)


def write(scene: Scene, cameras: Cameras, folder: Path) -> list[Path]:
    """transforms.json and its pictures, PNG with alpha, in `folder`, for cameras of one field of view.

    Returns all files, the JSON first. Raises BadInput for a scene that has no colours.
    """
    if scene.channels != 3:
        raise BadInput(f"the scene shows {scene.channels} latent channels, not colours; refine it to RGB before export")
    views = seen(scene, cameras, background=-1.0)
    colour = (views.image + 1) / 2 / views.alpha.clamp_min(1 / 512)  # PNG's colours are not multiplied by alpha
    pixels = (torch.cat([colour, views.alpha], 1).clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{i:04d}.png" for i in range(len(cameras))]
    for name, picture in zip(names, pixels, strict=True):
        Image.fromarray(picture).save(folder / name)
    (folder / NAME).write_text(json.dumps(described(cameras, names), indent=1) + "\n", encoding="utf-8")
    return [folder / NAME, *(folder / name for name in names)]


def described(cameras: Cameras, names: list[str]) -> dict[str, object]:
    """The JSON of cameras of one field of view whose pictures have these names; angles are for older readers."""
    width, height, focal = cameras.width, cameras.height, float(cameras.focal[0])
    angles = {f"camera_angle_{a}": 2 * math.atan(n / 2 / focal) for a, n in (("x", width), ("y", height))}
    lens = {"fl_x": focal, "fl_y": focal, "cx": width / 2, "cy": height / 2, "w": width, "h": height, **angles}
    poses = zip(names, cameras.pose.tolist(), strict=True)
    frames = [{"file_path": name, "transform_matrix": [*pose, LAST]} for name, pose in poses]
    return {"camera_model": "PINHOLE", **lens, "frames": frames}
