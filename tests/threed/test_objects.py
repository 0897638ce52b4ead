"""The embedded objects: names and pictures, poses that agree with the pictures, and the rasteriser that made them."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from limbeck.core.run.rng import generator
from limbeck.domains.threed import build_mesh, build_objects
from limbeck.domains.threed.cameras import Cameras, look_at, ring
from limbeck.domains.threed.objects import FOLDER, ObjectData, Objects, objects, plain


def box(half: tuple[float, float, float]) -> build_mesh.Mesh:
    """A box around the origin whose side along +x is red, along -x green, and blue elsewhere."""
    square = torch.tensor([[[1, -1, -1], [1, 1, -1], [1, 1, 1]], [[1, -1, -1], [1, 1, 1], [1, -1, 1]]]).float()
    sides, colour = [], []
    for axis in range(3):
        for sign in (1.0, -1.0):
            sides.append(sign * square.roll(axis, 2))
            colour += [axis * 2 if axis else (0 if sign > 0 else 1)] * 2
    corners = torch.cat(sides) * torch.tensor(half)
    rgb = [(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (0, 0, 1.0), (0, 0, 1.0)]
    textures = [torch.tensor([*c, 1.0])[:, None, None] for c in rgb]
    return build_mesh.Mesh(corners, torch.zeros(12, 3, 2), torch.tensor(colour), textures)


def entered(half: tuple[float, float, float], cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Whether the rays [V,H,W] hit the box, and the axis (0 to 2) and sign of the side where they enter it."""
    origin, ray = cameras.rays()
    near, far = ((torch.tensor(half) * sign - origin) / ray for sign in (-1.0, 1.0))
    first, last = torch.minimum(near, far), torch.maximum(near, far)
    enter, axis = first.max(-1)
    side = torch.gather(-ray.sign(), -1, axis[..., None])[..., 0]
    return enter < last.min(-1).values, (axis + 1) * side.long()


def test_the_rasteriser_sees_what_rays_hit() -> None:
    half = (0.5, 0.3, 0.2)
    cameras = ring(5, 40, elevation=25, offset=20)
    views = build_mesh.render(box(half), cameras, supersample=1)
    hit, side = entered(half, cameras)
    agree = (views[:, 3] > 0.5) == hit
    assert agree.float().mean() > 0.999  # pixels exactly on an edge may go either way
    both = hit & (views[:, 3] > 0.5)
    seen = views[:, :3].argmax(1)
    assert ((seen == 0) == (side == 1))[both].float().mean() > 0.998  # red where the ray enters at +x
    assert ((seen == 1) == (side == -1))[both].float().mean() > 0.998


def test_light_is_fixed_in_the_world_and_soft() -> None:
    front, back = build_mesh.render(box((0.5, 0.5, 0.5)), ring(2, 16, elevation=0), 1)[:, :3, 8, 8].amax(1)
    assert build_mesh.AMBIENT <= back < front <= 1


