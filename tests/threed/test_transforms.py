"""transforms.json: cameras and pictures there and back, lenses unlike ours, bad files, and a scene fitted to one."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import solid
import torch
from PIL import Image
from torch import Tensor

from limbeck import cli
from limbeck.core.run import job
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.domains.threed import known, transforms
from limbeck.domains.threed.cameras import Cameras, ring
from limbeck.domains.threed.known import Known

ALONE = [
    "teacher.size=16",
    "data.size=16",
    "student.field.size=16",
    "student.sampling.samples=12",
    "student.sampling.proposal=12",
    "checkpoint.every=1000",
    "sample.every=1000",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve views of a solid, 24 pixels wide."""
    folder = tmp_path_factory.mktemp("set")
    transforms.write(solid.Solid(), transforms.around(12, 24, 3.0), folder)
    return folder


def changed(written: Path, folder: Path, **words: Any) -> Path:
    """A copy of the data set with other words for all frames (None: taken out)."""
    whole = json.loads((written / "transforms.json").read_text()) | words
    (folder / "images").mkdir(exist_ok=True)
    for path in (written / "images").iterdir():
        (folder / "images" / path.name).write_bytes(path.read_bytes())
    (folder / "transforms.json").write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))
    return folder


def textbook(whole: dict[str, Any], frame: int, point: Tensor) -> Tensor:
    """The pixel (u, v) of a point by the format's own words: OpenGL camera to world, lens in pixels."""
    pose = torch.tensor(whole["frames"][frame]["transform_matrix"], dtype=torch.float64)
    x, y, z, _ = torch.linalg.solve(pose, torch.cat([point, point.new_ones(1)]))
    return torch.stack([whole["cx"] + whole["fl_x"] * x / -z, whole["cy"] + whole["fl_y"] * -y / -z])


def pixel(cameras: Cameras, point: Tensor) -> Tensor:
    """The pixel (u, v) [V,2] of a point as our cameras project it."""
    double = cameras.to(point)
    turn, shift = double.view()
    ahead = turn @ point + shift
    middle = point.new_tensor([cameras.width / 2, cameras.height / 2])
    return double.focal[:, None] * ahead[:, :2] / ahead[:, 2:] + middle


def test_a_point_is_seen_at_the_same_pixel(written: Path) -> None:
    whole = json.loads((written / "transforms.json").read_text())
    point = torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)
    cameras = transforms.read(written, 24).cameras
    expected = torch.stack([textbook(whole, i, point) for i in range(12)])
    assert torch.allclose(pixel(cameras, point), expected, atol=1e-4)
    assert torch.allclose(pixel(transforms.around(12, 24, 3.0), point), expected, atol=1e-4)
    angle = 2 * math.atan(whole["w"] / 2 / whole["fl_x"])
    assert whole["camera_angle_x"] == pytest.approx(angle) == pytest.approx(math.radians(40))


def test_pictures_come_back_as_they_were(written: Path) -> None:
    found, cameras = transforms.read(written, 24), transforms.around(12, 24, 3.0)
    true = solid.Solid().render(cameras, torch.ones(12, 3))
    assert (found.image - true.image).abs().max() < 0.02 and (found.alpha - true.alpha).abs().max() < 0.004
    assert torch.allclose(found.cameras.pose, cameras.pose, atol=1e-6)
    half = transforms.read(written, 12)  # means of blocks of two, and so what cameras of half the size see
    assert known.psnr(half.image, torch.nn.functional.avg_pool2d(true.image, 2)) > 45


def test_colours_of_an_edge_are_not_mixed_with_what_is_behind(tmp_path: Path) -> None:
    soft = solid.Solid(dense=6.0, ramp=0.5)
    transforms.write(soft, ring(1, 24, elevation=0), tmp_path)
    with Image.open(tmp_path / "images" / "0000.png") as picture:
        pixels = np.asarray(picture).astype(int)
    half = (pixels[..., 3] > 40) & (pixels[..., 3] < 120)
    assert half.sum() > 20 and pixels[half].min(1).max() < 60  # all its colours lack one of red, green and blue
    found = transforms.read(tmp_path, 24)
    assert known.psnr(found.image, soft.render(ring(1, 24, elevation=0), torch.ones(1, 3)).image) > 45


