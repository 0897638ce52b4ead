"""The embedded pictures, their draws and captions, the teacher network's pixels and its folder."""

import hashlib
import io
import json
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from limbeck.core.captioned import GROUP_CAPTIONS
from limbeck.core.run.errors import BadInput, LimbeckError
from limbeck.domains.image import build_fluent, data, models
from limbeck.domains.image.data import FluentData


@pytest.fixture(scope="module")
def fluent() -> FluentData:
    torch.set_num_threads(1)
    return FluentData()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_committed_set(fluent: FluentData) -> None:
    assert len(fluent) == len(set(fluent.names)) == 1599
    assert fluent.rgba.shape == (1599, 4, 32, 32) and fluent.rgba.dtype == torch.uint8
    assert Counter(fluent.groups).keys() == GROUP_CAPTIONS.keys() - {"Flags"}
    assert min(len(k) for k in fluent.keywords) >= 1
    assert (fluent.rgba[:, 3].amax((1, 2)) > 200).all(), "a picture is (nearly) transparent"
    notices = (data.FOLDER / "LICENSES.md").read_text()
    assert all(s.sha256 in notices and s.spec in notices for s in build_fluent.SOURCES)
    assert sum(f.stat().st_size for f in data.FOLDER.iterdir() if "64" not in f.name) < 4e6


def test_eval_names_are_fixed(fluent: FluentData) -> None:
    assert len(data.EVAL_NAMES) == len(set(data.EVAL_NAMES)) == 256 and set(data.EVAL_NAMES) <= set(fluent.names)
    assert list(data.EVAL_NAMES) == build_fluent.eval_names(data.captions_file()["pictures"])


def test_batch_shapes_and_range(fluent: FluentData) -> None:
    x, texts, index = fluent.batch(64, generator())
    assert x.shape == (64, 3, 32, 32) and x.dtype == torch.float32 and x.isfinite().all()
    assert -1 <= x.min() and x.max() <= 1
    assert len(texts) == len(index) == 64 and set(texts) <= set(fluent.texts())


def test_draws_come_from_the_generator_alone(fluent: FluentData) -> None:
    state = torch.get_rng_state()
    one, two, other = (fluent.batch(16, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(one[0], two[0]) and one[1] == two[1] and torch.equal(one[2], two[2])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"


def test_a_prompt_has_a_distribution(fluent: FluentData) -> None:
    x, texts, _ = fluent.batch(torch.full((8,), 5), generator(), "name")
    assert set(texts) == {fluent.names[5]}
    assert torch.pdist(x.flatten(1)).min() > 1


def test_batch_is_fast(fluent: FluentData) -> None:
    gen = generator()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        fluent.batch(64, gen)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.015


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("dog", True),
        ("grinning face", True),
        ("pizza", True),
        ("two o’clock", False),
        ("ten-thirty", False),
        ("backhand index pointing left", False),
        ("waning gibbous moon", False),
        ("input numbers", False),
        ("ZZZ", False),
        ("right arrow", False),
        ("A button (blood type)", False),
        ("chart increasing", False),
        ("1st place medal", False),
    ],
)
def test_mirror_rule(fluent: FluentData, name: str, may: bool) -> None:
    assert bool(fluent.mirror[fluent.index[name]]) is may


def test_mirrored_half_of_the_time_and_only_where_allowed() -> None:
    left = torch.zeros(1, 4, 32, 32)
    left[:, :, 8:24, 6:12] = 1
    pictures = left.expand(400, -1, -1, -1)
    centred = torch.arange(32.0) - 15.5

    def right_heavy(mirror: bool) -> float:
        # shifts are symmetric and at most 4 pixels, the mass lies 7 left of the centre
        alpha = data.placed(pictures, torch.full((400,), mirror), generator(1))[:, 3]
        return ((alpha.sum(1) * centred).sum(1) > 0).float().mean().item()

    assert right_heavy(False) == 0 and abs(right_heavy(True) - 0.5) < 0.08


def test_placed_is_the_identity_at_full_scale(monkeypatch: pytest.MonkeyPatch, fluent: FluentData) -> None:
    monkeypatch.setattr(data, "SCALES", (1.0, 1.0))
    pictures = fluent.premultiplied[:32]
    torch.testing.assert_close(
        data.placed(pictures, torch.zeros(32, dtype=torch.bool), generator()), pictures, atol=1e-5, rtol=0
    )
    flipped = data.resampling(torch.ones(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), 32)[0]
    torch.testing.assert_close(pictures @ flipped.T, pictures.flip(-1), atol=1e-5, rtol=0)


def test_scale_shrinks_the_mass_and_stays_in_the_frame() -> None:
    ones = torch.ones(300, 4, 32, 32)
    alpha = data.placed(ones, torch.zeros(300, dtype=torch.bool), generator(2))[:, 3]
    side = alpha.mean((1, 2)).sqrt()
    assert 0.74 < side.min() < 0.78 and 0.97 < side.max() <= 1.001
    assert abs(side.mean() - 0.875) < 0.02


