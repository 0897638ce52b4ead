"""Meshes whose texture is learned: what cameras see, gradients, files, paint and refine end to end."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.config import Uniform
from limbeck.core.diffusion.denoiser import Model
from limbeck.core.diffusion.process import process
from limbeck.core.diffusion.time import law
from limbeck.core.distillation.refine import Refined
from limbeck.core.run import job
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.core.run.rng import Draws, generator
from limbeck.core.run.trainer import Trainer
from limbeck.domains.threed import asset, known, posed, regular, space, textured
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.bake import Textured
from limbeck.domains.threed.cameras import Cameras, orbit, ring
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.raster import look
from limbeck.domains.threed.scene import Views, seen
from limbeck.domains.threed.shape import Mesh
from limbeck.domains.threed.textured import TexturedMesh

SPHERE = posed.PROMPTS[0]
SOLID = ["teacher={kind: threed.solids, size: 16}", f"data.prompt={SPHERE}", "data.size=16", "data.distance=[2.6,2.6]"]
TINY = [*SOLID, "steps=4", "checkpoint.every=2", "student.texture=32"]


def small(of: Textured, scale: float = 0.64) -> Textured:
    """A ball as big as the sphere of the solids looks, whose density begins outside its surface."""
    return of.moved(np.eye(3), scale, np.zeros(3))


def coloured(size: int = 32, **more: object) -> TexturedMesh:
    """The ball with a random texture."""
    scene = TexturedMesh(textured.ball(size), settings.Mesh.model_validate({"texture": size, **more}))
    with torch.no_grad():
        scene.texture.normal_(generator=generator(0, "test", 0))
    return scene


@pytest.fixture(scope="module")
def shapes() -> Mesh:
    """A ring through a ball, so that faces hide each other."""
    hoop, ball = trimesh.creation.torus(0.7, 0.2, 24, 12), trimesh.creation.icosphere(2, 0.45)
    both = trimesh.util.concatenate([hoop, ball])
    return Mesh(np.asarray(both.vertices), np.asarray(both.faces, np.int64))


def test_the_nearest_faces_are_those_of_the_exact_rasteriser(shapes: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    cameras = orbit(*(torch.tensor(x) for x in ([0.3, 2.0, 4.0], [0.4, -0.2, 1.2])), torch.full((3,), 3.0),
                    torch.full((3,), 0.7), 24, 32)  # fmt: skip
    corners = torch.as_tensor(shapes.corners, dtype=torch.float32)
    whole = textured.nearest(corners, cameras)
    pixel, face = whole
    share, place, depth = textured.met(corners[face], pixel, cameras)
    for i in range(3):
        truth, mine = look(shapes, cameras.pick(slice(i, i + 1))), (pixel // (24 * 32)) == i
        there = torch.full((24 * 32,), -1)
        there[pixel[mine] % (24 * 32)] = face[mine]
        agree = (there.numpy() == truth.face).mean()
        assert agree > 0.995 and (there >= 0).sum() > 80
        same = truth.face[pixel[mine].numpy() % (24 * 32)] == face[mine].numpy()
        away = np.abs(truth.depth[pixel[mine].numpy() % (24 * 32)] - depth[mine].numpy())
        assert away[same].max() < 1e-4
    assert torch.allclose(share.sum(1), torch.ones(len(share))) and float(share.min()) > -1e-2
    monkeypatch.setattr(textured, "PAIRS", 500)  # some faces at a time find the same
    assert all(torch.equal(a, b) for a, b in zip(textured.nearest(corners, cameras), whole, strict=True))


def test_nothing_behind_the_camera_is_seen(shapes: Mesh) -> None:
    cameras = ring(2, 16)
    ahead = Cameras(cameras.pose.clone(), cameras.fov, 16, 16)
    ahead.pose[:, :, 3] *= -1  # beyond the object, and looking away from it
    corners = torch.as_tensor(shapes.corners, dtype=torch.float32)
    assert len(textured.nearest(corners, ahead)[0]) == 0 < len(textured.nearest(corners, cameras)[0])


def test_coverage_is_the_share_of_a_pixel() -> None:
    camera = ring(1, 24)
    disc = math.pi * (0.5 * 24 / math.tan(math.radians(20)) * math.tan(math.asin(1 / 3))) ** 2
    area = {n: float(seen(coloured(samples=n), camera).alpha.sum()) for n in (1, 4)}
    assert area[4] == pytest.approx(disc, rel=0.015)  # the ball is a polyhedron inside its sphere
    alpha = seen(coloured(samples=4), camera).alpha
    assert set((alpha * 16).round().flatten().tolist()) >= {0.0, 16.0} and bool(((alpha > 0) & (alpha < 1)).any())
    assert torch.equal(alpha * 16, (alpha * 16).round())


def test_views_over_a_background_know_depth_and_normals() -> None:
    with torch.no_grad():
        views = coloured().render(ring(1, 32, elevation=0.0), torch.tensor([[1.0, -1.0, 0.5]]))
    assert views.image[0, :, 0, 0].tolist() == [1.0, -1.0, 0.5]
    assert float(views.depth[0, 0, 16, 16]) == pytest.approx(2.0, abs=0.03)
    assert views.normals is not None and float(views.normals[0, 0, 16, 16]) > 0.98


def test_gradients_of_texels_and_offsets() -> None:
    scene = coloured(16, offsets=True, samples=1).double()
    camera, gen = ring(1, 12).to(torch.zeros(1, dtype=torch.float64)), generator(0, "test", 1)
    weight = torch.randn(1, 3, 12, 12, generator=gen, dtype=torch.float64)
    pixel, face = textured.nearest(scene.points()[scene.faces].detach(), camera)

    def value() -> Tensor:
        return (scene.render(camera, torch.ones(1, 3)).image * weight).sum()

    slopes = torch.autograd.grad(value(), [scene.texture, scene.offsets])
    for parameter, slope in zip((scene.texture, scene.offsets), slopes, strict=True):
        way = torch.randn(parameter.shape, generator=gen, dtype=torch.float64) * (slope != 0)
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6):
                parameter.add_(way, alpha=step)
                ends.append(value())
            parameter.add_(way, alpha=1e-6)
        assert float((ends[0] - ends[1]) / 2e-6) == pytest.approx(float((slope * way).sum()), rel=1e-4)
    again = textured.nearest(scene.points()[scene.faces].detach(), camera)
    assert torch.equal(pixel, again[0]) and torch.equal(face, again[1])


def test_gradients_repeat_bit_for_bit(threads: None) -> None:
    found = []
    for _ in range(2):
        scene = coloured(32, offsets=True)
        scene.render(ring(4, 32), torch.ones(4, 3)).image.square().sum().backward()
        found.append((scene.texture.grad, scene.offsets.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_mesh_that_moves_may_shift_but_not_bend() -> None:
    scene = coloured(offsets=True)
    with torch.no_grad():
        scene.offsets.add_(0.3)
    assert float(scene.laplacian()) < 1e-10
    with torch.no_grad():
        scene.offsets[5, 0] += 0.1
    bent = regular.TERMS["laplacian"]({}, scene)
    bent.backward()
    assert float(bent) * len(scene.offsets) > 0.01 and float(scene.offsets.grad[5, 0]) > 0
    with pytest.raises(BadInput, match="student.offsets"):
        coloured().laplacian()


def write_obj(path: Path, uv: bool = False) -> Path:
    """A cone with its tip upwards along y, away from the origin."""
    cone = trimesh.creation.cone(2.0, 5.0, sections=12)
    vertices = np.asarray(cone.vertices)[:, [1, 2, 0]] + [3.0, 1.0, -2.0]
    lines = ["v {:.6f} {:.6f} {:.6f}".format(*v) for v in vertices]
    lines += ["vt {:.6f} {:.6f}".format(*np.random.default_rng(i).random(2)) for i in range(len(vertices) * uv)]
    lines += ["f " + " ".join(f"{i + 1}/{i + 1}" if uv else f"{i + 1}" for i in face) for face in cone.faces]
    path.write_text("\n".join(lines) + "\n")
    return path


def places(path: Path) -> np.ndarray:
    """The places of a file's vertices, each once, in order."""
    found = np.asarray(trimesh.load(path, process=False, force="mesh").vertices)
    return np.unique(found.round(4), axis=0)


