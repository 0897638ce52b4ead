"""The embedded clips and the moving shapes: what is committed, how it is built, and what a draw is."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from limbeck.core.captioned import Captioned
from limbeck.core.run.context import Context
from limbeck.core.run.errors import LimbeckError
from limbeck.core.run.packages import Package
from limbeck.core.run.rng import Draws
from limbeck.domains.image.data import captions_file as image_captions
from limbeck.domains.video import build_motion, data, shapes
from limbeck.domains.video.config import Motion, Shapes
from limbeck.domains.video.data import MotionData

PLAIN = Motion(vary=0.0, drift=0.0, patterned=0.0)


@pytest.fixture(scope="module")
def motion() -> MotionData:
    return MotionData(PLAIN)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, data.DRAWS, generator=generator(seed))


def test_the_committed_set(motion: MotionData) -> None:
    names = motion.set.names
    assert len(names) == len(set(names)) == 183
    assert motion.sprites.shape == (183, 49, 4, 32, 32) and motion.sprites.dtype == torch.uint8
    assert 14 <= motion.lengths.min() and motion.lengths.max() == 49
    assert (motion.sprites[:, :, :3] <= motion.sprites[:, :, 3:]).all(), "not premultiplied"
    assert not any("skin tone" in name for name in names)
    notices = (data.FOLDER / "LICENSES.md").read_text()
    assert all(s.sha256 in notices and s.spec in notices for s in build_motion.SOURCES)
    assert sum(f.stat().st_size for f in data.FOLDER.iterdir()) < 6e6


def test_each_committed_clip_moves_and_closes(motion: MotionData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_motion, "CUT", 1.3)  # what is stored was rounded
    for sprites, length in zip(motion.sprites, motion.lengths.tolist(), strict=True):
        clip = sprites[:length].permute(0, 2, 3, 1).numpy()
        assert build_motion.reach(clip) > 0.9 * build_motion.MOVES
        assert build_motion.closes(clip)


def test_a_cut_is_far_from_the_rule(motion: MotionData) -> None:
    """The step back to the first frame is like the others; a clip that is cut short has one that is not."""
    dolphin = motion.sprites[motion.set.index["dolphin"]].permute(0, 2, 3, 1).numpy()
    assert build_motion.closes(dolphin[:36]) and not build_motion.closes(dolphin[4:10])


def test_captions_are_those_of_the_pictures(motion: MotionData) -> None:
    rows = {row["name"]: row for row in image_captions()["pictures"]}
    own = [row for row in data.captions_file() if row["group"] != "Flags"]
    assert len(own) == 178
    for row in own:
        assert {k: v for k, v in row.items() if k != "frames"} == rows[row["name"]]
    assert motion.set.group_captions[motion.set.index["crossed flags"]] == "a flag"


def clip(*places: int, size: int = 32) -> NDArray[np.uint8]:
    """A half-transparent bar that stands at these columns, a frame each, and has a colour of its place."""
    out = np.zeros((len(places), size, size, 4), np.uint8)
    for frame, place in zip(out, places, strict=True):
        frame[8:24, place : place + 8] = (250, 130 + 4 * place, 10, 128)
    return out


def webp(frames: NDArray[np.uint8]) -> bytes:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    first.save(buffer, "webp", save_all=True, append_images=rest, duration=42, loop=0, lossless=True, exact=True)
    return buffer.getvalue()


def tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def premultiplied(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    colour = frames[..., :3].astype(float) * frames[..., 3:] / 255
    return np.concatenate([colour.round().astype(np.uint8), frames[..., 3:]], -1)


SWING = [4, 6, 8, 10, 12, 14, 16, 18, 16, 14, 12, 10, 8, 6]
FILES = {
    "1f415": clip(*SWING),  # a dog
    "1f415-1f3fb": clip(*SWING),  # its skin-tone variant, which has no name of its own
    "1f408": clip(4),  # a picture
    "1f40e": np.concatenate([clip(4, 4), clip(4, 4) // 2 * 2 + 1] * 2)[:, ::-1],  # hardly moves
    "1f404": clip(*range(0, 24, 2)),  # jumps back
    "2764-fe0f": clip(*SWING[1:], SWING[0]),  # a heart, with the variation selector
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The three packages in small."""
    named = {"🐕": "dog", "🐈": "cat", "🐎": "horse", "🐄": "cow", "❤️": "red heart"}
    names = {char: {"name": name, "group": "Animals & Nature"} for char, name in named.items()}
    words = {"🐕": ["dog", "animal", ":)", "best_friend"]}
    files = {
        build_motion.ART: {f"assets/{code}.webp": webp(frames) for code, frames in FILES.items()},
        build_motion.NAMES: {"data-by-emoji.json": json.dumps(names).encode()},
        build_motion.KEYWORDS: {"dist/emoji-en-US.json": json.dumps(words).encode()},
    }
    made = {s.name: tarball(tmp_path / f"{i}.tgz", f) for i, (s, f) in enumerate(files.items())}
    pinned = []
    for source in files:
        digest = hashlib.sha256(made[source.name].read_bytes()).hexdigest()
        pinned.append(Package(source.name, source.version, digest, "", "@"))
    monkeypatch.setattr(build_motion, "ART", pinned[0])
    monkeypatch.setattr(build_motion, "SOURCES", tuple(pinned))
    return made


