"""GLB files as other readers see them: axes, units, colours, and pictures of them beside the scene's own."""

import io
import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import solid
import torch
import trimesh
from PIL import Image

from limbeck.core.run.errors import BadInput
from limbeck.domains.threed import asset, glb, meshfile
from limbeck.domains.threed.bake import Textured
from limbeck.domains.threed.cameras import Cameras, ring
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.shape import Mesh

FILES = Files(resolution=48, faces=800, texture=256, height=1.8)


@pytest.fixture(scope="module")
def made() -> asset.Made:
    return asset.make(solid.Solid(), FILES)


@pytest.fixture(scope="module")
def standing(made: asset.Made) -> Textured:
    return made.standing(FILES.height, "y")


@pytest.fixture(scope="module")
def path(standing: Textured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glb.write(standing, tmp_path_factory.mktemp("glb") / "ball.glb", "ball")


def chunks(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and body, by the standard's own layout."""
    data = path.read_bytes()
    magic, version, length = struct.unpack("<III", data[:12])
    assert (magic, version, length) == (0x46546C67, 2, len(data))
    size, kind = struct.unpack("<II", data[12:20])
    assert kind == 0x4E4F534A and size % 4 == 0
    rest, kind = struct.unpack("<II", data[20 + size : 28 + size])
    assert kind == 0x004E4942 and rest % 4 == 0 and 28 + size + rest == len(data)
    return json.loads(data[20 : 20 + size]), data[28 + size :]


def test_the_file_is_what_artists_tools_agree_on(path: Path, standing: Textured) -> None:
    head, body = chunks(path)
    assert head["asset"]["version"] == "2.0" and len(head["meshes"]) == len(head["nodes"]) == 1
    (part,) = head["meshes"][0]["primitives"]
    assert set(part["attributes"]) == {"POSITION", "NORMAL", "TEXCOORD_0"} and part["mode"] == 4
    (material,) = head["materials"]
    surface = material["pbrMetallicRoughness"]
    assert (surface["metallicFactor"], surface["roughnessFactor"], material["doubleSided"]) == (0, 1, False)
    assert not {"extensionsRequired", "extensionsUsed"} & set(head)
    for view in head["bufferViews"]:
        assert view["byteOffset"] % 4 == 0 and view["byteOffset"] + view["byteLength"] <= len(body)
    image = head["bufferViews"][head["images"][0]["bufferView"]]
    picture = Image.open(io.BytesIO(body[image["byteOffset"] : image["byteOffset"] + image["byteLength"]]))
    assert picture.format == "PNG" and np.array_equal(np.asarray(picture), standing.image)
    places = np.frombuffer(body, "<f4", standing.mesh.vertices.size).reshape(-1, 3)
    assert head["accessors"][0]["min"] == places.min(0).tolist()
    assert head["accessors"][0]["max"] == places.max(0).tolist()


def test_it_stands_upright_on_the_ground_in_metres(path: Path, standing: Textured) -> None:
    found: Any = trimesh.load(path, process=False, force="mesh")
    assert found.bounds[:, 1] == pytest.approx([0.0, 1.8], abs=1e-5)
    assert found.bounds[:, [0, 2]].sum(0) == pytest.approx(0, abs=1e-5)  # the pivot is below the middle
    assert np.abs(found.vertices - standing.mesh.vertices).max() < 1e-5
    assert np.array_equal(found.faces, standing.mesh.faces)
    assert found.visual.uv.min() >= 0 and found.visual.uv.max() <= 1
    assert found.volume > 0 and (found.face_normals * found.triangles_center).sum(1).min() > -1.8
    welded = found.copy()
    welded.merge_vertices(merge_tex=True, merge_norm=True)
    assert welded.is_watertight


@pytest.mark.parametrize(
    ("towards", "colour"),
    [((0, 0, 1), solid.GREEN), ((0, 1, 0), solid.BLUE), ((1, 0, 0), solid.YELLOW), ((0, 0, -1), solid.RED)],
)
def test_the_front_is_plus_z_and_up_is_plus_y(path: Path, towards: Any, colour: Any) -> None:
    """Left (+y of a scene) is +X, so that nothing is mirrored."""
    found: Any = trimesh.load(path, process=False, force="mesh")
    face = int((found.face_normals @ np.array(towards, float)).argmax())
    uv = found.visual.uv[found.faces[face]].mean(0)
    texture = np.asarray(found.visual.material.baseColorTexture.convert("RGB"))
    height, width = texture.shape[:2]
    texel = texture[int((1 - uv[1]) * height), int(uv[0] * width)]  # trimesh turns v upwards
    assert np.abs(texel / 255 - colour).max() < 0.02


def cast(path: Path, cameras: Cameras, size: int) -> torch.Tensor:
    """Pictures [V,3,H,W] in [-1, 1] of a GLB by rays (Moeller and Trumbore 1997): none of the library's geometry."""
    found: Any = trimesh.load(path, process=False, force="mesh")
    texture = np.asarray(found.visual.material.baseColorTexture.convert("RGB")) / 127.5 - 1
    place = np.asarray(found.vertices)[:, [2, 0, 1]] * (1.2 / 1.8) - [0, 0, 0.6]  # back to the scene's ball
    a, b, c = place[found.faces].swapaxes(0, 1)
    pictures = []
    for v in range(len(cameras)):
        origin, ray = (x[0].reshape(-1, 3).double().numpy() for x in cameras.pick(slice(v, v + 1)).rays())
        across = np.cross(ray[:, None], (c - a)[None])
        area = ((b - a) * across).sum(-1)
        away = origin[:, None] - a
        with np.errstate(divide="ignore", invalid="ignore"):
            u = (away * across).sum(-1) / area
            turned = np.cross(away, b - a)
            w = (ray[:, None] * turned).sum(-1) / area
            t = ((c - a) * turned).sum(-1) / area
            hit = (area > 1e-12) & (u >= 0) & (w >= 0) & (u + w <= 1) & (t > 0)  # only faces that look here
        t = np.where(hit, t, np.inf)
        near, rows = t.argmin(1), np.arange(len(t))
        corner = found.visual.uv[found.faces[near]]
        u, w = (np.where(hit[rows, near], x[rows, near], 0)[:, None] for x in (u, w))
        uv = corner[:, 0] * (1 - u - w) + corner[:, 1] * u + corner[:, 2] * w
        texel = texture[np.clip((1 - uv[:, 1]) * len(texture), 0, len(texture) - 1).astype(int),
                        np.clip(uv[:, 0] * len(texture), 0, len(texture) - 1).astype(int)]  # fmt: skip
        pictures.append(np.where(np.isfinite(t[rows, near])[:, None], texel, 1.0).reshape(size, size, 3))
    return torch.as_tensor(np.stack(pictures)).movedim(-1, 1).float()


def decibels(path: Path) -> float:
    """Of the file's pictures at 32 pixels against those of the scene, from in front and from behind."""
    cameras = ring(2, 32, elevation=20, offset=33)
    true = solid.Solid().render(cameras, torch.ones(2, 3)).image
    error = ((cast(path, cameras, 32) - true) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def test_pictures_of_the_file_are_the_scenes_own(path: Path, standing: Textured, tmp_path: Path) -> None:
    right = decibels(path)
    assert right > 25
    flipped = replace(standing, uv=standing.uv * [1, -1] + [0, 1])
    assert decibels(glb.write(flipped, tmp_path / "flipped.glb")) < 18
    turned = standing.moved(np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]]), 1.0, np.zeros(3))  # the front at +X
    assert decibels(glb.write(turned, tmp_path / "turned.glb")) < 20
    inside = replace(standing, mesh=Mesh(standing.mesh.vertices, standing.mesh.faces[:, ::-1]))
    assert decibels(glb.write(inside, tmp_path / "inside.glb")) < 20
    linear = replace(standing, image=(255 * (standing.image / 255) ** 2.2).astype(np.uint8))
    assert decibels(glb.write(linear, tmp_path / "linear.glb")) < right - 3


