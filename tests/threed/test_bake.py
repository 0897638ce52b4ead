"""Textures: charts that do not overlap, texels that have the colours of their places, and views that beat a field."""

from dataclasses import replace

import numpy as np
import pytest
import solid
import torch

from limbeck.core.run.errors import BadInput
from limbeck.domains.threed import bake, raster, surface
from limbeck.domains.threed.bake import Textured
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.shape import Mesh

FILES = Files(resolution=40, faces=1500, texture=256, colours="field")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return surface.extract(solid.Solid(), FILES)[0]


@pytest.fixture(scope="module")
def asset(mesh: Mesh) -> Textured:
    return bake.textured(solid.Solid(), mesh, FILES)[0]


def test_unwrapping_keeps_the_mesh_and_doubles_seams_only(mesh: Mesh, asset: Textured) -> None:
    assert asset.uv.min() >= 0 and asset.uv.max() <= 1 and len(asset.mesh.faces) == len(mesh.faces)
    assert asset.mesh.welded().watertight and len(asset.mesh.vertices) < 1.6 * len(mesh.vertices)
    rows = np.concatenate([asset.mesh.vertices, asset.normals, asset.uv], 1)
    assert len(np.unique(rows, axis=0)) == len(rows)  # where position, normal and uv agree there is one vertex
    assert np.linalg.norm(asset.normals, axis=1) == pytest.approx(1)
    assert (asset.normals * asset.mesh.vertices).sum(1).min() > 0.5  # of the seams too


def test_charts_do_not_overlap_and_keep_their_distance(asset: Textured) -> None:
    size = len(asset.image)
    count = np.zeros(size * size, int)
    inner = 0.999 * asset.uv[asset.mesh.faces] + 0.001 * asset.uv[asset.mesh.faces].mean(1, keepdims=True)
    for _, pixel, _ in raster.cover(inner * size, size, size):
        np.add.at(count, pixel, 1)
    assert (count > 1).sum() <= 5 and (count > 0).mean() > 0.4  # xatlas may fold a sliver over


def test_texels_have_the_colour_of_their_place(asset: Textured) -> None:
    """At random points of the surface, between texels too."""
    gen = np.random.default_rng(0)
    face = gen.integers(0, len(asset.mesh.faces), 4000)
    share = gen.dirichlet([1, 1, 1], 4000)[..., None]
    place, uv = ((values[asset.mesh.faces[face]] * share).sum(1) for values in (asset.mesh.vertices, asset.uv))
    true = (surface.colours(solid.Solid(), place) + 1) * 127.5
    off = np.abs(asset.at(uv) - true).max(1)
    assert np.median(off) < 1 and (off > 8).mean() < 0.12  # only beside the edges of patches
    flipped = np.abs(asset.at(uv * [1, -1] + [0, 1]) - true).max(1)
    assert (flipped > 8).mean() > 0.3


def test_colours_run_on_outside_of_charts(mesh: Mesh) -> None:
    """Two texels and more: what mipmaps and bilinear sampling reach for is never the empty colour."""
    texels = bake.Texels.of(bake.unwrap(mesh, 256))
    image = texels.filled(np.full((len(texels.index), 3), 0.5))
    assert (image == 191).all()
    assert len(texels.index) < 0.97 * 256 * 256  # there was something to fill


def test_a_plain_square_has_its_texels_in_order() -> None:
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
    flat = Mesh(corners, np.array([[0, 1, 2], [0, 2, 3]]))
    square = Textured(flat, np.tile([0.0, 0, 1], (4, 1)), corners[:, :2], np.zeros((4, 4, 3), np.uint8))
    texels = bake.Texels.of(square)
    assert texels.index.tolist() == list(range(16))
    assert texels.place[5] == pytest.approx([0.375, 0.375, 0]) and texels.normal[5].tolist() == [0, 0, 1]
    image = texels.filled(np.repeat(texels.place[:, :1], 3, 1))
    assert (np.diff(image[0, :, 0].astype(int)) > 0).all() and image[0, 0, 0] == round(1.125 * 127.5)
    made = replace(square, image=image)
    assert made.at(np.array([[0.375, 0.5]]))[0, 0] == image[1, 1, 0]


