"""A run that makes an asset, end to end: steps, evaluation, pictures, turntable, files; and what a student is."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from limbeck import cli
from limbeck.core.diffusion.codec import Identity
from limbeck.core.run import job
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.core.run.rng import Draws
from limbeck.domains.threed import checks, known, law, posed, quality, space, volume
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.scene import SHADINGS, SceneStudent

SOLID = posed.PROMPTS[0]
SMALL = ["teacher.size=16", "data.size=16", "student.field.size=12", "steps=12", "checkpoint.every=6", "log.every=4"]
FILES = ["space.files.resolution=24", "space.files.texture=256", "space.files.frames=4", "space.files.size=32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the solids' recipe."""
    folder = tmp_path_factory.mktemp("runs") / "solid"
    sets = [*SMALL, *FILES, "eval.0.formats=[glb, ply]"]
    assert job.run(load("toy/solids", sets), folder, device="cpu", quiet=True) == 0
    return folder


def test_a_run_ends_in_numbers_pictures_and_files(run: Path) -> None:
    scene, teacher, white = json.loads((run / "eval.json").read_text())["threed.quality"]
    assert scene["PSNR"] > white["PSNR"] and teacher["PSNR"] > 20 and scene["nearest object"] in posed.PROMPTS
    with Image.open(run / "samples" / "step-00000012.png") as sheet:
        assert sheet.width == 4 * 128 and sheet.height == 3 * 128  # truth, scene, normals
    facts = json.loads((run / "exports" / "glb" / "asset.json").read_text())
    assert (facts["prompt"], facts["seed"], facts["steps"]) == (SOLID, 0, 12)
    assert (run / "exports" / "glb" / "asset.glb").read_bytes()[:4] == b"glTF"
    assert (run / "report.html").stat().st_size > 1000