def test_build_keeps_named_loops_that_move(packages: dict[str, Path], tmp_path: Path) -> None:
    build_motion.build(packages, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / data.CAPTIONS).read_text())
    assert [(row["name"], row["frames"]) for row in rows] == [("dog", 7), ("red heart", 7)]
    assert rows[0]["keywords"] == ["animal", "best friend"]
    sprites = data.load_sheet(tmp_path / "out" / data.SHEET)
    assert sprites.shape == (2, 7, 4, 32, 32)
    wanted = build_motion.steadied(premultiplied(FILES["1f415"][::2]))
    assert np.array_equal(sprites[0].permute(0, 2, 3, 1).numpy(), wanted), "every second frame, bit for bit"
    assert sprites[0, 0, :, 16, 8].tolist() == pytest.approx([125, 73, 5, 128], abs=4)


def test_build_refuses_another_tarball_and_an_empty_set(packages: dict[str, Path], tmp_path: Path) -> None:
    other = tarball(tmp_path / "other.tgz", {"dist/emoji-en-US.json": b"{} "})
    with pytest.raises(LimbeckError, match="is not emojilib@4.0.3: SHA-256"):
        build_motion.build({**packages, "emojilib": other}, tmp_path / "out")


def test_rounding_is_within_its_bound_and_holds_noise_back() -> None:
    base = np.random.default_rng(0).integers(0, 200, (1, 32, 32, 4))
    noisy = base + np.random.default_rng(1).integers(-1, 2, (12, 32, 32, 4))
    noisy = np.minimum(np.clip(noisy, 0, 255), np.clip(noisy[..., 3:], 0, 255)).astype(np.uint8)
    found = build_motion.steadied(noisy)
    off = np.abs(found.astype(int) - noisy.astype(int))
    assert off.max() <= build_motion.KEPT + build_motion.STEP // 2
    assert (found[1:] == found[:1]).all(), "noise of one level either way is no motion"
    swing = premultiplied(clip(*SWING))
    moved = build_motion.steadied(swing)
    assert np.abs(moved.astype(int) - swing.astype(int)).max() <= build_motion.KEPT + build_motion.STEP // 2