class Wrong(solid.Solid):  # type: ignore[name-defined]
    """A scene whose field knows other colours than its views show, as sums of Gaussians do."""

    def field(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        density, colour = super().field(points)
        return density, -colour


def test_colours_come_from_what_looks_more_like_the_views(mesh: Mesh) -> None:
    auto = FILES.model_copy(update={"colours": "auto"})
    assert bake.textured(solid.Solid(), mesh, auto)[1] == "field"  # exact, where views are a few pixels
    made, source = bake.textured(Wrong(), mesh, auto)
    assert source == "views"
    plain = bake.textured(Wrong(), mesh, FILES)[0]
    assert bake.misfit(Wrong(), made) < 0.2 * bake.misfit(Wrong(), plain)


def test_views_do_not_paint_what_they_do_not_see(mesh: Mesh) -> None:
    """A place that no camera sees keeps the field's colour, and the far side is not painted through the near one."""
    texels = bake.Texels.of(bake.unwrap(mesh, 256))
    own = surface.colours(solid.Solid(), texels.place)
    found = bake.from_views(solid.Solid(), mesh, texels, own)
    below = texels.normal[:, 2] < -0.99
    assert below.any() and np.array_equal(found[below], own[below])
    front = (texels.place[:, 0] > 0.5) & (np.abs(texels.place[:, 1:]) < 0.1).all(1)
    back = texels.place[:, 0] < -0.5
    assert (found[front].argmax(1) == 1).mean() > 0.95 and (found[back].argmax(1) == 0).mean() > 0.95


def test_views_do_not_paint_what_something_hides() -> None:
    """The front of a ball closely behind a plate: every camera there sees the plate."""

    def hidden(p: torch.Tensor) -> torch.Tensor:
        return torch.minimum(solid.ball(p, 0.5), solid.box(p, (0.03, 0.35, 0.35), (0.6, 0, 0)))

    scene = solid.Solid(hidden)
    mesh = surface.extract(scene, FILES.model_copy(update={"faces": 4000, "resolution": 64}))[0]
    texels = bake.Texels.of(bake.unwrap(mesh, 256))
    own = np.zeros((len(texels.index), 3))
    found = bake.from_views(scene, mesh, texels, own)
    behind = (np.abs(texels.place[:, 1:]) < 0.05).all(1) & (np.abs(texels.place[:, 0] - 0.5) < 0.02)
    plate = (np.abs(texels.place[:, 1:]) < 0.05).all(1) & (texels.place[:, 0] > 0.61)
    assert behind.sum() > 20 and (found[behind] == 0).all() and (found[plate] != 0).any(1).all()


def test_equal_corners_are_one_vertex() -> None:
    flat = Mesh(np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float), np.array([[0, 1, 2], [0, 2, 3]]))
    origin, uv = np.array([0, 1, 2, 0, 2, 3]), flat.vertices[[0, 1, 2, 0, 2, 3], :2]
    apart = uv + np.array([[0.0]] * 3 + [[0.5]] + [[0.0]] * 2)
    for corners, count in ((uv, 4), (apart, 5)):
        found = bake.joined(flat, origin, np.arange(6).reshape(2, 3), corners, 4)
        assert len(found.mesh.vertices) == count and np.array_equal(found.mesh.corners, flat.corners)
        assert np.array_equal(found.uv[found.mesh.faces].reshape(-1, 2), corners)


def test_textures_repeat(mesh: Mesh) -> None:
    one, two = (bake.textured(solid.Solid(), mesh, FILES)[0] for _ in range(2))
    assert np.array_equal(one.image, two.image) and np.array_equal(one.uv, two.uv)


def test_latent_scenes_have_no_colours(mesh: Mesh) -> None:
    scene = solid.Solid()
    scene.channels = 4
    with pytest.raises(BadInput, match="4 latent channels.*refine it to RGB"):
        bake.textured(scene, mesh, FILES)
