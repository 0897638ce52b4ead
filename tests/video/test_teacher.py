"""The embedded video net: its layout, its conditions, its folder; the space and the table of clips."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from limbeck.core import fidelity
from limbeck.core.diffusion.denoiser import FewStep
from limbeck.core.run import view
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.domains.video import config, io, metrics, models, quality, teacher

TINY = ["teacher={kind: video.fresh, channels: [16, 16]}", "space.steps=1", "sample.prompts=[fish, dog face]"]


@pytest.fixture(scope="module")
def build() -> Build:
    return Build(load("video/lcm", [*TINY, "student={kind: few_step, times: [1.0, 0.5]}"]))


def clip(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_blocks_of_pixels_become_channels_and_come_back() -> None:
    x = clip(2, 3, 5, 8, 6)
    assert models.unshuffled(x).shape == (2, 12, 5, 4, 3) and torch.equal(models.shuffled(models.unshuffled(x)), x)
    assert torch.equal(models.unshuffled(x)[:, :, 2], torch.nn.functional.pixel_unshuffle(x[:, :, 2], 2))


def test_the_net_hears_text_frame_rate_and_time(build: Build) -> None:
    model = build.piece("teacher")
    x, t = clip(1, *model.shape), torch.tensor([0.5])
    cond = model.encode(["fish"]) | {"fps": torch.tensor([12.0])}

    def said(time: torch.Tensor = t, **other: torch.Tensor) -> torch.Tensor:
        return model.denoiser.predict(x, time, cond | other).flow

    usual = said()
    assert usual.shape == x.shape and torch.isfinite(usual).all()
    for change in (model.encode(["dog face"]), {"fps": torch.tensor([4.0])}, {"time": torch.tensor([0.6])}):
        assert not torch.allclose(said(**change), usual, atol=1e-5)
    told = {key: value for key, value in cond.items() if key != "fps"}
    assert torch.equal(model.denoiser.predict(x, t, told).flow, usual), "12 where none is told"


def test_frame_rates_differ_by_octaves() -> None:
    features = models.rate_features(torch.tensor([4.0, 6.0, 12.0, 24.0]))
    assert (
        torch.allclose(features.square().mean(1), torch.ones(4))
        and torch.cdist(features, features).add(10 * torch.eye(4)).min() > 1
    )


def test_a_folder_comes_back(build: Build, tmp_path: Path) -> None:
    written = build.piece("space").export(build, tmp_path / "mine", "diffusers")
    assert (tmp_path / "mine" / "unet" / "diffusion_pytorch_model.safetensors") in written
    again = Build(load("video/lcm", [f"teacher.model={tmp_path / 'mine'}"])).piece("teacher")
    assert again.shape == (3, 8, 32, 32)
    trained = build.piece("student").denoiser.net.state_dict()
    for key, value in again.denoiser.net.state_dict().items():
        assert torch.equal(value, trained[key].bfloat16().float()), key
    with pytest.raises(BadInput, match="there is no motion-33"):
        Build(load("video/lcm", ["teacher.model=motion-33"])).piece("teacher")


def test_sheets_move_and_samples_are_films(build: Build, tmp_path: Path) -> None:
    space = build.piece("space")
    path, *clips = space.show(build, 3, tmp_path)
    with Image.open(path) as sheet:
        assert sheet.n_frames == 8
    assert {clip.parent.name for clip in clips} == {"teacher", "step-00000003"} and len(clips) == 4
    told = {file["path"]: dict(file["facts"]) for file in view.described(tmp_path) if file["kind"] == "side"}
    assert told["teacher/000-fish-seed0.mp4"] == {"title": "teacher, 1 steps", "prompt": "fish"}
    assert told["step-00000003/001-dog-face-seed0.mp4"]["title"] == "student, 2 steps, after 3 training steps"
    assert {clip.parent.name for clip in space.show(build, 4, tmp_path)[1:]} == {"step-00000004"}, "the teacher once"
    paths = space.sample(build, ["fish", "a fish"], 1, tmp_path / "films")
    assert [path.name for path in paths] == ["000-fish-seed1.mp4", "001-a-fish-seed1.mp4"]
    written = space.export(build, tmp_path / "out", "mp4")
    assert [path.name for path in written] == ["side-by-side.mp4", "000-fish-seed0.mp4", "001-dog-face-seed0.mp4"]
    clip = io.read(written[0])
    assert clip.frames.shape[0] == 8 and clip.frames.shape[3] > 900, "teacher and student in one film"
    with pytest.raises(BadInput, match="trained for 2 step"):
        space.sample(build, ["fish"], 1, tmp_path, steps=4)


def test_an_unknown_prompt_is_told_the_nearest(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    build.piece("teacher").encode(["fish", "penguim"])
    assert capsys.readouterr().err.count("\n") == 1
    assert "penguin" in capsys.readouterr().err or teacher.motions().nearest("penguim")[0] == "penguin"


def test_the_table_knows_real_clips_from_frozen_and_shuffled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "MIN_COUNT", 8)
    judge = quality.Judge(config.Quality(captions=8), 8)
    other = judge.held("floor", 1)
    real, frozen = judge.row("data", "", other), judge.row("frozen", 1, other[:, :, :1].expand_as(other))
    assert real["retrieval@1"] > 0.6 and judge.row("strange", 1, other.roll(1, 0))["retrieval@1"] < 0.3
    assert real["dynamic degree"] > 0.2 and frozen["dynamic degree"] == 0 and frozen["flicker"] == 1
    assert frozen["subject consistency"] > real["subject consistency"]
    assert frozen["FD-lite0 of changes"] > 1.2 * real["FD-lite0 of changes"]


def test_a_sampler_is_measured_in_batches_from_one_noise(build: Build) -> None:
    model, student = build.piece("teacher"), build.piece("student")
    assert isinstance(student, FewStep)
    small = config.Quality(batch=2, timed=1)
    x = quality.clips(model, student, ["fish", "ox", "ant"], small)
    assert x.shape == (3, 3, 8, 32, 32) and torch.equal(x[:2], quality.clips(model, student, ["fish", "ox"], small))
    assert quality.seconds(model, student, ["fish"], small) > 0
    assert metrics.frames(x).shape == (24, 3, 32, 32)
