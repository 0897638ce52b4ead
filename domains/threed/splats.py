"""Files of Gaussians: the PLY of "3D Gaussian Splatting", 62 floats a vertex, and the 32-byte rows of .splat.

PLY (Kerbl et al. 2023): x y z nx ny nz f_dc_0..2 f_rest_0..44 opacity scale_0..2 rot_0..3, float32 little-endian, where
opacity is a logit, scales are logarithms, rot is w x y z, and f are spherical harmonics, those of degree 1 to 3 channel
by channel. .splat (antimatter15/splat): place and scale as six floats, RGBA and rot as eight bytes, sorted by volume
times opacity. Legend: n splats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.core.run.errors import BadInput, clean
from limbeck.domains.threed.gaussians import HARMONIC, Gaussians
from limbeck.domains.threed.rasteriser import Splats

Array = np.ndarray
Up = Literal["y", "z"] | None
REST = 15  # harmonics of degree 1 to 3, a channel
BANDS = {1: slice(0, 3), 2: slice(3, 8), 3: slice(8, 15)}
KNOWN = {0: 0, 3: 1, 8: 2, 15: 3, 24: 4}  # harmonics a channel beyond the first: the degree
FIELDS = [
    *"xyz", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(3 * REST)), "opacity",
    *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4)),
]  # fmt: skip
NEEDED = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2", *FIELDS[-4:]]
TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "<i2", "int16": "<i2", "ushort": "<u2",
    "uint16": "<u2", "int": "<i4", "int32": "<i4", "uint": "<u4", "uint32": "<u4", "float": "<f4", "float32": "<f4",
    "double": "<f8", "float64": "<f8",
}  # fmt: skip
HEADER, MOST = 2**16, 10_000_000  # bytes of a header, and splats of a file, at most
ROW = np.dtype([("place", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rot", "u1", 4)])
# From a scene's axes (z up, front +x) to y up with the front at +z, and to z up with the front at -y, as quaternions.
TURNS = {"y": (0.5, -0.5, -0.5, -0.5), "z": (0.5**0.5, 0.0, 0.0, -(0.5**0.5))}


@dataclass(frozen=True)
class Cloud:
    """What a file holds, float32: places [n,3], harmonics [n,3] and `rest` [n,3,15], logits, log scales, turns."""

    means: Tensor
    colours: Tensor
    rest: Tensor
    opacity: Tensor
    scales: Tensor
    quats: Tensor

    @classmethod
    def of(cls, scene: Gaussians) -> Cloud:
        """The living rows of a scene of colours, bit for bit."""
        if scene.channels != 3:
            raise BadInput(
                f"splat files hold colours, and this scene has {scene.channels} latent channels; refine it first"
            )
        rows = scene.alive.nonzero()[:, 0]
        if not len(rows):
            raise BadInput("the scene has no splats left to write; export an earlier checkpoint")
        means, colours, opacity, scales, quats = (
            value.detach()[rows].float().cpu()
            for value in (scene.means, scene.colours, scene.opacity, scene.scales, scene.quats)
        )
        found = cls(means, colours, torch.zeros(len(rows), 3, REST), opacity, scales, quats)
        if broken := found.broken():
            raise BadInput(f"{broken} of {len(rows)} splats are NaN or infinite; export an earlier checkpoint")
        return found

    def broken(self) -> int:
        """How many splats hold NaN or infinity."""
        fine = torch.stack([part.flatten(1).isfinite().all(1) for part in self._parts()], 1)
        return int((~fine.all(1)).sum())

    def _parts(self) -> list[Tensor]:
        return [self.means, self.colours, self.rest, self.opacity[:, None], self.scales, self.quats]

    def scene(self, capacity: int | None = None, radius: float = 1.0) -> Gaussians:
        """A scene of these splats; colours that depend on the view are left out."""
        return Gaussians(Splats(self.means, self.scales, self.quats, self.opacity, self.colours), capacity, radius)

    def turned(self, turn: tuple[float, float, float, float]) -> Cloud:
        """All turned by a quaternion (w x y z): places, orientations, and what colours depend on."""
        by = torch.tensor(turn, dtype=torch.float64)
        matrix = turn_matrix(by)
        means = (self.means.double() @ matrix.T).float()
        quats = hamilton(by, self.quats.double()).float()
        rest = self.rest.double()
        if bool(rest.any()):
            rest = torch.cat([rest[..., band] @ harmonic_turn(degree, matrix).T for degree, band in BANDS.items()], 2)
        return replace(self, means=means, quats=quats, rest=rest.float())


def turn_matrix(quat: Tensor) -> Tensor:
    """The rotation [3,3] of a unit quaternion [4]; columns are the turned axes."""
    axes = torch.eye(3, dtype=quat.dtype)
    pure = torch.cat([torch.zeros(3, 1, dtype=quat.dtype), axes], 1)
    back = quat * quat.new_tensor([1.0, -1.0, -1.0, -1.0])
    return hamilton(hamilton(quat, pure), back)[:, 1:].T


def hamilton(a: Tensor, b: Tensor) -> Tensor:
    """The product of quaternions [...,4]."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    parts = [
        aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw,
    ]  # fmt: skip
    return torch.stack(parts, -1)