def tiny_run(name: str, folder: Path, *sets: str) -> Path:
    assert job.run(load(name, [*TINY, *sets]), folder, device="cpu", quiet=True) == 0
    return folder


def test_a_painted_mesh_stays_where_its_file_has_it(tmp_path: Path) -> None:
    path = write_obj(tmp_path / "cone.obj")
    run = tiny_run("threed/paint", tmp_path / "run", f"student.of={path}")
    facts = json.loads((run / "exports" / "glb" / "asset.json").read_text())
    assert (facts["texture"], facts["up"], facts["watertight"]) == (32, "y", True)
    assert np.abs(places(run / "exports" / "glb" / "asset.glb") - places(path)).max() < 2e-4
    again = tiny_run("threed/refine", tmp_path / "again", f"student.of={run}")  # a run of a run is still there
    assert np.abs(places(again / "exports" / "glb" / "asset.glb") - places(path)).max() < 2e-4


@pytest.mark.parametrize("uv", [False, True])
def test_files_of_all_kinds_are_taken_into_the_ball(uv: bool, tmp_path: Path) -> None:
    path, build = write_obj(tmp_path / "cone.obj", uv), Build(load("threed/paint", SOLID))
    scene = textured.scene(settings.Mesh(of=str(path), texture=32), build)
    assert scene.radius == pytest.approx(1.0, abs=1e-2)
    assert scene.points()[scene.points()[:, 2].argmax()].norm() > 0.9  # the tip is up
    for format in ("ply", "glb"):
        file, _ = asset.export(scene, tmp_path / f"x.{format}", format, Files(), {})
        back = textured.scene(settings.Mesh(of=str(file), texture=32), build)
        assert np.abs(places(file) - places(path)).max() < 2e-4 and back.scale == pytest.approx(scene.scale, rel=1e-3)


