"""All formats of assets: written, read back by others' readers, with their facts; and meshes that cannot be read."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import solid
import torch
import trimesh
from PIL import Image

from limbeck.core.run.errors import BadInput
from limbeck.domains.threed import asset, meshfile, objfile, turntable
from limbeck.domains.threed.bake import Textured
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.gaussians import Gaussians
from limbeck.domains.threed.rasteriser import Splats

FILES = Files(resolution=32, faces=600, texture=256, colours="field", height=2.0, frames=5, size=33)
TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"


@pytest.fixture(scope="module")
def made() -> asset.Made:
    return asset.make(solid.Solid(), FILES)


def test_glb_and_its_facts(tmp_path: Path) -> None:
    facts = {"prompt": "a ball", "seed": 3}
    paths = asset.export(solid.Solid(), tmp_path / "glb", "glb", FILES, facts)
    assert [p.name for p in paths] == ["asset.glb", "asset.json"] and all(p.parent == tmp_path / "glb" for p in paths)
    found = json.loads(paths[1].read_text())
    mesh: Any = trimesh.load(paths[0], process=False, force="mesh")
    assert (found["prompt"], found["seed"], found["faces"], found["watertight"]) == ("a ball", 3, len(mesh.faces), True)
    assert np.abs(np.array(found["bounds"]) - mesh.bounds).max() < 1e-5 and found["unit"] == "metre"
    assert found["euler"] == [2] and set(found["seconds"]) == {"surface", "texture"} and found["colours"] == "field"


@pytest.mark.parametrize(("up", "top", "front"), [("y", 1, (0, 0, 1)), ("z", 2, (0, -1, 0))])
def test_obj_reads_back_the_right_way_up(up: Any, top: int, front: Any, made: asset.Made, tmp_path: Path) -> None:
    whole = made.standing(2.0, up)
    paths = objfile.write_obj(whole, tmp_path / "ball.obj", up)
    assert [p.name for p in paths] == ["ball.obj", "ball.mtl", "ball.png"]
    assert (
        "one unit is one metre" in paths[0].read_text().splitlines()[0] and f"{up} is up" in paths[0].read_text()[:60]
    )
    found: Any = trimesh.load(paths[0], process=False, force="mesh")
    assert found.bounds[:, top] == pytest.approx([0, 2], abs=1e-5) and found.volume > 0
    uv = found.visual.uv[found.faces[int((found.face_normals @ np.array(front, float)).argmax())]].mean(0)
    texture = np.asarray(found.visual.material.image.convert("RGB"))
    texel = texture[int((1 - uv[1]) * len(texture)), int(uv[0] * len(texture))]
    assert np.abs(texel / 255 - solid.GREEN).max() < 0.02
    notes: list[str] = []
    back = meshfile.read(paths[0], notes.append, up)
    assert back.mesh.bounds == pytest.approx(2.0 / 1.2 * np.array([[-0.6, -0.6, 0], [0.6, 0.6, 1.2]]), abs=0.03)
    assert np.abs(back.uv.min(0) - whole.uv.min(0)).max() < 1e-5 and notes == []


def test_ply_has_the_colours_of_its_vertices(made: asset.Made, tmp_path: Path) -> None:
    path = objfile.write_ply(made.standing(2.0, "y"), tmp_path / "ball.ply")
    found: Any = trimesh.load(path, process=False)
    assert found.is_watertight and found.volume > 0 and found.bounds[:, 1] == pytest.approx([0, 2], abs=1e-5)
    top, front = found.vertices[:, 1].argmax(), found.vertices[:, 2].argmax()
    for vertex, colour in ((top, solid.BLUE), (front, solid.GREEN)):
        assert np.abs(found.visual.vertex_colors[vertex, :3] / 255 - colour).max() < 0.02


def test_usdz_reads_back(made: asset.Made, tmp_path: Path) -> None:
    usd = pytest.importorskip("pxr.Usd")
    from pxr import UsdGeom

    stage = usd.Stage.Open(str(objfile.write_usdz(made.standing(2.0, "y"), tmp_path / "ball.usdz")))
    mesh = UsdGeom.Mesh(stage.GetPrimAtPath("/asset/mesh"))
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1.0
    assert np.ptp(np.array(mesh.GetPointsAttr().Get()), axis=0)[1] == pytest.approx(2.0, abs=1e-5)
    assert len(mesh.GetFaceVertexCountsAttr().Get()) == len(made.asset.mesh.faces)


def test_usdz_names_its_extra(made: asset.Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pxr", None)
    with pytest.raises(BadInput, match=r"limbeck\[usd\]"):
        objfile.write_usdz(made.asset, tmp_path / "x.usdz")


class Shaded(solid.Solid):  # type: ignore[name-defined]
    """With normals: those of a ball."""

    def render(self, cameras: Any, background: Any, jitter: Any = None) -> Any:
        views = super().render(cameras, background)
        origin, ray = cameras.rays()
        point = torch.nn.functional.normalize(origin + ray * 2.4, dim=-1).movedim(-1, 1)
        views.normals = point * views.alpha
        return views


def test_a_film_reads_back(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    paths = asset.export(Shaded(), tmp_path / "turn.mp4", "mp4", FILES, {})
    assert [p.name for p in paths] == ["turn.mp4", "turn-depth.mp4", "turn-normals.mp4", "turn.json"]
    for path in paths[:3]:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
            assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p" and stream.average_rate == 24
        assert len(frames) == 5 and frames[0].shape == (34, 34, 3)  # even sides
    with av.open(str(paths[0])) as file:
        first = next(file.decode(video=0)).to_ndarray(format="rgb24")
    true = turntable.frames(Shaded().render(ring(1, 33), torch.ones(1, 3)))[0].numpy()
    assert np.abs(first[:33, :33].astype(int) - true).mean() < 8


def test_a_film_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadInput, match=r"limbeck\[threed\].*gif"):
        turntable.videos(Shaded(), ring(1, 4), tmp_path / "x.mp4")


def test_gif_and_sheet(tmp_path: Path) -> None:
    (path, _) = asset.export(Shaded(), tmp_path / "gif", "gif", FILES, {})
    with Image.open(path) as picture:
        assert picture.n_frames == 5 and picture.size == (33, 33) and picture.info["loop"] == 0  # type: ignore[attr-defined]
    (path, _) = asset.export(Shaded(), tmp_path / "sheet", "sheet", FILES, {})
    with Image.open(path) as picture:
        assert picture.size == (8 * 33, 3 * 33)
    with pytest.raises(BadInput, match="no normals"):
        turntable.frames(solid.Solid().render(ring(1, 8), torch.ones(1, 3)), "normals")


def test_depth_is_bright_where_it_is_near() -> None:
    picture = turntable.frames(solid.Solid().render(ring(1, 33, elevation=0), torch.ones(1, 3)), "depth")[0, :, :, 0]
    assert picture[16, 16] > 240 and 20 < picture[16, 7] < 120 and picture[0, 0] == 0


def test_splats_are_for_gaussians(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="splat-ply holds Gaussians, and this scene has none"):
        asset.export(solid.Solid(), tmp_path, "splat-ply", FILES, {})
    rows = torch.tensor([1.0, 0, 0, 0]).expand(4, 4).clone()
    splats = Splats(torch.zeros(4, 3), torch.full((4, 3), math.log(0.1)), rows, torch.zeros(4), torch.zeros(4, 3))
    for format, size in (("splat-ply", 248), ("splat", 32)):
        path, facts = asset.export(Gaussians(splats), tmp_path / format, format, FILES, {"seed": 1})
        assert path.stat().st_size >= 4 * size and json.loads(facts.read_text())["splats"] == 4
    with pytest.raises(BadInput, match='obk is no format of assets .did you mean "obj"'):
        asset.export(solid.Solid(), tmp_path, "obk", FILES, {})


def read(folder: Path, text: str) -> Textured:
    (folder / "x.obj").write_text(text)
    return meshfile.read(folder / "x.obj", lambda line: (folder / "note").write_text(line))


def test_a_mesh_without_uv_is_unwrapped_with_a_note(tmp_path: Path) -> None:
    found = read(tmp_path, "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n")
    assert len(found.mesh.faces) == 2 and found.uv.min() >= 0 and found.uv.max() <= 1
    assert (
        np.ptp(found.uv, axis=0).min() > 0.5 and (tmp_path / "note").read_text() == "x.obj has no uv: it was unwrapped"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.obj (has no faces|is no OBJ)"),
        (TRIANGLE, "has no faces; export triangles"),
        (TRIANGLE.replace("1 0 0", "nan 0 0") + "f 1 2 3\n", "1 of 3 vertices are NaN or infinite"),
        (TRIANGLE + "f 1 2 9\n", "is no OBJ that can be read|has no"),
        ("v 0 0 0\nv 1 1 1\nv 2 2 2\nf 1 2 3\n", "has no area"),
        ("v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n", "is broken: faces name vertices that are not there or not in space"),
        ("\0\1\2 ball", "x.obj (has no faces|is no OBJ)"),
        ("f 1 2 3\n" * 10_000_000, "has 10000000 faces; decimate it to 1000000 at most"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_bad_meshes_get_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_uv_of_tiled_textures_are_made_anew_with_a_note(tmp_path: Path) -> None:
    found = read(tmp_path, TRIANGLE + "vt 0.8 0.5\nvt 1.7 0.5\nvt 1.7 0.9\nf 1/1 2/2 3/3\n")
    assert found.uv.min() >= 0 and found.uv.max() <= 1
    assert (tmp_path / "note").read_text().startswith("x.obj has uv outside of [0, 1]")