def test_an_obj_is_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.mtl").write_text("newmtl red\nKd 1 0 0\nnewmtl glass\nKd 1 1 1\nd 0.0\n")
    (tmp_path / "a.obj").write_text(
        "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nusemtl red\nf 1/1 2/2 3/3 -1\n"
        "usemtl glass\nf 1 2 3\n"
    )
    mesh = build_mesh.load_obj(tmp_path / "a.obj")
    assert len(mesh.corners) == 2  # a fan of two, the invisible one left out
    assert mesh.corners[1].tolist() == [[0, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert mesh.uv[0].tolist() == [[0, 0], [1, 0], [1, 1]] and mesh.uv[1, 2].tolist() == [0, 0]
    assert mesh.textures[0].flatten().tolist() == [1, 0, 0, 1]
    normal = mesh.turned(torch.eye(3)).corners
    assert torch.allclose(normal.norm(dim=2).amax(), torch.tensor(1.0), atol=1e-5)


def test_the_set_is_whole() -> None:
    found = objects()
    assert len(found.names) == len(set(found.names)) >= 32
    texts = [text for i, name in enumerate(found.names) for text in (name, *found.words[i])]
    assert len(texts) == len(set(texts)) and all(text == plain(text) for text in texts)
    assert all(words for words in found.words)
    count = len(found.names)
    assert found.training.shape == (count, 160, 4, 32, 32) and found.held_out.shape == (count, 12, 4, 32, 32)
    for line in (FOLDER / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8.5e6


def test_where_nothing_is_there_is_white() -> None:
    views = objects().training[:, ::10].float()
    empty = views[:, :, 3] == 0
    assert 0.2 < empty.float().mean() < 0.9
    assert (views[:, :, :3].amin(2)[empty] == 255).all()
    known = objects().known("horse")
    assert known is not None and known.image.max() == 1 and float(known.alpha.mean()) > 0.05


def inside(grid: Tensor, cameras: Cameras, alpha: Tensor) -> Tensor:
    """Whether points [N,3] fall on a pixel that is not empty, in each view [V,N]."""
    turn, shift = cameras.view()
    local = torch.einsum("vij,nj->vni", turn, grid) + shift[:, None]
    pixel = (local[..., :2] / local[..., 2:] * cameras.focal[:, None, None] + cameras.width / 2).long()
    pixel = pixel.clamp(0, cameras.width - 1)
    return torch.gather((alpha > 0).flatten(1), 1, pixel[..., 1] * cameras.width + pixel[..., 0])


def hull_misses(found: Objects, index: int, pose: Tensor) -> float:
    """The share of held-out silhouette pixels that the visual hull of the training views leaves empty."""
    line = torch.linspace(-1, 1, 48)
    grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(-1, 3)
    for start in range(0, len(pose), 16):  # points outside one silhouette need no other one
        cameras = found.cameras(pose[start : start + 16])
        grid = grid[inside(grid, cameras, found.training[index, start : start + 16, 3]).all(0)]
    held = found.cameras(found.held_out_pose)
    turn, shift = held.view()
    local = torch.einsum("vij,nj->vni", turn, grid) + shift[:, None]
    pixel = (local[..., :2] / local[..., 2:] * held.focal[:, None, None] + 16).long().clamp(0, 31)
    covered = torch.zeros(len(held), 32 * 32).scatter(1, pixel[..., 1] * 32 + pixel[..., 0], 1.0)
    solid = (found.held_out[index, :, 3] > 200).flatten(1)
    return float((solid & (covered == 0)).sum() / solid.sum())


@pytest.mark.parametrize("name", ["teddy bear", "horse", "forklift"])
def test_poses_agree_with_pictures(name: str) -> None:
    """What all training silhouettes allow covers the held-out ones; with mirrored or turned poses it does not."""
    found, index = objects(), objects().names.index(name)
    pose = found.training_pose[index]
    assert hull_misses(found, index, pose) < 0.02
    up = torch.tensor([[0.0, 0.0, 1.0]]).expand(len(pose), 3)
    for wrong in ([1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]):
        place = pose[:, :, 3] * torch.tensor(wrong)
        assert hull_misses(found, index, look_at(place, torch.zeros_like(place), up)) > 0.1


def test_held_out_cameras_are_not_trained_on() -> None:
    found = objects()
    held = found.held_out_pose[:, :, 3]
    apart = torch.cdist(found.training_pose[..., 3].reshape(-1, 3), held)
    assert apart.min() > 1e-3
    for cameras in (found.cameras(found.held_out_pose), found.cameras(found.training_pose.flatten(0, 1))):
        azimuth, elevation = (torch.rad2deg(angle) for angle in cameras.angles())
        assert torch.allclose(cameras.position.norm(dim=1), torch.tensor(3.0), atol=1e-5)
        assert elevation.min() > -10.01 and elevation.max() < 50.01
        assert (azimuth % 360).sort().values.diff().max() < 31
    first = torch.rad2deg(found.cameras(found.held_out_pose[:4]).angles()[0])
    assert torch.allclose(first.diff() % 360, torch.full((3,), 90.0), atol=1e-3)


def test_the_committed_poses_are_those_of_the_build() -> None:
    found = objects()
    assert torch.allclose(build_objects.held_out_cameras().pose, found.held_out_pose, atol=1e-6)
    assert torch.allclose(build_objects.training_cameras(7).pose, found.training_pose[7], atol=1e-6)
    assert [chosen.name for chosen in build_objects.CHOSEN] == list(found.names)


def test_prompts_find_objects() -> None:
    found = objects()
    assert found.find("A Teddy  Bear") == found.names.index("teddy bear")
    assert found.find("a stuffed toy bear") == found.names.index("teddy bear")
    assert found.find("a submarine") is None and found.known("a submarine") is None
    assert found.nearest("a fluffy bear for children")[0] == "teddy bear"
    assert found.nearest("a pony")[0] in ("horse", "rocking horse")


def test_batches_repeat_and_processes_share_them() -> None:
    source = ObjectData(0.5)
    whole = source.batch(64, generator(0, "x", 0), slice(None))
    part = source.batch(64, generator(0, "x", 0), slice(32, 64))
    assert whole.x is not None and part.x is not None
    assert torch.equal(whole.x[32:], part.x) and whole.prompts[32:] == part.prompts
    assert torch.equal(whole.cond["camera"][32:], part.cond["camera"])
    untold = (whole.cond["camera"] == 0).all(1).float().mean()
    assert 0.3 < untold < 0.7 and whole.cond["camera"].shape == (64, 15)
    assert whole.x.min() >= -1 and whole.x.max() == 1


def test_a_batch_pairs_pictures_with_their_cameras_and_words() -> None:
    source, found = ObjectData(0.0), objects()
    batch = source.batch(8, generator(1, "x", 0), slice(None))
    assert batch.x is not None
    for x, prompt, row in zip(batch.x, batch.prompts, batch.cond["camera"], strict=True):
        index = found.find(prompt)
        assert index is not None
        place = (found.training_pose[index] - row[:12].view(3, 4)).abs().flatten(1).amax(1)
        view = int(place.argmin())
        assert place[view] == 0
        assert torch.allclose((x + 1) * 127.5, found.training[index, view, :3].float(), atol=1e-3)


def test_nothing_is_painted_outside_the_ball() -> None:
    """A sphere of radius 1 at distance 3 spans asin(1/3); nothing lies beyond it in any picture."""
    found = objects()
    cameras = found.cameras(found.held_out_pose)
    ray = cameras.rays()[1]
    angle = torch.acos((ray * cameras.forward[:, None, None]).sum(-1).clamp(-1, 1))
    outside = angle > torch.asin(torch.tensor(1 / 3)) + 0.05  # a pixel is .023 wide
    assert outside.any() and (found.held_out[:, :, 3] * outside).max() == 0
    assert replace(found, fov=50.0).cameras(found.held_out_pose).focal[0] < cameras.focal[0]