def test_batch_shapes_range_and_rates(motion: MotionData) -> None:
    state = torch.get_rng_state()
    free = MotionData(Motion(frames=8, patterned=1.0))
    one, two, other = (free.batch(12, generator(seed), slice(0, 12)) for seed in (3, 3, 4))
    assert one.x is not None and two.x is not None and other.x is not None
    assert one.x.shape == (12, 3, 8, 32, 32) and one.x.dtype == torch.float32 and one.x.is_contiguous()
    assert -1 <= one.x.min() and one.x.max() <= 1
    assert set(one.prompts) <= set(free.set.texts()) and set(one.cond["fps"].tolist()) == {4.0, 6.0, 12.0}
    assert torch.equal(one.x, two.x) and one.prompts == two.prompts and not torch.equal(one.x, other.x)
    part = free.batch(12, generator(3), slice(6, 12))
    assert part.x is not None
    torch.testing.assert_close(part.x, one.x[6:], atol=1e-6, rtol=0)
    assert part.prompts == one.prompts[6:] and torch.equal(part.cond["fps"], one.cond["fps"][6:])
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"


def test_a_lower_rate_shows_the_same_loop_faster(motion: MotionData) -> None:
    indices, u = torch.arange(24), draws(24)
    twelve, six, four = (motion.clips(indices, u, torch.full((24,), rate)) for rate in (12.0, 6.0, 4.0))
    torch.testing.assert_close(six[:, :, :8], twelve[:, :, ::2], atol=1e-6, rtol=0)
    torch.testing.assert_close(four[:, :, :6], twelve[:, :, ::3], atol=1e-6, rtol=0)
    assert (six[:, :, 1] - twelve[:, :, 1]).abs().mean() > 1e-3


def test_windows_start_anywhere_and_loops_go_round(motion: MotionData) -> None:
    shortest = int(motion.lengths.argmin())
    length = int(motion.lengths[shortest])
    u = draws(64)
    x = motion.clips(torch.full((64,), shortest), u, torch.full((64,), 12.0))
    torch.testing.assert_close(x[:, :, length:], x[:, :, : 16 - length], atol=1e-6, rtol=0)
    starts = (u[:, 0] * length).long()
    assert set(starts.tolist()) == set(range(length))
    sprite = motion.sprites[shortest].float() / 255
    alone = x[starts == 5][0, :, 0]
    opaque = sprite[5, 3] == 1
    torch.testing.assert_close((alone[:, opaque] + 1) / 2, sprite[5, :3][:, opaque], atol=1e-5, rtol=0)


def panning(speed: float, angle: float = 0.0) -> Tensor:
    """Draws of a patterned ground that goes at `speed` pixels a second, at `angle` in turns."""
    u = torch.rand(1, 15, generator=generator(2))
    u[:, 6], u[:, 7], u[:, 8], u[:, 14] = angle, speed / data.SPEED, 0.0, 0.0
    return u


@pytest.mark.parametrize(("fps", "pixels"), [(12.0, 1), (4.0, 3)])
def test_a_moving_ground_goes_at_its_velocity_in_seconds(fps: float, pixels: int) -> None:
    seconds = torch.arange(4)[None] / fps
    right, down = (data.ground(panning(12.0, angle), seconds, 32, 1.0, 1.0)[0] for angle in (0.0, 0.25))
    assert right.std() > 0.02
    torch.testing.assert_close(right[1:, ..., pixels:], right[:-1, ..., :-pixels], atol=1e-4, rtol=0)
    torch.testing.assert_close(down[1:, :, pixels:], down[:-1, :, :-pixels], atol=1e-4, rtol=0)
    assert (right[1:, ..., :-pixels] - right[:-1, ..., pixels:]).abs().max() > 0.01, "the other way round"


def test_grounds_know_the_rate_of_their_clip() -> None:
    pan = MotionData(Motion(patterned=1.0, moving=1.0))
    pan.sprites = torch.zeros_like(pan.sprites)
    u, indices = draws(8), torch.arange(8)
    slow, fast = (pan.clips(indices, u, torch.full((8,), fps)) for fps in (4.0, 12.0))
    # mid-clip is time 0: frame j of the slow one is frame 3 j - 15 of the fast one
    torch.testing.assert_close(slow[:, :, 5:11], fast[:, :, ::3], atol=1e-4, rtol=0)
    assert (slow[:, :, 0] - slow[:, :, 1]).abs().mean() > 0.01


