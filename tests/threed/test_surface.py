"""Surfaces of scenes whose shape is known: where they lie, what is swept away, and what an empty scene says."""

import math
from typing import Any

import numpy as np
import pytest
import solid
import torch

from limbeck.core.run.errors import BadInput
from limbeck.domains.threed import raster, shape, surface
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.shape import Mesh

SMALL = Files(resolution=48, faces=3000)
BALL = 4 / 3 * math.pi * 0.6**3


def tetrahedron() -> Mesh:
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
    return Mesh(corners, np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]))


def test_a_ball_is_one_closed_outward_surface_of_its_volume() -> None:
    mesh, facts = surface.extract(solid.Solid(), SMALL)
    assert mesh.watertight and mesh.euler() == [2] and len(mesh.faces) <= 3000
    assert mesh.volume == pytest.approx(BALL, rel=0.03)  # positive: it looks outwards
    assert (mesh.normals * mesh.vertices).sum(1).min() > 0.5
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.6).max() < 0.02
    assert 0 < facts["level"] < facts["highest density"] == 400.0 and facts["components dropped"] == 0


def test_a_ring_has_its_hole_and_lies_flat() -> None:
    ring_ = solid.Solid(lambda p: torch.hypot(torch.hypot(p[..., 0], p[..., 1]) - 0.6, p[..., 2]) - 0.2)
    mesh, _ = surface.extract(ring_, SMALL)
    assert mesh.watertight and mesh.euler() == [0]
    assert np.ptp(mesh.vertices, axis=0) == pytest.approx([1.6, 1.6, 0.4], abs=0.04)
    assert mesh.volume == pytest.approx(2 * math.pi**2 * 0.6 * 0.2**2, rel=0.06)  # half the ramp is 5% here


def silhouette(mesh: Mesh, opaque: torch.Tensor, cameras: Any) -> float:
    """Intersection over union of the mesh's outline with alpha > .5."""
    seen = np.stack([raster.look(mesh, cameras.pick(slice(i, i + 1))).face >= 0 for i in range(len(cameras))])
    true = opaque.flatten(1).numpy()
    return float((seen & true).sum() / (seen | true).sum())


def test_the_level_is_where_outlines_agree_with_the_views() -> None:
    """On a soft ball the usual rule, the mean of positive densities, gives a thinner object than what is seen."""
    soft = solid.Solid(lambda p: solid.ball(p, 0.4), dense=60.0, ramp=0.6)
    cameras = ring(5, 48, elevation=25, offset=10)
    opaque = soft.render(cameras, torch.ones(5, 3)).alpha > 0.5
    mesh, facts = surface.extract(soft, SMALL)
    grid = surface.densities(soft, np.full(3, -1.0), 2 / 47, (48,) * 3)
    mean = float(grid[grid > 0].mean())
    usual, _ = surface.extract(soft, SMALL.model_copy(update={"level": mean}))
    assert silhouette(mesh, opaque, cameras) > 0.96 > 0.9 > silhouette(usual, opaque, cameras)
    assert facts["level"] < mean / 2


def test_steep_fields_are_not_cut_in_steps() -> None:
    """Marching cubes on the densities themselves puts a low level's surface at the last empty cell."""
    steep = solid.Solid()
    low, step = np.full(3, -0.7), 1.4 / 31
    grid = surface.Grid(surface.densities(steep, low, step, (32,) * 3), low, step)
    right = surface.marched(grid, 4.0).volume
    measure = shape.load("skimage.measure")
    vertices, faces, _, _ = measure.marching_cubes(np.pad(grid.values, 1), 4.0, gradient_direction="ascent")
    plain = Mesh(vertices.astype(float) * step, faces.astype(int)).volume
    assert abs(right / BALL - 1) < 0.03 and plain / BALL - 1 > 0.06


def test_debris_and_cavities_are_swept_away() -> None:
    def cluttered(p: torch.Tensor) -> torch.Tensor:
        hollow = torch.maximum(solid.ball(p, 0.5), -solid.ball(p, 0.3))
        return torch.minimum(hollow, solid.ball(p, 0.045, (0.7, 0.0, 0.5)))

    mesh, facts = surface.extract(solid.Solid(cluttered), SMALL)
    assert facts["components dropped"] == 2 and mesh.euler() == [2]
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=0.05)


def test_a_sheet_of_ground_is_dropped_unless_kept() -> None:
    def standing(p: torch.Tensor) -> torch.Tensor:
        return torch.minimum(solid.ball(p, 0.35), solid.box(p, (0.8, 0.8, 0.02), (0, 0, -0.37)))

    scene = solid.Solid(standing)
    mesh, facts = surface.extract(scene, SMALL)
    assert facts["ground dropped"] and np.abs(mesh.vertices).max() < 0.4 and mesh.watertight
    kept, facts = surface.extract(scene, SMALL.model_copy(update={"ground": True}))
    assert not facts["ground dropped"] and np.ptp(kept.vertices, axis=0)[:2].min() > 1.3
    pedestal = solid.Solid(lambda p: torch.minimum(solid.ball(p, 0.4), solid.box(p, (0.55, 0.55, 0.03), (0, 0, -0.42))))
    mesh, facts = surface.extract(pedestal, SMALL)
    assert not facts["ground dropped"] and np.ptp(mesh.vertices, axis=0)[0] > 1.0  # a base belongs to the object