def test_what_a_file_holds_is_what_was_seen(tmp_path: Path) -> None:
    """Fault: a v that points the other way, or colours that are not the squashed ones."""
    scene = coloured(64)
    (path, _) = asset.export(scene, tmp_path / "a.glb", "glb", Files(height=2.0), {})
    config = settings.Mesh(of=str(path), texture=64, start="own")
    back = textured.scene(config, Build(load("threed/paint", SOLID)))
    one, two = (seen(s, ring(4, 32)).image for s in (scene, back))
    assert known.psnr(one, two) > 30  # white noise: between charts it is not kept
    flipped = TexturedMesh(Textured(back.given.mesh, back.given.normals, back.given.uv * [1, -1] + [0, 1],
                                    back.given.image), config, back.scale, back.centre)  # fmt: skip
    assert known.psnr(one, seen(flipped, ring(4, 32)).image) < 20


@pytest.mark.parametrize(
    ("of", "line"),
    [
        ("nothing.obj", "there is no such file"), (".", "no run's folder"), ("a.stl", "meshes are read from"),
        ("empty.ply", "has no faces"), ("huge.ply", "decimate it"), ("flat.obj", "has no area"),
    ],
)  # fmt: skip
def test_bad_meshes_get_one_clear_line(of: str, line: str, tmp_path: Path) -> None:
    head = "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
    (tmp_path / "empty.ply").write_text(head + "end_header\n0 0 0\n")
    faces = "element face 2000000\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n"
    (tmp_path / "huge.ply").write_text(head + faces)
    (tmp_path / "flat.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    build = Build(load("threed/paint", [*SOLID, f"student.of={tmp_path / of}"]))
    with pytest.raises(BadInput, match=line) as caught:
        build.piece("student")
    assert "\n" not in str(caught.value)


def painted(monkeypatch: pytest.MonkeyPatch, *sets: str) -> tuple[float, float]:
    """PSNR of a grey and of a painted ball at the held-out cameras of the solids' sphere."""
    plain = textured.ball
    monkeypatch.setattr(textured, "ball", lambda size: small(plain(size)))
    recipe = load("threed/paint", [*SOLID, "student.texture=64", "steps=60", *sets])
    build = Build(recipe)
    objective, truth = build.objective("paint"), Known.of(build, SPHERE)
    assert truth is not None
    found = [known.psnr(seen(space.scenes(build)[0], truth.cameras).image, truth.image)]
    Trainer(objective, Team("cpu"), 0, "paint", 60, 4).run()
    return found[0], known.psnr(seen(space.scenes(build)[0], truth.cameras).image, truth.image)


def test_paint_finds_the_colours_of_a_known_solid(monkeypatch: pytest.MonkeyPatch) -> None:
    grey, after = painted(monkeypatch)
    assert grey < 15 and after > 21.5


def test_fault_the_texture_of_another_view_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    render = TexturedMesh.render

    def turned(self: TexturedMesh, cameras: Cameras, background: Tensor, jitter: Tensor | None = None) -> Views:
        pose = cameras.pose.roll(1, 0) if torch.is_grad_enabled() else cameras.pose
        return render(self, Cameras(pose, cameras.fov, cameras.height, cameras.width), background)

    monkeypatch.setattr(TexturedMesh, "render", turned)
    assert painted(monkeypatch)[1] < 20


def test_refinement_moves_a_sample_to_what_the_teacher_makes_of_it() -> None:
    """A teacher that is sure of its view leads every start to it; the gradient is what is missing, and no more."""
    build = Build(load("threed/paint", [*SOLID, "teacher.std=1e-4"]))
    model: Model = build.piece("teacher")
    cameras = ring(4, 16, distance=2.6)
    cond = model.encode([SPHERE] * 4) | {"camera": cameras.rows()}
    view, _ = posed.truth(posed.SOLIDS[SPHERE], cameras)
    x = torch.zeros(4, 3, 16, 16, requires_grad=True)
    ctx = Context(0, "refine", Draws(0, 0, 4), 1, 0, torch.device("cpu"))
    rule = Refined(model, model.encode([""]), law(Uniform(lo=0.6, hi=0.6)), 5, 1.0)
    (slope,) = torch.autograd.grad(rule(ctx, x, cond), x)
    assert torch.allclose(slope, (0 - view) / 4, atol=2e-3)
    x_t = torch.randn(4, 3, 16, 16, generator=generator(0, "test", 2))
    vague = Build(load("threed/paint", [*SOLID, "teacher.std=100.0"])).piece("teacher")  # every picture is as likely
    kept = Refined(vague, vague.encode([""]), rule.times, 5, 1.0).end(x_t, torch.full((4,), 0.02), cond, 1.0)
    assert float((kept - x_t).abs().max()) < 0.02


def test_refinement_takes_steps_and_guidance() -> None:
    asked: list[float] = []

    class Counting(posed.Posed):
        def forward(self, x_t, t, cond, features=False):  # type: ignore[no-untyped-def]
            asked.extend(t.tolist())
            return super().forward(x_t, t, cond, features)

    law_ = process(settings.Solids().process)
    model = Model(Counting(law_, 0.05, 8), (3, 8, 8), Identity(), posed.encode, "solids")
    cond = model.encode([SPHERE]) | {"camera": ring(1, 8).rows()}
    rule = Refined(model, model.encode([""]), law(Uniform()), 4, 2.0)
    rule.end(torch.zeros(1, 3, 8, 8), torch.tensor([0.8]), cond, 2.0)
    assert asked == pytest.approx([0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2], abs=1e-6)  # both branches in one forward