def test_still_and_plain_grounds() -> None:
    seconds = torch.arange(4)[None] / 12
    still = data.ground(panning(12.0), seconds, 32, 1.0, 0.0)[0]
    assert torch.equal(still[1:], still[:-1]) and still.std((2, 3)).max() > 0.02
    plain = data.ground(panning(12.0), seconds, 32, 0.0, 1.0)[0]
    assert plain.std((2, 3)).max() < 1e-6


def centroids(alpha: Tensor) -> Tensor:
    """(right, down) [B,F,2] of opacities [B,F,S,S]."""
    place = torch.arange(alpha.shape[-1]) - (alpha.shape[-1] - 1) / 2
    total = alpha.sum((-2, -1))
    across, down = (alpha.sum(-2) * place).sum(-1) / total, (alpha.sum(-1) * place).sum(-1) / total
    return torch.stack([across, down], -1)


def test_a_drifting_sprite_goes_straight_and_stays_inside() -> None:
    hill = (-((torch.arange(32) - 15.5) ** 2) / 32).exp()
    sprites = (hill[:, None] * hill).expand(200, 5, 4, 32, 32)
    u, mirror = draws(200)[:, :7], torch.zeros(200, dtype=torch.bool)
    rest = data.placed(sprites, mirror, u, 1.0, 0.0)
    torch.testing.assert_close(rest[:, 1:], rest[:, :-1], atol=0, rtol=0)
    moved = data.placed(sprites, mirror, u, 1.0, 1.0)
    path = centroids(moved[:, :, 3])
    assert path.diff(n=2, dim=1).abs().max() < 0.01 and path.diff(dim=1).abs().max() > 0.5
    mass = moved[:, :, 3].sum((-2, -1))
    assert (mass / mass[:, :1] - 1).abs().max() < 1e-3, "nothing is cut off"
    some = data.placed(sprites, mirror, u, 1.0, 0.25)
    share = (centroids(some[:, :, 3]).diff(dim=1).norm(dim=-1).amax(1) > 1e-3).float().mean()
    assert abs(share - 0.25) < 0.08


def test_held_out_clips_are_fixed_and_in_order_of_names(motion: MotionData) -> None:
    few = MotionData(Motion(frames=8, patterned=0.0))
    few.set = Captioned(data.captions_file()[:5])
    real, again, floor = few.held(2), few.held(2), few.held(2, "floor")
    assert real.shape == (10, 3, 8, 32, 32)
    assert torch.equal(real, again) and not torch.equal(real, floor)
    assert (few.held(2) - few.of(torch.arange(5).repeat_interleave(2), generator(), 12.0)[0]).abs().max() > 0.1
    x, names, indices = few.reference(12, generator())
    assert len(x) == 12 and set(names) == set(few.set.names) and sorted(indices.bincount().tolist()) == [2, 2, 2, 3, 3]
    assert names == [few.set.names[i] for i in indices.tolist()]


def test_nothing_assumes_the_cpu() -> None:
    """On the meta device every operation between devices is an error."""
    free = MotionData(Motion(frames=8, shapes=0.5), "meta")
    x = free.batch(4, generator(), slice(0, 4)).x
    assert x is not None and x.device.type == "meta" and x.shape == (4, 3, 8, 32, 32)