def test_cameras_stand_all_around() -> None:
    azimuth, elevation = transforms.around(200, 8, 3.0).angles()
    sectors = torch.histc(torch.remainder(azimuth, 2 * math.pi), 8, 0, 2 * math.pi)
    assert sectors.min() > 18 and sectors.max() < 32
    assert elevation.min() < math.radians(-28) and elevation.max() > math.radians(75)


def test_blender_scenes_of_nerf_are_read(written: Path, tmp_path: Path) -> None:
    frames = json.loads((written / "transforms.json").read_text())["frames"]
    for frame in frames:
        frame["file_path"] = "./" + frame["file_path"].removesuffix(".png")
    lens = dict.fromkeys(("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_model", "camera_angle_y"))
    folder = changed(written, tmp_path, frames=frames, **lens)  # camera_angle_x is what is left
    one, two = transforms.read(written, 24), transforms.read(folder / "transforms.json", 24)
    assert torch.allclose(one.cameras.fov, two.cameras.fov) and torch.allclose(one.image, two.image, atol=1e-5)


def test_a_frame_s_own_lens_counts(written: Path, tmp_path: Path) -> None:
    frames = json.loads((written / "transforms.json").read_text())["frames"]
    frames[3] |= {"fl_x": 60.0, "fl_y": 60.0}
    fov = transforms.read(changed(written, tmp_path, frames=frames), 24).cameras.fov
    assert fov[3].item() == pytest.approx(2 * math.atan(12 / 60)) and fov[2].item() == pytest.approx(math.radians(40))


