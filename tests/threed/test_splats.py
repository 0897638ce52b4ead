"""Files of splats: round trips bit for bit, axes, other people's files, and files that are none."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.core.run.errors import BadInput
from limbeck.domains.threed import asset, splats
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.config import Files
from limbeck.domains.threed.gaussians import PARTS, Gaussians
from limbeck.domains.threed.known import psnr
from limbeck.domains.threed.rasteriser import Splats
from limbeck.domains.threed.scene import seen

NAMES = splats.FIELDS


def scene(n: int = 300, dead: int = 7) -> Gaussians:
    """Anisotropic, of all opacities and colours, with a red side in front; a few rows are dead."""
    gen = torch.Generator().manual_seed(0)
    means = 0.4 * torch.randn(n, 3, generator=gen)
    colours = torch.where(means[:, :1] > 0, torch.tensor([1.5, -1.5, -1.5]), torch.tensor([-1.5, -1.5, 1.5]))
    scales = math.log(0.08) + 0.5 * torch.randn(n, 3, generator=gen)
    quats, opacity = torch.randn(n, 4, generator=gen), 2 * torch.randn(n, generator=gen)
    return Gaussians(Splats(means, scales, quats, opacity, colours), n + dead)


def vertices(path: Path) -> np.ndarray:
    """The body of a PLY that is nothing but floats."""
    data = path.read_bytes()
    head, _, body = data.partition(b"end_header\n")
    count = int(head.split(b"element vertex ")[1].split()[0])
    return np.frombuffer(body, "<f4").reshape(count, -1)


def write(path: Path, names: list[str], table: np.ndarray, kind: str = "float") -> Path:
    """A PLY of these columns."""
    lines = ["ply", "format binary_little_endian 1.0", "comment made elsewhere", f"element vertex {len(table)}"]
    head = "\n".join([*lines, *(f"property {kind} {name}" for name in names), "end_header", ""])
    path.write_bytes(head.encode() + table.astype("<f8" if kind == "double" else "<f4").tobytes())
    return path


def test_a_ply_is_that_of_3dgs(tmp_path: Path) -> None:
    one = scene()
    path = splats.write_ply(one, tmp_path / "a.ply")
    table = vertices(path)
    assert table.shape == (300, 62) and table.itemsize * 62 == 248
    assert NAMES[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"] and NAMES[54] == "opacity"
    red = table[table[:, 0] > 0][:, 6:9] * 0.28209479 + 0.5
    assert (red > [0.9, -1, -1]).all() and (red < [1.1, 0.1, 0.1]).all()
    assert np.array_equal(table[:, 55:58], one.scales.detach()[:300].numpy()) and not table[:, 9:54].any()


def test_a_ply_comes_back_bit_for_bit(tmp_path: Path) -> None:
    one = scene()
    back = splats.read_ply(splats.write_ply(one, tmp_path / "a.ply")).scene(307)
    for name in PARTS:
        assert torch.equal(getattr(back, name)[:300], getattr(one, name)[:300]), name
    assert torch.equal(back.alive, one.alive)


def test_an_export_is_the_same_but_for_the_rounding_of_a_turn(tmp_path: Path) -> None:
    """Places change their axes and nothing else; quaternions are multiplied, which rounds."""
    one, path = scene(), tmp_path / "a.ply"
    assert asset.export(one, path, "splat-ply", Files(), {})[0] == path
    back = splats.read_ply(path, "y").scene(307)
    assert all(torch.equal(getattr(back, name)[:300], getattr(one, name)[:300]) for name in PARTS if name != "quats")
    assert torch.allclose(back.quats[:300], one.quats[:300], rtol=0, atol=1e-6)


def test_a_splat_file_looks_the_same(tmp_path: Path) -> None:
    one, cameras = scene(), ring(4, 48)
    path = splats.write_splat(one, tmp_path / "a.splat")
    assert path.stat().st_size == 300 * 32
    back = splats.read_splat(path)
    size = back.scales.sum(1).exp() * back.opacity.sigmoid()
    assert (size[:-60] > size[60:]).all()  # sorted, up to what a byte of opacity says
    assert psnr(seen(one, cameras).image, seen(back.scene(), cameras).image) >= 35


def test_fault_quaternions_in_another_order(tmp_path: Path) -> None:
    one, cameras = scene(), ring(4, 48)
    back = splats.read_splat(splats.write_splat(one, tmp_path / "a.splat"))
    wrong = splats.replace(back, quats=back.quats.roll(1, 1))
    assert psnr(seen(one, cameras).image, seen(wrong.scene(), cameras).image) < 30


@pytest.mark.parametrize("up", ["y", "z"])
@pytest.mark.parametrize("kind", ["ply", "splat"])
def test_axes_turn_everything(kind: str, up: str, tmp_path: Path) -> None:
    """The cameras turn with the splats: they see the same."""
    one, cameras = scene(), ring(3, 32)
    there, back = getattr(splats, f"write_{kind}"), getattr(splats, f"read_{kind}")
    path = there(one, tmp_path / f"a.{kind}", up)
    assert psnr(seen(one, cameras).image, seen(back(path, up).scene(), cameras).image) > (90 if kind == "ply" else 35)
    turn = torch.tensor(asset.TURNS[up], dtype=torch.float32)
    turned = moved(cameras, turn)
    lying = back(path).scene()
    assert psnr(seen(one, cameras).image, seen(lying, turned).image) > (60 if kind == "ply" else 35)


def moved(cameras, turn: Tensor):
    """Cameras turned about the origin."""
    return type(cameras)(turn @ cameras.pose, cameras.fov, cameras.height, cameras.width)


def test_fault_means_that_turn_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splats, "hamilton", lambda a, b, plain=splats.hamilton: b if len(b) == 300 else plain(a, b))
    one, cameras = scene(), ring(3, 32)
    lying = splats.read_ply(splats.write_ply(one, tmp_path / "a.ply", "y")).scene()
    turned = moved(cameras, torch.tensor(asset.TURNS["y"], dtype=torch.float32))
    assert psnr(seen(one, cameras).image, seen(lying, turned).image) < 30


def colour(cloud: splats.Cloud, ways: Tensor) -> Tensor:
    """What the first splat shows to directions [P,3], without the clamp."""
    found = cloud.colours[0].double() * 0.28209479177387814 + torch.zeros(len(ways), 3, dtype=torch.float64)
    for degree, band in splats.BANDS.items():
        found = found + splats.harmonics(ways, degree) @ cloud.rest[0, :, band].double().T
    return found


@pytest.mark.parametrize("up", ["y", "z"])
def test_colours_that_depend_on_the_view_turn_too(up: str) -> None:
    gen = torch.Generator().manual_seed(1)
    plain = splats.replace(splats.Cloud.of(scene(5)), rest=torch.randn(5, 3, 15, generator=gen))
    ways = torch.nn.functional.normalize(torch.randn(40, 3, generator=gen, dtype=torch.float64), dim=1)
    turned, matrix = plain.turned(splats.TURNS[up]), torch.tensor(asset.TURNS[up])
    assert (colour(turned, ways @ matrix.T) - colour(plain, ways)).abs().max() < 1e-5
    assert (colour(splats.replace(turned, rest=plain.rest), ways @ matrix.T) - colour(plain, ways)).abs().max() > 0.1


def test_harmonics_are_orthonormal() -> None:
    """Against the constants of no other code: their integrals over the sphere are those of an orthonormal set."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    around = torch.arange(32, dtype=torch.float64) * (2 * math.pi / 32)
    high = torch.tensor(nodes)[:, None]
    flat = (1 - high**2).sqrt()
    ways = torch.stack([flat * around.cos(), flat * around.sin(), high.expand(16, 32)], -1).view(-1, 3)
    share = torch.tensor(weights).repeat_interleave(32) * (2 * math.pi / 32)
    rows = torch.cat([splats.harmonics(ways, degree) for degree in (1, 2, 3)], 1)
    assert torch.allclose(rows.T @ (rows * share[:, None]), torch.eye(15, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("each", [0, 3, 8, 15, 24])
def test_harmonics_of_any_degree_are_read(each: int, tmp_path: Path) -> None:
    gen = np.random.default_rng(0)
    names = [name for name in NAMES if not name.startswith(("f_rest", "n"))]
    names += [f"f_rest_{i}" for i in range(3 * each)]
    table = gen.normal(size=(4, len(names)))
    cloud = splats.read_ply(write(tmp_path / "a.ply", names, table, "double"))
    kept = min(each, 15)
    expected = table[:, 14:].reshape(4, 3, each)[..., :kept].astype(np.float32)
    assert np.array_equal(cloud.rest[..., :kept].numpy(), expected) and not cloud.rest[..., kept:].any()
    assert len(splats.write_ply(cloud.scene(), tmp_path / "b.ply").read_bytes()) > 4 * 248


def body(count: int = 2, width: int = 62) -> bytes:
    return np.ones((count, width), "<f4").tobytes()


def header(
    count: object = 2, names: list[str] = NAMES, form: str = "binary_little_endian 1.0", more: str = ""
) -> bytes:
    rows = "".join(f"property float {name}\n" for name in names)
    return f"ply\nformat {form}\nelement vertex {count}\n{rows}{more}end_header\n".encode()


NAN = np.full((2, 62), np.nan, "<f4").tobytes()
BAD = {
    "empty": (b"", "is no PLY"),
    "not a ply": (b"solid cube\n" * 9, "is no PLY"),
    "endless header": (b"ply\n" + b"comment x\n" * 10_000, "is no PLY"),
    "ascii": (header(form="ascii 1.0") + b"1 " * 124, "not binary little-endian"),
    "big endian": (header(form="binary_big_endian 1.0") + body(), "not binary little-endian"),
    "fewer": (header(3) + body(), "says it has 3 splats of 248 bytes and holds 496"),
    "more": (header(1) + body(), "says it has 1 splats"),
    "truncated": (header() + body()[:-5], "cut short"),
    "none": (header(0), "says it has 0 splats"),
    "ten million in a tiny file": (header(10_000_000) + body(), "says it has 10000000 splats"),
    "a count that is no count": (header("9" * 5000) + body(), "holds more than Gaussians"),
    "a negative count": (header(-1) + body(), "holds more than Gaussians"),
    "a mesh": (
        header(more="element face 1\nproperty list uchar int vertex_index\n") + body(),
        "holds more than Gaussians",
    ),
    "lists": (header(more="property list uchar int a\n") + body(), "columns that are lists"),
    "no colours": (header(names=["x", "y", "z"]) + body(2, 3), "has no column f_dc_0"),
    "twice": (header(names=[*NAMES, "x"]) + body(2, 63), "has a column twice"),
    "half a degree": (header(names=[*NAMES, "f_rest_45"]) + body(2, 63), "has 46 f_rest columns"),
    "not a number": (header() + NAN, "2 of 2 splats are NaN"),
    "no orientation": (header() + np.zeros((2, 62), "<f4").tobytes(), "quaternion is zero"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_plys_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(BAD[name][0])
    with pytest.raises(BadInput, match=BAD[name][1]) as caught:
        splats.read_ply(tmp_path / "a.ply")
    assert "\n" not in str(caught.value) and "a.ply" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"x" * 33, NAN[:64]])
def test_bad_splats_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.splat").write_bytes(data)
    with pytest.raises(BadInput, match="a.splat"):
        splats.read_splat(tmp_path / "a.splat")
    with pytest.raises(BadInput, match="no such file"):
        splats.read_splat(tmp_path / "b.splat")


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    latent = Gaussians(Splats(*(torch.ones(2, n) if n else torch.ones(2) for n in (3, 3, 4, 0, 4))))
    with pytest.raises(BadInput, match="4 latent channels"):
        splats.write_ply(latent, tmp_path / "a.ply")
    empty, broken = scene(), scene()
    with torch.no_grad():
        empty.opacity.fill_(-100.0)
        broken.means[3, 1] = math.nan
    with pytest.raises(BadInput, match="no splats left"):
        splats.write_splat(empty, tmp_path / "a.splat")
    with pytest.raises(BadInput, match="1 of 300 splats are NaN"):
        splats.write_ply(broken, tmp_path / "a.ply")
    assert not list(tmp_path.iterdir())
