"""Maps of normals: a bumpy ball with few faces is shaded like the fine one, as a reader of the file decodes it."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import solid
import torch
import trimesh
from torch import Tensor

from limbeck.domains.threed import asset, glb
from limbeck.domains.threed.bake import Textured
from limbeck.domains.threed.cameras import orbit
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.raster import look
from limbeck.domains.threed.shape import Mesh

LIGHT = np.array([0.5, 0.6, 0.62])
Array = np.ndarray


def bumpy(p: Tensor) -> Tensor:
    ball: Tensor = solid.ball(p)
    return ball - 0.02 * torch.sin(14 * p).prod(-1)


class Soft(solid.Solid):  # type: ignore[misc]
    """Density that rises smoothly, as that of trained scenes does."""

    def field(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.dense * torch.sigmoid(-self.distance(points) / 0.03), self.colour(points)


@pytest.fixture(scope="module")
def made() -> Textured:
    files = Files(resolution=64, faces=300, texture=256, normals=True, colours="field", level=200.0)
    return asset.make(Soft(bumpy), files).asset


def true_normals(place: Array) -> Array:
    """Of the ball itself, at the nearest point that a few steps find."""
    p = torch.from_numpy(place)
    for _ in range(4):
        p = p.detach().requires_grad_()
        value = bumpy(p)
        (slope,) = torch.autograd.grad(value.sum(), p)
        p = p - (value / slope.square().sum(1))[:, None] * slope
    return torch.nn.functional.normalize(slope, dim=1).numpy()


def shade(normals: Array) -> Array:
    return np.clip(normals @ LIGHT, 0, None)


def errors(made: Textured, relief: Array, frames: Array) -> tuple[float, float]:
    """Root mean square errors of the shading from a camera, without the map and with it (glTF 2.0, section 3.9.3)."""
    angle = torch.tensor([0.6])
    view = look(made.mesh, orbit(angle, angle, 3 * angle / angle, angle, 96, 96))
    place, normal, uv, frame = (
        view.blend(x, made.mesh.faces) for x in (made.mesh.vertices, made.normals, made.uv, frames)
    )
    normal = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    x, y, z = (replace(made, image=relief).at(uv) / 127.5 - 1).T[..., None]
    mapped = x * frame[:, :3] + y * np.cross(normal, frame[:, :3]) * frame[:, 3:] + z * normal
    mapped = mapped / np.linalg.norm(mapped, axis=1, keepdims=True)
    truth = shade(true_normals(place))
    return tuple(float(np.sqrt(np.square(shade(n) - truth).mean())) for n in (normal, mapped))  # type: ignore[return-value]


def test_the_map_brings_the_bumps_back(made: Textured) -> None:
    assert made.relief is not None and len(made.mesh.faces) <= 300
    plain, mapped = errors(made, made.relief, made.tangents)
    assert plain > 0.04 and mapped < plain / 4
    wrong = {"green down": made.relief * np.array([1, -1, 1]) + [0, 255, 0], "swapped": made.relief[..., [1, 0, 2]]}
    mirrored = made.tangents * [1, 1, 1, -1]
    for relief, frames in [*((image, made.tangents) for image in wrong.values()), (made.relief, mirrored)]:
        assert errors(made, relief.astype(np.uint8), frames)[1] > plain


def test_readers_find_it_in_the_file(made: Textured, tmp_path: Path) -> None:
    path = glb.write(made, tmp_path / "ball.glb")
    material: Any = trimesh.load(path, process=False, force="mesh").visual.material
    assert np.array_equal(np.asarray(material.normalTexture.convert("RGB")), made.relief)
    assert np.array_equal(np.asarray(material.baseColorTexture.convert("RGB")), made.image)
    data = path.read_bytes()
    size = struct.unpack("<I", data[12:16])[0]
    head, body = json.loads(data[20 : 20 + size]), data[28 + size :]
    accessor = head["accessors"][head["meshes"][0]["primitives"][0]["attributes"]["TANGENT"]]
    start = head["bufferViews"][accessor["bufferView"]]["byteOffset"]
    found = np.frombuffer(body, "<f4", 4 * accessor["count"], start).reshape(-1, 4)
    assert accessor["type"] == "VEC4" and np.allclose(found, made.tangents, atol=1e-6)
    assert np.allclose(np.linalg.norm(found[:, :3], axis=1), 1, atol=1e-5) and set(found[:, 3]) <= {1.0, -1.0}


def test_frames_follow_the_texture() -> None:
    """On a square seen from +z: u to the right and v down is w = 1; a mirrored texture is w = -1."""
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    flat = Mesh(corners, np.array([[0, 1, 2], [0, 2, 3]]))
    up, blank = np.tile([0.0, 0, 1], (4, 1)), np.zeros((4, 4, 3), np.uint8)
    upright = corners[:, :2] * [1, -1] + [0, 1]
    assert np.allclose(Textured(flat, up, upright, blank).tangents, [1, 0, 0, 1])
    assert np.allclose(Textured(flat, up, upright * [-1, 1] + [1, 0], blank).tangents, [-1, 0, 0, -1])
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert np.allclose(Textured(flat, up, upright, blank).moved(turn, 2.0, np.ones(3)).tangents, [0, 1, 0, 1])