def single(folder: Path, picture: Tensor, camera: Cameras, size: int, **lens: Any) -> Known:
    """What is read of one picture [3,H,W] in [-1, 1] from this pose."""
    pixels = ((picture.movedim(0, -1) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).save(folder / "one.png")
    frame = {"file_path": "one.png", "transform_matrix": camera.pose[0].tolist(), **lens}
    (folder / "transforms.json").write_text(json.dumps({"frames": [frame]}))
    return transforms.read(folder, size)


def true(cameras: Cameras) -> Tensor:
    """The solid's pictures, each pixel the mean of what lies in it."""
    fine = cameras.sized(3 * cameras.height, 3 * cameras.width)
    return torch.nn.functional.avg_pool2d(solid.Solid().render(fine, torch.ones(len(cameras), 3)).image, 3)


def test_a_principal_point_elsewhere_and_pixels_that_are_not_square(tmp_path: Path) -> None:
    camera = ring(1, 48, elevation=20)
    picture, f = true(camera)[0], float(camera.focal[0])
    cut = picture[:, 2:44, 6:46]  # 42 rows, 40 columns
    found = single(tmp_path, cut, camera, 21, fl_x=f, fl_y=f, cx=24 - 6, cy=24 - 2)
    assert known.psnr(found.image, true(found.cameras)) > 28
    centred = single(tmp_path, cut, camera, 21, fl_x=f, fl_y=f)
    assert known.psnr(centred.image, true(centred.cameras)) < 20
    optics = transforms.Optics(40, 42, f, f, 18, 22, (0.0,) * 6)
    places = optics.places(optics.inner(21, 20), 21, 20).abs().amax((0, 1))  # all in the picture, one side to its edge
    assert places.max() < 1 and (places > 1 - 1 / 20).any()
    flat = torch.nn.functional.avg_pool2d(picture[None], (2, 1))[0]  # half as many rows
    found = single(tmp_path, flat, camera, 24, fl_x=f, fl_y=f / 2)
    assert found.cameras.height == 12 and known.psnr(found.image, true(found.cameras)) > 28


def test_distortion_is_taken_out(tmp_path: Path) -> None:
    """A picture whose red and green are where its rays go, bent as OpenCV says; read, they are where ours go."""
    bent, f, size = {"k1": 0.2, "k2": -0.05, "p1": 0.03, "p2": -0.02}, 50.0, 64
    place = (torch.arange(size) + 0.5 - size / 2) / f
    v, u = torch.meshgrid(place, place, indexing="ij")
    x, y = u.clone(), v.clone()
    for _ in range(40):  # what is bent to (u, v)
        r = x * x + y * y
        radial = 1 + bent["k1"] * r + bent["k2"] * r * r
        x = (u - 2 * bent["p1"] * x * y - bent["p2"] * (r + 2 * x * x)) / radial
        y = (v - bent["p1"] * (r + 2 * y * y) - 2 * bent["p2"] * x * y) / radial
    picture = torch.stack([x, y, 0 * x]) / 0.7
    camera = ring(1, size)
    for lens, bound in ((bent, 0.006), ({}, None), ({**bent, "p1": -0.03}, None)):
        found = single(tmp_path, picture, camera, size, fl_x=f, **lens)
        rays = (found.cameras.rays()[1][0] @ camera.pose[0, :, :3]) * torch.tensor([1.0, -1.0, -1.0])
        error = (found.image[0, :2].movedim(0, -1) * 0.7 - rays[..., :2] / rays[..., 2:])[6:-6, 6:-6].abs().max()
        assert error < bound if bound else error > 0.012


def moved(cameras: Cameras, turn: Tensor, scale: float, shift: Tensor) -> Cameras:
    """The same cameras in another world."""
    pose = torch.cat([turn @ cameras.pose[:, :, :3], turn @ cameras.pose[:, :, 3:] * scale + shift[:, None]], 2)
    return replace(cameras, pose=pose)


def test_a_world_of_its_own_is_brought_into_the_ball() -> None:
    cameras = ring(16, 24, elevation=25, distance=1 / math.sin(math.radians(20)))
    turn, _ = torch.linalg.qr(torch.tensor([[1.0, 0.3, 0.1], [-0.2, 1.0, 0.4], [0.1, -0.5, 1.0]]))
    turn = turn * turn.det()
    found = transforms.centre(moved(cameras, turn, 7.0, torch.tensor([5.0, -3.0, 40.0])), "x")
    assert torch.allclose(found.position.norm(dim=1), cameras.position.norm(dim=1), atol=1e-3)
    assert torch.allclose(found.angles()[1], cameras.angles()[1], atol=1e-3)  # upright: z is up again
    steps = (found.angles()[0].diff() - cameras.angles()[0].diff() + math.pi) % (2 * math.pi) - math.pi
    assert steps.abs().max() < 1e-3  # and not mirrored
    aside = replace(cameras, pose=cameras.pose[:1].expand(16, -1, -1))
    with pytest.raises(BadInput, match="parallel axes"):
        transforms.centre(aside, "x")


MATRIX = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 3], [0, 0, 0, 1]]