def test_scaling_keeps_constants_and_follows_the_shift() -> None:
    weights = data.resampling(torch.tensor([0.8]), torch.tensor([2.0]), torch.tensor([False]), 32)[0]
    assert (weights[8:27].sum(1) - 1).abs().max() < 1e-4, "a constant inside must stay constant"
    centre = (weights @ (torch.arange(32.0) - 15.5)) / weights.sum(1).clamp(min=1e-3)
    assert abs(centre[17] - (1.5 - 2.0) / 0.8) < 0.05


def test_captions_are_a_mixture(fluent: FluentData) -> None:
    gen, index = generator(), torch.randint(1599, (4000,), generator=generator(9))
    mixed = fluent.caption(index, gen, "mixed")
    names = [fluent.names[i] for i in index.tolist()]
    coarse = [(i, t) for i, t, n in zip(index.tolist(), mixed, names, strict=True) if t != n]
    assert abs(len(coarse) / 4000 - 1 / 3) < 0.03
    group_level = sum(t == fluent.group_captions[i] for i, t in coarse)
    assert abs(group_level / len(coarse) - 0.5) < 0.06
    assert all(t == fluent.group_captions[i] or t in fluent.keywords[i] for i, t in coarse)
    assert fluent.caption(index, gen, "name") == names


@pytest.mark.parametrize(
    ("name", "text"),
    [("dog", "animal"), ("grinning face", "a face"), ("pizza", "food"), ("rose", "a flower"), ("taxi", "a vehicle")],
)
def test_group_captions(fluent: FluentData, name: str, text: str) -> None:
    assert fluent.group_captions[fluent.index[name]] == text


def test_ground_colours() -> None:
    colours = data.grounds(4000, generator())
    assert colours.shape == (4000, 3) and colours.min() >= 0 and colours.max() <= 1
    assert (colours.amax(1) >= 0.55 - 1e-6).all(), "a ground is too dark"
    assert (colours.mean(0) - colours.mean()).abs().max() < 0.02, "the hues are not uniform"
    assert (colours.argmax(1).bincount(minlength=3) / 4000 - 1 / 3).abs().max() < 0.04
    chroma = (colours.amax(1) - colours.amin(1)) / colours.amax(1)
    assert (chroma < 0.3).float().mean() > 0.2 and (chroma > 0.6).float().mean() > 0.2


def test_alpha_is_composited_exactly() -> None:
    red = torch.tensor([1.0, 0, 0])
    for alpha in (0.0, 0.25, 1.0):
        picture = torch.cat([red * alpha, torch.tensor([alpha])]).view(1, 4, 1, 1)
        out = data.composite(picture, torch.tensor([[0.0, 0, 1.0]]))[0, :, 0, 0]
        torch.testing.assert_close(out, torch.tensor([2 * alpha - 1, -1, 1 - 2 * alpha]))


def test_corners_show_the_plain_ground_without_a_dark_fringe(fluent: FluentData) -> None:
    white = torch.ones(8, 4, 32, 32)
    white[:, :, :8], white[:, :, 24:] = 0, 0
    pictures = data.placed(white, torch.zeros(8, dtype=torch.bool), generator())
    out = data.composite(pictures, torch.ones(8, 3))
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-5, rtol=0)  # white on white: no seam


def test_reference_covers_the_names_evenly(fluent: FluentData) -> None:
    x, texts, index = fluent.reference(1700, generator())
    counts = index.bincount(minlength=1599)
    assert x.shape[0] == 1700 and counts.min() == 1 and counts.max() == 2
    assert texts == [fluent.names[i] for i in index.tolist()]
    assert set(fluent.prompts(50, generator())) <= set(fluent.texts())


def test_nearest_names(fluent: FluentData) -> None:
    assert fluent.nearest("grining face", 1) == ["grinning face"]
    assert "pizza" in fluent.nearest("a pizza with cheese", 3)
    assert fluent.knows("pizza") and fluent.knows("animal") and not fluent.knows("a pizza with cheese")


def test_a_size_that_is_not_built() -> None:
    with pytest.raises(BadInput, match="limbeck assets build fluent-48"):
        FluentData(48)