def verb(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--device", "cpu"])
    return int(end.value.code or 0)


def test_verbs_take_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("export", str(run), "--format", "obj", "--out", str(tmp_path / "mine")) == 0
    assert (tmp_path / "mine" / "asset.obj").exists() and (tmp_path / "mine" / "asset.mtl").exists()
    assert verb("sample", str(run), "--out", str(tmp_path / "turn")) == 0
    assert list((tmp_path / "turn").glob("*.gif"))
    assert verb("export", str(run), "--format", "splat", "--out", str(tmp_path / "s")) == 2
    assert "splat" in capsys.readouterr().err


def test_another_prompt_wants_another_run(run: Path, tmp_path: Path) -> None:
    build = job.open_run(run, "cpu")
    with pytest.raises(BadInput, match="start another run"):
        build.piece("space").sample(build, ["a cube"], 0, tmp_path)


def context(batch: int = 4, step: int = 0) -> Context:
    return Context(step, "make", Draws(0, step, batch), 1, 0, torch.device("cpu"))


def nerf() -> volume.Nerf:
    return volume.scene(settings.Nerf(field=settings.Voxels(size=8), sampling=settings.Sampling(samples=8)), 3)


def asked(config: settings.Law, step: int = 0) -> dict[str, torch.Tensor]:
    return law.Law(config).ask(context(step=step), ["a"] * 4)[1]


def test_a_step_trains_one_particle() -> None:
    student = SceneStudent([nerf(), nerf(), nerf()], Identity())
    cond = asked(settings.Law(prompt="a", size=8))
    student.sample(torch.zeros(4, 3, 8, 8), cond).x.sum().backward()
    trained = [i for i, scene in enumerate(student.scenes) if next(scene.parameters()).grad is not None]
    assert trained == [int(float(cond["particle"][0]) * 3)]
    picked = {int(float(asked(settings.Law(prompt="a"), step)["particle"][0]) * 3) for step in range(20)}
    assert picked == {0, 1, 2}


def test_a_lamp_shades_some_steps() -> None:
    config = settings.Law(prompt="a", size=8, albedo=0.4)
    kinds = [int(found["shading"][0]) if "light" in (found := asked(config, step)) else 0 for step in range(60)]
    shares = [kinds.count(i) / 60 for i in range(3)]
    assert shares[0] == pytest.approx(0.4, abs=0.15) and min(shares[1:]) > 0.15
    step = next(i for i, kind in enumerate(kinds) if kind == SHADINGS.index("textureless"))
    student = SceneStudent([nerf()], Identity())
    lit, plain = asked(config, step), asked(settings.Law(prompt="a", size=8), step)
    one, two = (student.sample(torch.zeros(4, 3, 8, 8), cond).x for cond in (lit, plain))
    assert not torch.equal(one, two)


def test_a_field_that_grows_hears_of_the_step() -> None:
    grid = settings.HashGrid(levels=4, active=[(0, 1.0), (10, 4.0)])
    scene = volume.scene(settings.Nerf(field=grid, sampling=settings.Sampling(samples=8)), 3)
    with torch.no_grad():
        for parameter in scene.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    student, pictures = SceneStudent([scene], Identity()), []
    for step in (0, 10):
        cond = asked(settings.Law(prompt="a", size=8)) | {"step": torch.full((4,), step)}
        pictures.append(student.sample(torch.zeros(4, 3, 8, 8), cond).x)
    assert not torch.equal(*pictures)


def test_metrics_against_known_answers() -> None:
    image = posed.truth(posed.SOLIDS[SOLID], ring(3, 16))
    assert known.ssim(image[0], image[0]) == pytest.approx(1.0, abs=1e-5)
    assert known.ssim(image[0], -image[0]) < 0.2
    assert known.overlap(image[1], image[1]) == 1.0 and known.overlap(image[1], 1 - image[1]) < 0.1
    assert quality.sharpness(torch.zeros(1, 3, 4, 4)) == 0.0


@pytest.mark.slow
def test_sds_and_asd_find_a_solid() -> None:
    assert checks.made(checks.SPHERE, steps=80) > 30
    shift = ["stages.0.losses.0.operator=asd", "stages.0.losses.0.shift=0.3"]
    assert checks.made(checks.SPHERE, *shift, steps=80) > 24


@pytest.mark.parametrize("fault", ["sign", "camera"])
def test_wrong_variants_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "sign":
        plain = SceneStudent.sample

        def away(self, noise, cond, renoise=None):  # type: ignore[no-untyped-def]
            found = plain(self, noise, cond, renoise)
            found.x = 2 * found.x.detach() - found.x
            return found

        monkeypatch.setattr(SceneStudent, "sample", away)
    else:
        forward = posed.Posed.forward

        def blind(self, x_t, t, cond, features=False):  # type: ignore[no-untyped-def]
            front = ring(1, x_t.shape[-1], elevation=15, distance=2.6).rows().expand(len(x_t), -1)
            return forward(self, x_t, t, {**cond, "camera": front}, features)

        monkeypatch.setattr(posed.Posed, "forward", blind)
    assert checks.made(checks.SPHERE, steps=80) < 24


def test_the_space_shows_all_particles(tmp_path: Path) -> None:
    recipe = load("toy/solids", [*SMALL, "student.particles=2"])
    build = Build(recipe, folder=tmp_path)
    (path,) = space.Assets(settings.Assets()).show(build, 0, tmp_path)
    with Image.open(path) as sheet:
        assert sheet.height == 5 * 128


def test_an_object_is_its_own_whatever_its_article() -> None:
    recipe = load("threed/sds-nerf", ["data.prompt=The  Cactus", "student.field.size=4"])
    build = Build(recipe)
    truth = known.Known.of(build, "The  Cactus")
    assert truth is not None
    found, views = quality.retrieved(build, truth.image + 0.1)
    assert found == "cactus" and torch.equal(views, truth.image)


def test_every_particle_is_exported(tmp_path: Path) -> None:
    build = Build(load("toy/solids", [*SMALL, *FILES, "student.particles=2"]), folder=tmp_path)
    paths = build.piece("space").export(build, tmp_path / "out", "gif")
    assert {path.parent.name for path in paths} == {"particle-0", "particle-1"} and all(p.exists() for p in paths)
