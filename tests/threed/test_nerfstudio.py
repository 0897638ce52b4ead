"""nerfstudio as a scene, and our data sets as its own reader takes them (`make test-nerfstudio` has an environment)."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import solid
import torch
import trimesh
from torch import Tensor

from limbeck.core.run import job
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.domains.threed import asset, known, nerfstudio, posed, transforms
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.cameras import Cameras, orbit, ring
from limbeck.domains.threed.scene import seen

installed = pytest.mark.skipif(
    importlib.util.find_spec("nerfstudio") is None, reason="needs requirements/nerfstudio.txt"
)

SMALL = {"levels": 3, "entries": 12, "finest": 20, "hidden": 24, "samples": 10, "proposal": 10}


def studio(**words: Any) -> nerfstudio.Studio:
    torch.manual_seed(0)
    return nerfstudio.Studio(settings.Nerfstudio(**{**SMALL, **words}))


def test_its_absence_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nerfstudio", None)
    for name in [name for name in sys.modules if name.startswith("nerfstudio.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BadInput, match=r"--no-deps -r requirements/nerfstudio.txt") as caught:
        Build(load("toy/solids", ["student={kind: threed.nerfstudio}"])).piece("student")
    assert "\n" not in str(caught.value)


def pool(size: int) -> tuple[Cameras, Tensor]:
    """Forty cameras around a solid, and its pictures."""
    azimuth, one = torch.arange(40) * (2 * math.pi / 40), torch.ones(40)
    elevation = torch.tensor([-0.1, 0.3, 0.8, 0.1, 0.5] * 8)
    cameras = orbit(azimuth, elevation, 2.6 * one, math.radians(40) * one, size, size)
    return cameras, posed.truth(posed.SOLIDS[posed.PROMPTS[0]], cameras)[0]


def fitted(scene: nerfstudio.Studio, steps: int, size: int = 12) -> nerfstudio.Studio:
    """The scene after steps on posed pictures."""
    cameras, image = pool(size)
    optim = torch.optim.Adam([p for p in scene.parameters() if p.requires_grad], lr=0.02, betas=(0.9, 0.99))
    gen = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(40, generator=gen)[:4]
        found = scene.render(cameras.pick(rows), torch.ones(4, 3), torch.rand(4, generator=gen)).image
        optim.zero_grad()
        (found - image[rows]).square().sum().div(4).backward()
        optim.step()
    return scene


def quality(scene: nerfstudio.Studio, size: int = 12) -> float:
    held_out = posed.held_out(size)
    return known.psnr(seen(scene, held_out).image, posed.truth(posed.SOLIDS[posed.PROMPTS[0]], held_out)[0])


@pytest.fixture(scope="module")
def ball() -> nerfstudio.Studio:
    """Nerfacto after some steps on pictures of a ball."""
    return fitted(studio(), 80)


@installed
def test_a_solid_is_fitted_from_posed_views(ball: nerfstudio.Studio) -> None:
    assert quality(ball) > 20 > 12 > quality(studio())
    assert quality(fitted(studio(field="generfacto"), 40)) > quality(studio(field="generfacto")) + 3


@installed
def test_front_is_in_front(ball: nerfstudio.Studio) -> None:
    front, back = seen(ball, ring(2, 21, elevation=0, distance=2.6)).image[:, :, 10, 10]
    assert front.argmax() == 1 and back.argmax() == 2  # the green patch, and blue behind


@installed
@pytest.mark.parametrize("field", ["nerfacto", "generfacto"])
def test_what_is_rendered(field: str) -> None:
    scene, cameras = studio(field=field), ring(2, 7, elevation=20)
    black, white = (scene.render(cameras, torch.full((2, 3), ground)) for ground in (-1.0, 1.0))
    assert black.image.shape == (2, 3, 7, 7) and black.depth.shape == black.alpha.shape == (2, 1, 7, 7)
    assert black.alpha.min() > -1e-6 and black.alpha.max() < 1 + 1e-6 and black.alpha[:, 0, 3, 3].min() > 0.9
    assert torch.allclose(white.image - black.image, 2 * (1 - black.alpha).expand(-1, 3, -1, -1), atol=1e-6)
    assert torch.allclose(white.image[:, :, 0, 0], torch.ones(2, 3), atol=1e-5)  # the corner's ray misses the ball
    weights, places, widths = (black.aux[name] for name in ("weights", "places", "widths"))
    assert torch.allclose(weights.sum(1), black.alpha.flatten(), atol=1e-5)
    ahead = (cameras.rays()[1] * cameras.forward[:, None, None]).sum(-1).flatten()
    assert torch.allclose((weights * places).sum(1) * ahead, black.depth.flatten(), atol=1e-3)
    assert widths.min() > -1e-6 and black.normals is None
    shown = seen(scene, cameras)
    assert shown.normals is not None and torch.allclose(shown.image, white.image, atol=1e-5)
    towards = torch.nn.functional.normalize(cameras.position, dim=1)  # the cone that it starts from is round
    middle = torch.nn.functional.normalize(shown.normals[:, :, 3, 3], dim=1)
    assert ((middle * towards).sum(1) > 0.9).all()


@installed
def test_fog_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alpha of constant density in the ball is known by geometry, wherever the samples lie."""
    scene, cameras = studio(), ring(1, 9, elevation=20)
    look = scene.look
    monkeypatch.setattr(scene, "look", lambda samples: (0 * look(samples)[0] + 0.8, look(samples)[1]))
    origin, ray = cameras.rays()
    middle = -(origin * ray).sum(-1)
    half = (1 - (origin + middle[..., None] * ray).square().sum(-1)).clamp_min(0).sqrt()
    for jitter in (None, torch.tensor([0.37])):
        alpha = scene.render(cameras, torch.ones(1, 3), jitter).alpha[:, 0]
        assert torch.allclose(alpha, 1 - torch.exp(-0.8 * 2 * half), atol=1e-5)