def harmonics(ways: Tensor, degree: int) -> Tensor:
    """The real spherical harmonics [P,2 degree + 1] of unit vectors [P,3] in the order and with the signs of 3DGS."""
    x, y, z = ways.unbind(-1)
    third = [
        -((35 / 32) ** 0.5) * y * (3 * x * x - y * y), 105**0.5 / 2 * x * y * z,
        -((21 / 32) ** 0.5) * y * (5 * z * z - 1), 7**0.5 / 4 * z * (5 * z * z - 3),
        -((21 / 32) ** 0.5) * x * (5 * z * z - 1), 105**0.5 / 4 * z * (x * x - y * y),
        -((35 / 32) ** 0.5) * x * (x * x - 3 * y * y),
    ]  # fmt: skip
    second = [x * y, -y * z, (3 * z * z - 1) / 12**0.5, -x * z, (x * x - y * y) / 2]
    parts = {
        1: [3**0.5 / 2 * part for part in (-y, z, -x)],
        2: [15**0.5 / 2 * part for part in second],
        3: third,
    }
    found: Tensor = torch.stack(parts[degree], -1) / math.pi**0.5
    return found


def harmonic_turn(degree: int, matrix: Tensor) -> Tensor:
    """How the coefficients of one degree change when what they colour is turned by a rotation [3,3].

    It is solved for from more directions than unknowns: the turned function at d is the old one at R^T d.
    """
    steps = torch.arange(64, dtype=torch.float64)
    high, around = 1 - (2 * steps + 1) / 64, steps * (5**0.5 - 1) * math.pi
    flat = (1 - high**2).sqrt()
    ways = torch.stack([flat * around.cos(), flat * around.sin(), high], 1)
    found: Tensor = torch.linalg.lstsq(harmonics(ways, degree), harmonics(ways @ matrix, degree)).solution
    return found


def write_ply(scene: Gaussians, path: Path, up: Up = None) -> Path:
    """A scene as PLY. `up`: y or z, the front being at +z or -y; None: its own axes (z up, front +x), bit for bit."""
    cloud = Cloud.of(scene) if up is None else Cloud.of(scene).turned(TURNS[up])
    n = len(cloud.means)
    parts = [
        cloud.means, torch.zeros(n, 3), cloud.colours, cloud.rest.flatten(1), cloud.opacity[:, None], cloud.scales,
        cloud.quats,
    ]  # fmt: skip
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {n}"]
    lines += [*(f"property float {name}" for name in FIELDS), "end_header", ""]
    path.write_bytes("\n".join(lines).encode("ascii") + torch.cat(parts, 1).numpy().astype("<f4").tobytes())
    return path