@pytest.mark.parametrize(
    ("scene", "options", "message"),
    [
        (solid.Solid(dense=0.0), SMALL, r"scene is empty.*highest density is 0;.*train it longer"),
        (
            solid.Solid(dense=0.02),
            SMALL,
            r"nowhere opaque \(at most 0\.0\d\).*density is 0\.02;.*set the level to 0\.01",
        ),
        (
            solid.Solid(),
            Files(level=500.0),
            r"no surface at level 500: the highest density is 400; set the level to 200",
        ),
        (solid.Solid(lambda p: solid.ball(p, 0.01)), Files(level=9.0, resolution=16), "scene is empty|no surface"),
        (solid.Solid(dense=float("nan")), SMALL, r"NaN or infinite at \d+ of \d+ points"),
    ],
)
def test_empty_and_degenerate_scenes_say_what_to_do(scene: Any, options: Files, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        surface.extract(scene, options)
    assert "\n" not in str(caught.value)


def test_the_budget_of_faces_holds_and_never_opens_a_watertight_mesh() -> None:
    mesh, _ = surface.extract(solid.Solid(solid.box), SMALL.model_copy(update={"faces": 40_000}))
    for closed in (False, True):
        small = shape.decimated(mesh, 200, closed)
        assert len(small.faces) <= 200 and small.volume == pytest.approx(mesh.volume, rel=0.02)
    assert small.watertight
    crumpled = shape.decimated(mesh, 2, closed=True)  # no closed mesh has two faces: the budget gives way
    assert crumpled.watertight and crumpled.volume > 0


def test_a_pass_that_misses_the_budget_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hasty pass opens the mesh, the gentle ones keep it closed with too many faces."""
    mesh, _ = surface.extract(solid.Solid(), SMALL)

    class Simplifier:
        @staticmethod
        def simplify(points: Any, faces: Any, target_count: int, agg: int) -> Any:
            return (points, faces[:50]) if agg == shape.HASTE[0] else (points, faces)

    monkeypatch.setattr(shape, "load", lambda name: Simplifier)
    assert len(shape.decimated(mesh, 60).faces) == 50
    assert shape.decimated(mesh, 60, closed=True).watertight


def test_smoothing_keeps_the_volume() -> None:
    mesh, _ = surface.extract(solid.Solid(), SMALL)
    gen = np.random.default_rng(0)
    rough = Mesh(mesh.vertices + gen.normal(0, 0.01, mesh.vertices.shape), mesh.faces)
    flat = shape.smoothed(rough, 10)
    spread = [np.linalg.norm(m.vertices, axis=1).std() for m in (rough, flat)]
    assert spread[1] < spread[0] / 2 and flat.volume == pytest.approx(mesh.volume, rel=0.02)
    shrunk = shape.smoothed(rough, 10, grow=0.5)  # Laplacian steps alone
    assert shrunk.volume < 0.98 * mesh.volume


def test_a_closed_mesh_is_known_from_an_open_or_turned_one() -> None:
    mesh = tetrahedron()
    assert mesh.watertight and mesh.volume == pytest.approx(1 / 6) and mesh.euler() == [2]
    assert not mesh.pick(np.arange(3)).watertight
    turned = Mesh(mesh.vertices, np.concatenate([mesh.faces[:3], mesh.faces[3:, ::-1]]))
    assert not turned.watertight
    doubled = Mesh(mesh.vertices, np.concatenate([mesh.faces, mesh.faces]))
    assert not doubled.watertight
    apart = Mesh(mesh.corners.reshape(-1, 3), np.arange(12).reshape(-1, 3))
    assert not apart.watertight and apart.welded().watertight and len(apart.welded().vertices) == 4
    two = Mesh(np.concatenate([mesh.vertices, mesh.vertices + 5]), np.concatenate([mesh.faces, mesh.faces + 4]))
    assert two.components()[0] == 2 and two.euler() == [2, 2]


def test_a_pixel_shows_the_nearest_face() -> None:
    """Against rays cast one by one: each face that is met, and where."""
    mesh, camera = surface.extract(solid.Solid(solid.box), SMALL)[0], ring(1, 24, elevation=30, offset=20)
    seen = raster.look(mesh, camera)
    origin, ray = (x.reshape(-1, 3).double().numpy() for x in camera.rays())
    point = seen.blend(mesh.vertices, mesh.faces)
    hit = seen.face >= 0
    along = ((point - origin[hit]) * ray[hit]).sum(1)
    assert np.abs(origin[hit] + ray[hit] * along[:, None] - point).max() < 1e-5  # on the pixel's own ray
    assert (along * (ray[hit] @ camera.forward[0].double().numpy()) - seen.depth[hit]) == pytest.approx(0, abs=1e-5)
    assert ((mesh.crossed[seen.face[hit]] * ray[hit]).sum(1) <= 1e-9).all()  # no far side in front of a near one


def test_pixels_on_shared_edges_are_covered_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster, "CHUNK", 7)
    square = np.array([[[0, 0], [8, 0], [8, 8]], [[0, 0], [8, 8], [0, 8]], [[3, 3], [3, 3], [5, 5]]], float)
    pixels = np.concatenate([pixel for _, pixel, _ in raster.cover(square, 8, 8)])
    assert set(pixels.tolist()) == set(range(64)) and len(pixels) == 72  # the diagonal twice, the line never