@installed
@pytest.mark.parametrize("field", ["nerfacto", "generfacto"])
def test_a_step_repeats_with_two_threads(field: str, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And reaches all that is trained; the global generator has no part in it."""
    scene, cameras = studio(field=field, samples=12), ring(2, 16)

    def gradients(jitter: float = 0.1) -> list[Tensor]:
        views = scene.render(cameras, torch.ones(2, 3), torch.full((2,), jitter))
        trained = [p for p in scene.parameters() if p.requires_grad]
        return list(torch.autograd.grad(views.image.square().sum() + views.depth.sum(), trained))

    first = gradients()
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in first)
    assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(first, gradients(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, gradients(0.7), strict=True))
    monkeypatch.setattr(nerfstudio.Gathers, "__torch_function__", lambda self, f, t, a=(), k=None: f(*a, **(k or {})))
    plain = gradients()
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(first, plain, strict=True))


@installed
def test_score_distillation_trains_it(tmp_path: Path) -> None:
    """SDS from the closed-form teacher, as a run of the recipe, to a PSNR well above where it starts."""
    words = ", ".join(f"{key}: {value}" for key, value in SMALL.items())
    optim = "{kind: adam, lr: 0.02, betas: [0.9, 0.99], clip: null}"
    time = "{kind: uniform, lo: 0.02, hi: 0.98}"
    sets = [
        f"student={{kind: threed.nerfstudio, {words}}}",
        f"stages.0.losses=[{{kind: score, operator: sds, guidance: 1.0, time: {time}, optim: {optim}}}]",
    ]
    sets += ["teacher.size=12", "data.size=12", "steps=50"]
    assert job.run(load("toy/solids", sets), tmp_path / "run", device="cpu", quiet=True) == 0
    scene, _, white = json.loads((tmp_path / "run" / "eval.json").read_text())["threed.quality"]
    assert scene["PSNR"] > max(18, white["PSNR"] + 4)


@installed
def test_its_mesh_is_exported(ball: nerfstudio.Studio, tmp_path: Path) -> None:
    files = settings.Files(resolution=24, texture=256, colours="field")
    path, facts = asset.export(ball, tmp_path, "glb", files, {})
    mesh = trimesh.load_scene(path).to_mesh()
    assert mesh.bounds[1, 1] == pytest.approx(1, abs=1e-4) and len(mesh.faces) > 500
    assert max(mesh.extents) < 1.25  # a ball: as wide as it is high
    assert json.loads(facts.read_text())["components"] == 1


@installed
def test_its_reader_has_the_same_rays(tmp_path: Path) -> None:
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    transforms.write(solid.Solid(), transforms.around(6, 12, 3.0), tmp_path)
    config = NerfstudioDataParserConfig(
        data=tmp_path, orientation_method="none", center_method="none", auto_scale_poses=False, eval_mode="all"
    )
    parsed = config.setup().get_dataparser_outputs("train")
    origin, ray = transforms.read(tmp_path, 12).cameras.rays()
    for i in range(6):
        bundle = parsed.cameras.generate_rays(i)
        assert torch.allclose(bundle.origins, origin[i], atol=1e-5)
        assert torch.allclose(bundle.directions, ray[i], atol=1e-5)
    assert [path.name for path in parsed.image_filenames] == [f"{i:04d}.png" for i in range(6)]


@installed
def test_its_lens_bends_rays_as_ours_are_unbent() -> None:
    from nerfstudio.cameras.camera_utils import get_distortion_params
    from nerfstudio.cameras.cameras import Cameras as Theirs

    bent = {"k1": 0.1, "k2": -0.03, "k3": 0.01, "k4": 0.0, "p1": 0.02, "p2": -0.01}
    lens = transforms.Lens(fl_x=40.0, fl_y=44.0, cx=15.0, cy=13.5, w=32, h=28, **bent)
    optics = transforms.Optics.of(lens, transforms.Lens(), 32, 28, "x")
    focal = optics.inner(28, 32)
    places = (optics.places(focal, 28, 32) + 1) / 2 * torch.tensor([32.0, 28.0])  # (u, v) in the bent picture
    pose = ring(1, 8).pose
    theirs = Theirs(
        pose, fx=40.0, fy=44.0, cx=15.0, cy=13.5, width=32, height=28, distortion_params=get_distortion_params(**bent)
    )
    coords = places.flip(-1).reshape(-1, 2).float()
    bundle = theirs.generate_rays(torch.zeros(len(coords), 1, dtype=torch.long), coords=coords)
    ours = Cameras(pose, torch.tensor([2 * math.atan(14 / focal)]), 28, 32).rays()[1]
    assert torch.allclose(bundle.directions.view(28, 32, 3), ours[0], atol=2e-4)
