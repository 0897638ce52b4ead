"""The data `video.folder`: captions, cuts in time and space, draws that depend on nothing but the step."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from limbeck.core import film
from limbeck.core.run import recipe
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.video.clips import Clips, captioned, fitted
from limbeck.domains.video.config import Folder

pytest.importorskip("av")
RAMP = 40


def ramp(red: int, count: int = RAMP, h: int = 32, w: int = 48) -> Tensor:
    """Films [count,3,h,w] whose green says which frame it is, with large steps from each frame to the next."""
    x = torch.zeros(count, 3, h, w, dtype=torch.uint8)
    x[:, 0], x[:, 1] = red, (5 * (7 * torch.arange(count) % RAMP) + 20)[:, None, None].byte()
    return x


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films of 40 frames, 20 a second: one dark red, one light red, in a folder of its own."""
    place = tmp_path_factory.mktemp("clips")
    (place / "more").mkdir()
    film.write(ramp(60), place / "dark.mp4", 20)
    film.write(ramp(200), place / "more" / "light.gif", 20)
    (place / "dark.txt").write_text("a dark\nramp\n")
    (place / "more" / "light.txt").write_text("a light ramp")
    (place / "notes.md").write_text("not a clip")
    return place


def settings(path: Path, **more: Any) -> Folder:
    return Folder.model_validate({"path": str(path), "size": (16, 16), "frames": 6, "fps": 10.0, **more})


def which(x: Tensor) -> Tensor:
    """The frame numbers [B,F] that clips [B,3,F,H,W] show."""
    code = (((x[:, 1].mean((-1, -2)) + 1) * 127.5 - 20) / 5).round().int()
    return code * 23 % RAMP  # 7 * 23 = 1 modulo 40


def test_clips_go_with_their_captions_at_even_times(folder: Path) -> None:
    run = recipe.of({
        "name": "x", "steps": 1, "batch": 4,
        "data": {"kind": "video.folder", "path": str(folder), "size": [16, 16], "frames": 6, "fps": 10},
        "stages": [{"name": "a", "losses": [{"kind": "denoising"}]}],
    })  # fmt: skip
    data = Build(run).piece("data")
    found = data.batch(64, generator(0, "data", 3), slice(None))
    assert found.x.shape == (64, 3, 6, 16, 16) and found.x.dtype == torch.float32 and found.x.abs().max() <= 1
    assert torch.equal(found.cond["fps"], torch.full((64,), 10.0))
    light = found.x[:, 0].mean((1, 2, 3)) > 0
    assert found.prompts == ["a light ramp" if bright else "a dark ramp" for bright in light]
    assert 16 < int(light.sum()) < 48
    numbers = which(found.x)
    assert (numbers.diff(dim=1) == 2).all()  # 20 frames a second read at 10
    assert int(numbers[:, 0].min()) <= 2 and int(numbers.max()) >= 37  # from the first to the last


def test_draws_depend_on_the_step_alone(folder: Path) -> None:
    one, other = Clips(settings(folder)), Clips(settings(folder))
    whole = one.batch(8, generator(5, "data", 7), slice(None))
    one.batch(3, generator(5, "data", 8), slice(None))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    part = other.batch(8, generator(5, "data", 7), slice(3, 6))
    torch.set_num_threads(threads)
    assert whole.x is not None and part.x is not None
    assert torch.equal(part.x, whole.x[3:6]) and part.prompts == whole.prompts[3:6]
    assert not torch.equal(whole.x, one.batch(8, generator(5, "data", 8), slice(None)).x)
    prompts = one.prompts(8, generator(5, "data", 7))
    assert one.prompts(8, generator(5, "data", 7), slice(3, 6)) == prompts[3:6] and set(prompts) == set(one.captions)


def test_the_middle_is_cut_and_resized() -> None:
    wide = torch.zeros(3, 40, 100, dtype=torch.uint8)
    wide[0, :, 30:70], wide[1, :20] = 255, 255  # what is red is the middle square, the upper half is green
    found = fitted(wide, 20, 20)
    assert found.shape == (3, 20, 20) and (found[0, :, 1:-1] > 0.99).all()
    assert (found[1, :9] > 0.9).all() and (found[1, 11:] < -0.9).all()
    tall = fitted(wide.mT, 10, 20)
    assert tall.shape == (3, 10, 20) and (tall[0] > 0.999).all()  # 40 wide: 20 of the middle's 100 rows are kept
    same = torch.randint(256, (3, 16, 24), generator=generator(0, "picture", 0)).byte()
    assert torch.allclose(fitted(same, 16, 24), same.float() / 127.5 - 1, atol=1e-6)
    fine = torch.randint(256, (3, 64, 64), generator=generator(0, "noise", 0)).byte()
    points = F.interpolate(fine[None].float() / 127.5 - 1, (16, 16), mode="bicubic")  # 16 pixels of each 4 x 4 unseen
    assert fitted(fine, 16, 16).std() < 0.2 < 0.3 < points.std()


def test_captions_from_a_list(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes((folder / "dark.mp4").read_bytes())  # any name does
    (tmp_path / "a.mp4").write_bytes((folder / "dark.mp4").read_bytes())
    lines = [{"file": "b", "caption": "second"}, {"file": "a.mp4", "caption": "first"}]
    (tmp_path / "captions.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    assert [(path.name, text) for path, text in captioned(tmp_path)] == [("a.mp4", "first"), ("b", "second")]
    assert len(Clips(settings(tmp_path)).videos) == 2
    for line, message in (
        ('{"file": "a.mp4"}', "captions.jsonl:1: write"), ("a.mp4 first", "captions.jsonl:1: write"),
        ('{"file": "a.mp4", "caption": 3}', "captions.jsonl:1: write"),
        ('{"file": "../a.mp4", "caption": "x"}', "captions.jsonl:1: the file lies outside"),
        ('{"file": "c.mp4", "caption": "x"}', "c.mp4: there is no such file"),
    ):  # fmt: skip
        (tmp_path / "captions.jsonl").write_text(line)
        with pytest.raises(BadInput, match=message):
            Clips(settings(tmp_path))


def test_what_cannot_be_trained_on_is_named_before_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no such folder"):
        Clips(settings(tmp_path / "none"))
    with pytest.raises(BadInput, match="holds no clips"):
        Clips(settings(tmp_path))
    with pytest.raises(
        BadInput, match=r"30 frames at 10 a second take 2.90 s and 2 of 2 clips have less .*dark.mp4, has 2.00 s"
    ):
        Clips(settings(folder, frames=30))
    assert Clips(settings(folder, frames=20)).span < 2.0  # what just fits is taken
    Image.new("RGB", (16, 16)).save(tmp_path / "x.webp")
    with pytest.raises(BadInput, match=r"x.webp: has no caption; write it into x.txt"):
        Clips(settings(tmp_path))
    (tmp_path / "x.txt").write_text("a still")
    with pytest.raises(BadInput, match="1 of 1 clips have less"):
        Clips(settings(tmp_path))
    (tmp_path / "y.mp4").write_text("text")
    (tmp_path / "y.txt").write_text("broken")
    with pytest.raises(BadInput, match="y.mp4: pyav cannot read it"):
        Clips(settings(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is None, reason="torchcodec is not installed")
def test_another_reader_gives_the_same_batch(folder: Path) -> None:
    x = [
        Clips(settings(folder, reader=name)).batch(4, generator(0, "x", 0), slice(None)).x
        for name in ("pyav", "torchcodec")
    ]
    assert torch.equal(x[0], x[1])  # type: ignore[arg-type]