def read_ply(path: Path, up: Up = None) -> Cloud:
    """A PLY of Gaussians with harmonics of any degree (missing ones are 0, those above 3 go); `up` as it was written.

    Raises BadInput for what is no such file, is cut short, or holds NaN.
    """
    count, fields, start = _header(path)
    row = np.dtype(fields)
    body = path.stat().st_size - start
    if count < 1 or count > MOST or body != count * row.itemsize:
        raise BadInput(
            f"{clean(path.name)} says it has {count} splats of {row.itemsize} bytes and holds {body} bytes of them; it "
            f"is cut short or broken, or beyond {MOST} splats: export it again"
        )
    table = np.fromfile(path, row, count, offset=start)
    columns = [name for name, _ in fields]
    rest = sorted((name for name in columns if name.startswith("f_rest_")), key=lambda name: int(name[7:]))
    if len(rest) % 3 or len(rest) // 3 not in KNOWN or rest != [f"f_rest_{i}" for i in range(len(rest))]:
        raise BadInput(f"{clean(path.name)} has {len(rest)} f_rest columns; whole degrees have 0, 9, 24, 45 or 72")
    coloured = _columns(table, rest).reshape(count, 3, len(rest) // 3)[..., :REST]
    found = Cloud(
        _columns(table, [*"xyz"]), _columns(table, NEEDED[3:6]),
        torch.nn.functional.pad(coloured, (0, REST - coloured.shape[2])), _columns(table, ["opacity"])[:, 0],
        _columns(table, NEEDED[7:10]), _columns(table, NEEDED[10:]),
    )  # fmt: skip
    return _checked(found, path, up)


def _header(path: Path) -> tuple[int, list[tuple[str, str]], int]:
    """How many vertices, their columns with types, and where they begin."""
    name = clean(path.name)
    if not path.is_file():
        raise BadInput(f"{name}: there is no such file")
    with path.open("rb") as file:
        head = file.read(HEADER)
    end = head.find(b"end_header\n")
    if not head.startswith(b"ply") or end < 0:
        raise BadInput(f"{name} is no PLY: it has no header; export it again as a PLY of Gaussians")
    lines = [line.split() for line in head[:end].decode("latin-1").splitlines()[1:]]
    lines = [words for words in lines if words and words[0] not in ("comment", "obj_info")]
    if ["format", "binary_little_endian", "1.0"] not in lines:
        raise BadInput(f"{name} is not binary little-endian; save it as such, which is what splat tools write")
    elements = [words for words in lines if words[0] == "element"]
    said = elements[0] if len(elements) == 1 else []
    if len(said) != 3 or said[1] != "vertex" or not said[2].isdecimal() or len(said[2]) > 12:
        raise BadInput(f"{name} holds more than Gaussians, or none; a mesh is read with the scene kind for meshes")
    properties = [words for words in lines if words[0] == "property"]
    if any(len(words) != 3 or words[1] not in TYPES for words in properties):
        raise BadInput(f"{name} has columns that are lists or of no known type; export it again as a PLY of Gaussians")
    fields = [(words[2], TYPES[words[1]]) for words in properties]
    names = [field for field, _ in fields]
    missing = [field for field in NEEDED if field not in names]
    if missing or len(set(names)) != len(names):
        what = f"has no column {missing[0]}" if missing else "has a column twice"
        raise BadInput(f"{name} {what}; is it a mesh or a point cloud? Gaussians have {', '.join(NEEDED)}")
    return int(said[2]), fields, end + len(b"end_header\n")


def _columns(table: Array, names: list[str]) -> Tensor:
    """Some columns [n,k] float32."""
    out = np.empty((len(table), len(names)), np.float32)
    for i, name in enumerate(names):
        out[:, i] = table[name]
    return torch.from_numpy(out)


def _checked(cloud: Cloud, path: Path, up: Up) -> Cloud:
    """The cloud in a scene's axes, all of it finite and turned somehow."""
    if bad := cloud.broken():
        raise BadInput(f"{clean(path.name)}: {bad} of {len(cloud.means)} splats are NaN or infinite; export it again")
    if not bool((cloud.quats.norm(dim=1) > 0).all()):
        raise BadInput(f"{clean(path.name)} has splats whose quaternion is zero; export it again")
    w, x, y, z = TURNS[up] if up else (1.0, 0.0, 0.0, 0.0)
    return cloud.turned((w, -x, -y, -z)) if up else cloud


def write_splat(scene: Gaussians, path: Path, up: Up = None) -> Path:
    """A scene as .splat, the largest and least transparent first; `up` as for PLY."""
    cloud = Cloud.of(scene) if up is None else Cloud.of(scene).turned(TURNS[up])
    opacity, colour = cloud.opacity.sigmoid(), 0.5 + HARMONIC * cloud.colours
    order = (cloud.scales.sum(1).exp() * opacity).argsort(descending=True, stable=True)
    rows = np.zeros(len(order), ROW)
    rows["place"], rows["scale"] = cloud.means[order].numpy(), cloud.scales[order].exp().numpy()
    rows["rgba"] = _bytes(torch.cat([colour, opacity[:, None]], 1)[order] * 255)
    rows["rot"] = _bytes(torch.nn.functional.normalize(cloud.quats, dim=1)[order] * 128 + 128)
    path.write_bytes(rows.tobytes())
    return path


def _bytes(values: Tensor) -> Array:
    return values.round().clamp(0, 255).byte().numpy()


def read_splat(path: Path, up: Up = None) -> Cloud:
    """A .splat file; `up` as it was written. Raises BadInput for what is none or holds NaN."""
    if not path.is_file():
        raise BadInput(f"{clean(path.name)}: there is no such file")
    size = path.stat().st_size
    if not size or size % ROW.itemsize or size > MOST * ROW.itemsize:
        raise BadInput(
            f"{clean(path.name)} has {size} bytes; a .splat has {ROW.itemsize} for each of up to {MOST} splats"
        )
    rows = np.fromfile(path, ROW)
    place, scale = (torch.from_numpy(rows[name].copy()) for name in ("place", "scale"))
    rgba = torch.from_numpy(rows["rgba"].astype(np.float32)) / 255
    quats = torch.from_numpy(rows["rot"].astype(np.float32)) / 128 - 1
    opacity = rgba[:, 3].clamp(0.5 / 255, 1 - 0.5 / 255).logit()
    rest = torch.zeros(len(rows), 3, REST)
    return _checked(Cloud(place, (rgba[:, :3] - 0.5) / HARMONIC, rest, opacity, scale.log(), quats), path, up)