def test_moving_shapes_can_be_mixed_in() -> None:
    both = MotionData(Motion(frames=8, shapes=0.5))
    found = both.batch(64, generator(1), slice(0, 64))
    assert found.x is not None
    shape = torch.tensor([prompt in shapes.PROMPTS for prompt in found.prompts])
    assert 16 < shape.sum() < 48 and (found.cond["fps"][shape] == 12).all() and (found.cond["fps"] != 12).any()
    alone = both.shapes.draw(64, same_place(both, 64))
    torch.testing.assert_close(found.x[shape], alone.x[shape], atol=0, rtol=0)
    assert [p for p, s in zip(alone.prompts, shape, strict=True) if s] == [
        p for p in found.prompts if p in shapes.PROMPTS
    ]
    prompts = both.prompts(400, generator(2))
    assert abs(sum(p in shapes.PROMPTS for p in prompts) / 400 - 0.5) < 0.1
    assert data.motions().knows("red square moving left") and not data.motions().knows("red square moving home")
    ctx = Context(0, "s", Draws(0, 0, 4), 1, 0, torch.device("cpu"))
    texts, asked = both.ask(ctx, ["dog", "red square moving left", "cat", "white circle moving up"])
    assert texts[0] == "dog" and (asked["fps"][[1, 3]] == 12).all() and asked["fps"].shape == (4,)


def same_place(both: MotionData, n: int) -> torch.Generator:
    """A generator where `batch` has it when shapes are drawn."""
    gen = generator(1)
    indices = torch.randint(len(both.set), (n,), generator=gen)
    both.set.caption(indices, gen, "mixed")
    both.drawn(n, gen)
    torch.rand(n, data.DRAWS, generator=gen)
    return gen


@pytest.mark.parametrize(("frames", "size"), [(8, 16), (16, 32)])
def test_shapes_are_what_their_prompts_say(frames: int, size: int) -> None:
    every = torch.arange(len(shapes.PROMPTS))
    u = torch.rand(len(every), shapes.DRAWS, generator=generator())
    found = shapes.drawn(every, u, frames, size)
    assert found.prompts == list(shapes.PROMPTS) and len(set(found.prompts)) == 72
    grey = shapes.GREY[0] + (shapes.GREY[1] - shapes.GREY[0]) * u[:, 3]
    pixels = (found.x + 1) / 2
    cover = (pixels - grey[:, None, None, None, None]).abs().sum(1)
    path = centroids(cover)
    torch.testing.assert_close(path.diff(dim=1).mean(1), found.velocity, atol=0.06, rtol=0)
    for prompt, velocity, clip, start in zip(found.prompts, found.velocity, pixels, path, strict=True):
        colour, _, _, way = prompt.split()
        assert torch.nn.functional.normalize(velocity, dim=0).tolist() == list(shapes.DIRECTIONS[way])
        column, row = (start[0] + (size - 1) / 2).round().long().tolist()
        torch.testing.assert_close(clip[:, 0, row, column], torch.tensor(shapes.COLOURS[colour]))
    assert (path * (1 - found.velocity.sign().abs())[:, None]).std() > 0.1 * size, "at many heights"
    edges = torch.cat([cover[..., 0, :], cover[..., -1, :], cover[..., 0], cover[..., -1]])
    assert edges.max() < 0.8 and found.velocity.norm(dim=1).min() > 0.3, "inside the frame, and moving"


def test_shapes_have_equal_areas() -> None:
    kind, radius = torch.arange(3), torch.full((3,), 8.0)
    areas = shapes.coverage(torch.zeros(3, 1, 2), kind, radius, 32).sum((1, 2, 3))
    torch.testing.assert_close(areas, torch.full((3,), 64 * torch.pi), rtol=0.03, atol=0)


def test_draws_of_shapes_are_sliced() -> None:
    made = shapes.ShapeData(Shapes(frames=8, size=16))
    whole, part = (made.batch(6, generator(), rows) for rows in (slice(0, 6), slice(3, 6)))
    assert whole.x is not None and part.x is not None
    assert torch.equal(whole.x[3:], part.x) and whole.prompts[3:] == part.prompts
    assert set(made.prompts(50, generator())) <= set(shapes.PROMPTS)