def webp(size: tuple[int, int], colour: tuple[int, int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, "webp", lossless=True, exact=True)
    return buffer.getvalue()


def tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The three packages in small: a heart (file with variation selector), a dog, a flag."""
    names = {
        "❤️": {"name": "red heart", "group": "Smileys & Emotion"},
        "🐕": {"name": "dog", "group": "Animals & Nature"},
        "🏁": {"name": "chequered flag", "group": "Flags"},
        "🐈": {"name": "cat", "group": "Animals & Nature"},
    }
    words = {"🐕": ["dog", "animal", ":)", "best_friend", "animal"], "❤️": ["red_heart", "love"]}
    art = {"2764-fe0f": (255, 0, 0, 255), "1f415": (0, 255, 0, 128), "1f3c1": (0, 0, 0, 255)}
    files = {
        build_fluent.ART: {f"assets/{k}.webp": webp((256, 264), v) for k, v in art.items()},
        build_fluent.NAMES: {"data-by-emoji.json": json.dumps(names).encode()},
        build_fluent.KEYWORDS: {"dist/emoji-en-US.json": json.dumps(words).encode()},
    }
    made = {s.name: tarball(tmp_path / f"{i}.tgz", f) for i, (s, f) in enumerate(files.items())}
    for slot, source in (("ART", build_fluent.ART), ("NAMES", build_fluent.NAMES), ("KEYWORDS", build_fluent.KEYWORDS)):
        digest = hashlib.sha256(made[source.name].read_bytes()).hexdigest()
        monkeypatch.setattr(build_fluent, slot, build_fluent.Package(source.name, source.version, digest, "", "@"))
    monkeypatch.setattr(build_fluent, "SOURCES", (build_fluent.ART, build_fluent.NAMES, build_fluent.KEYWORDS))
    return made


@pytest.mark.parametrize("size", [32, 64])
def test_build(packages: dict[str, Path], tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    build_fluent.build(packages, out, size)
    rows = json.loads((out / "captions.json").read_text())["pictures"]
    assert [(r["codepoints"], r["name"]) for r in rows] == [("2764", "red heart"), ("1f415", "dog")]
    assert rows[1]["keywords"] == ["animal", "best friend"] and rows[0]["keywords"] == ["love"]
    monkeypatch.setattr(data, "captions_file", lambda: {"pictures": rows})
    rgba = data.load_sheet(size, out)
    middle = size // 2
    assert rgba.shape == (2, 4, size, size)
    assert rgba[0, :, middle, middle].tolist() == [255, 0, 0, 255]
    assert rgba[1, :, middle, middle].tolist() == [0, 255, 0, 128], "half-transparent colours must not darken"


def test_build_refuses_another_tarball(packages: dict[str, Path], tmp_path: Path) -> None:
    packages["emojilib"].write_bytes(packages["emojilib"].read_bytes() + b"x")
    with pytest.raises(LimbeckError, match="is not emojilib@4.0.3: SHA-256"):
        build_fluent.build(packages, tmp_path / "out")
    with pytest.raises(BadInput, match="32, 64"):
        build_fluent.build(packages, tmp_path / "out", 48)


@pytest.mark.parametrize("factor", [2, 4])
def test_space_to_depth_is_exactly_invertible(factor: int) -> None:
    x = torch.randn(2, 3, 16, 24, generator=generator())
    deep = models.space_to_depth(x, factor)
    assert deep.shape == (2, 3 * factor**2, 16 // factor, 24 // factor)
    assert torch.equal(models.depth_to_space(deep, factor), x)
    assert torch.equal(deep[:, 1], x[:, 0, ::factor, 1::factor])


def test_the_teacher_network_is_the_measured_one() -> None:
    unet = models.build_unet()
    assert sum(p.numel() for p in unet.parameters()) == 9_352_524
    states, mask = torch.randn(2, 16, 384, generator=generator()), torch.ones(2, 16, dtype=torch.bool)
    mask[:, 5:] = False
    x, t = torch.randn(2, 3, 32, 32, generator=generator()), torch.tensor([0.1, 0.9])
    with torch.no_grad():
        out = models.flow(unet, x, t, states, mask)
        garbled = states.clone()
        garbled[:, 5:] = 9
        other = models.flow(unet, x, t, garbled, mask)
        changed = models.flow(unet, x, t, -states, mask)
    assert out.shape == x.shape
    assert torch.equal(out, other), "states under the mask were read"
    assert not torch.allclose(out, changed, atol=1e-6)


def test_teacher_folder_round_trip(tmp_path: Path) -> None:
    unet = models.build_unet(channels=(32, 32, 64))
    models.save_teacher(unet, tmp_path, {"step": 7})
    assert next(unet.parameters()).dtype == torch.float32, "saving must not change the net"
    again, meta = models.load_teacher(tmp_path)
    assert meta == {**models.META, "step": 7}
    assert all(torch.equal(a.bfloat16().float(), b) for a, b in zip(unet.parameters(), again.parameters(), strict=True))
    assert {p.name for p in (tmp_path / "unet").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    with pytest.raises(BadInput, match=r"limbeck\.json"):
        models.load_teacher(tmp_path / "unet")


def test_a_recipe_may_draw_a_few_names_alone() -> None:
    from limbeck.domains.image.config import Fluent
    from limbeck.domains.image.slots import FluentPieces

    few = FluentPieces(Fluent(names=3, captions="name"))
    gen = torch.Generator().manual_seed(0)
    assert set(few.prompts(64, gen)) == set(few.set.eval_names[:3])
    assert set(few.batch(64, gen, slice(0, 64)).prompts) == set(few.set.eval_names[:3])
    whole = FluentPieces(Fluent())
    again = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert whole.prompts(64, again[0]) == whole.set.prompts(64, again[1])