def frame(**words: Any) -> dict[str, Any]:
    """One good frame with other words."""
    given = {"file_path": "images/0000.png", "transform_matrix": MATRIX} | words
    return {"frames": [{k: v for k, v in given.items() if v is not None}]}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"frames": None}, "frames: Field required"),
        ({"frames": []}, "frames: .*at least 1 item"),
        ({"frames": {"a": 1}}, "frames: .*valid array"),
        (frame(file_path=None), "frames.0.file_path: Field required"),
        (frame(file_path=7), "frames.0.file_path: .*valid string"),
        (frame(transform_matrix=None), "frames.0.transform_matrix: Field required"),
        (frame(transform_matrix=MATRIX[:2]), "frames.0.transform_matrix: .*at least 3"),
        (frame(transform_matrix=[[1, 0, 0, math.nan], *MATRIX[1:]]), "transform_matrix.0.3: .*finite number"),
        (frame(transform_matrix=[[1, 0, 0, "left"], *MATRIX[1:]]), "transform_matrix.0.3: .*valid number"),
        (frame(transform_matrix=[[2, 0, 0, 0], *MATRIX[1:]]), "frame 0: transform_matrix is no rotation"),
        (frame(transform_matrix=[[-1, 0, 0, 0], *MATRIX[1:]]), "frame 0: transform_matrix is no rotation"),
        (frame(transform_matrix=[*MATRIX[:3], [0, 0, 1, 1]]), "frame 0: transform_matrix is no rotation"),
        (frame(file_path="../secret.png"), "lies outside of the data set's folder"),
        (frame(file_path="/etc/passwd"), "lies outside of the data set's folder"),
        (frame(file_path="images/a\0.png"), r"a\\x00.*lies outside"),
        (frame(file_path="images/9999.png"), "there is no such picture"),
        (frame(file_path="transforms.json"), "is no picture that can be read"),
        ({"fl_x": None, "fl_y": None, "camera_angle_x": None, "camera_angle_y": None}, "no focal length"),
        ({"fl_x": -3}, "fl_x: .*greater than 0"),
        ({"cx": 90}, "principal point cx 90, cy 12 is outside"),
        ({"w": 48}, "is 24 x 24 pixels, and w and h say 48 x 24"),
        ({"camera_model": "OPENCV_FISHEYE"}, "camera model OPENCV_FISHEYE are not read"),
    ],
)
def test_bad_files_get_one_clear_line(written: Path, tmp_path: Path, words: dict[str, Any], line: str) -> None:
    folder = changed(written, tmp_path, **words)
    with pytest.raises(BadInput, match=line) as caught:
        transforms.read(folder, 24)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_files_that_are_none(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="there is no such file"):
        transforms.read(tmp_path, 24)
    for text in (b"", b"\xff\xfe{", b"[1]", b"[" * 100_000, b'{"frames": NaN'):
        (tmp_path / "transforms.json").write_bytes(text)
        with pytest.raises(BadInput, match=r"transforms.json: .*correct it") as caught:
            transforms.read(tmp_path, 24)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(transforms, "TOTAL", 12 * 24 * 24 - 1)
    with pytest.raises(BadInput, match="12 pictures of 24 x 24 pixels are too many"):
        transforms.read(written, 24)
    monkeypatch.setattr(transforms, "PIXELS", 500)
    with pytest.raises(BadInput, match="has 24 x 24 pixels; make it smaller"):
        transforms.read(written, 24)
    monkeypatch.setattr(transforms, "BYTES", 500)
    with pytest.raises(BadInput, match="bytes, and 500 is the most"):
        transforms.read(written, 24)


def test_a_scene_of_latents_has_no_pictures(tmp_path: Path) -> None:
    scene = solid.Solid()
    scene.channels = 4
    with pytest.raises(BadInput, match="latent channels"):
        transforms.write(scene, ring(1, 8), tmp_path)


def loss(folder: Path, rate: float = 0.15) -> str:
    optim = f"{{kind: adam, lr: {rate}, betas: [0.9, 0.99], clip: null}}"
    return f"stages.0.losses=[{{kind: threed.photos, folder: '{folder}', size: 16, hold: 4, optim: {optim}}}]"


def test_a_scene_is_fitted_to_a_data_set_and_exported_as_one(written: Path, tmp_path: Path) -> None:
    """By pictures alone, through recipe, run, metric and export; what is exported is read back."""
    metric = f"eval=[{{kind: threed.photos, folder: '{written}', size: 16, hold: 4}}]"
    files = ["space.files.frames=5", "space.files.size=20"]
    run = tmp_path / "run"
    assert (
        job.run(load("toy/solids", [*ALONE, *files, loss(written), metric, "steps=40"]), run, device="cpu", quiet=True)
        == 0
    )
    scene, white = json.loads((run / "eval.json").read_text())["threed.photos"]
    assert scene["PSNR"] > white["PSNR"] + 8 and scene["silhouette IoU"] > 0.85
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(run), "--format", "transforms", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert end.value.code in (0, None)
    facts = json.loads((tmp_path / "out" / "asset.json").read_text())
    assert facts["files"][0] == "transforms.json" and facts["views"] == 5
    again = transforms.read(tmp_path / "out", 20)
    build = job.open_run(run, "cpu")
    seen = build.piece("student").scenes[0].render(again.cameras, torch.ones(5, 3)).image
    assert known.psnr(again.image, seen.detach()) > 40


def test_pictures_held_out_are_not_learned_from(written: Path) -> None:
    build = Build(load("toy/solids", [*ALONE, loss(written)]))
    learned = build.objective(build.recipe.stages[0])
    assert len(learned.pictures.cameras) == 9  # type: ignore[attr-defined]