def test_files_repeat(path: Path, standing: Textured, tmp_path: Path) -> None:
    assert glb.write(standing, tmp_path / "again.glb", "ball").read_bytes() == path.read_bytes()


def test_a_file_is_read_back_into_a_scenes_axes(path: Path, made: asset.Made, standing: Textured) -> None:
    notes: list[str] = []
    found = meshfile.read(path, notes.append)
    assert np.abs(found.mesh.vertices @ asset.TURNS["y"].T - standing.mesh.vertices).max() < 1e-5
    assert np.abs(found.uv - standing.uv).max() < 1e-6 and np.array_equal(found.image, standing.image)
    assert found.mesh.bounds[1, 2] == pytest.approx(1.8, abs=1e-5) and notes == []
    assert found.mesh.welded().watertight


def glb_of(folder: Path, **changes: Any) -> Path:
    """A GLB whose header is changed."""
    triangle = Mesh(np.eye(3), np.array([[0, 1, 2]]))
    whole = Textured(triangle, np.ones((3, 3)) / 3**0.5, np.eye(3)[:, :2], np.zeros((4, 4, 3), np.uint8))
    path = glb.write(whole, folder / "x.glb")
    head, body = chunks(path)
    text = json.dumps(head | changes).encode()
    text += b" " * (-len(text) % 4)
    inner = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(body), 0x004E4942) + body
    path.write_bytes(struct.pack("<III", 0x46546C67, 2, 12 + len(inner)) + inner)
    return path


def refused(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        meshfile.read(path, print)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    return str(caught.value)


def test_broken_glb_files_get_one_clear_line(path: Path, tmp_path: Path) -> None:
    data, broken = path.read_bytes(), tmp_path / "b.glb"
    for text, message in (
        (b"", "is no GLB"),
        (b"solid ball", "is no GLB"),
        (data[:-100], "is broken.*announced"),
        (data[:4] + b"\1\0\0\0" + data[8:], "glTF 1"),
        (data[:20] + b"?" + data[21:], "header is no JSON"),
    ):
        broken.write_bytes(text)
        assert re.search(message, refused(broken)), refused(broken)
    assert "can be read" in refused(glb_of(tmp_path, bufferViews=[]))
    assert "has no faces" in refused(glb_of(tmp_path, scenes=[{"nodes": []}], nodes=[]))
    many = [{"componentType": 5125, "type": "SCALAR", "count": 30_000_000, "bufferView": 0}] * 4
    assert "has 10000000 faces; decimate it to 1000000" in refused(glb_of(tmp_path, accessors=many))
    for part in ({"meshes": [{}]}, {"meshes": 3}, {"accessors": []}, {"meshes": [{"primitives": [{"indices": "x"}]}]}):
        assert "does not say what its meshes are" in refused(glb_of(tmp_path, **part))
    assert "there is no such file" in refused(tmp_path / "none.glb")
    assert "save it as one of them" in refused(tmp_path / "x.fbx")
