"""Reading and writing of moving pictures, on files that are made here: each frame shows its own number."""

import importlib.util
import io as bytesio
import itertools
import os
import struct
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from limbeck.core import film
from limbeck.core.run.errors import BadInput
from limbeck.domains.video import io

av = pytest.importorskip("av")
N, H, W = 30, 32, 64
CORPUS: dict[str, tuple[str, dict[str, str]]] = {  # file -> codec and its options
    "plain.mp4": ("libx264", {"g": "12", "bf": "3"}),
    "short-groups.mp4": ("libx264", {"g": "2", "bf": "1"}),
    "open-groups.mp4": ("libx264", {"g": "8", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "short-open-groups.mp4": ("libx264", {"g": "2", "bf": "2", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}),
    "plain.mkv": ("libx264", {"g": "12", "bf": "3"}),
    "plain.ts": ("libx264", {"g": "12", "bf": "3"}),
    "open-groups.ts": ("libx264", {"g": "6", "bf": "7", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}),
    "plain.flv": ("libx264", {"g": "12", "bf": "3"}),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "b": "500k", "deadline": "realtime"}),
    "packed.avi": ("mpeg4", {"g": "12", "bf": "2", "b": "900k"}),
    "old.ts": ("mpeg2video", {"g": "12", "bf": "2", "b": "900k"}),
}  # fmt: skip
MATRICES = {  # of MP4 (a, b, c, d): what becomes of a picture [H,W,3]
    "90": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "270": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "mirrored and turned": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
}


def picture(i: int, h: int = H, w: int = W) -> np.ndarray:
    """The bits of i as dark and light squares, two rows of four."""
    x = np.full((h, w, 3), 40, np.uint8)
    for bit in range(8):
        row, column = divmod(bit, 4)
        if i >> bit & 1:
            x[row * h // 2 : (row + 1) * h // 2, column * w // 4 : (column + 1) * w // 4] = 215
    return x


def number(frame: Tensor) -> int:
    """What `picture` was given, from its frame [3,H,W]."""
    h, w = frame.shape[1:]
    middles = [(frame[:, (2 * (b // 4) + 1) * h // 4, (2 * (b % 4) + 1) * w // 8]) for b in range(8)]
    return sum((float(m.float().mean()) > 128) << b for b, m in enumerate(middles))


def numbers(frames: Tensor) -> list[int]:
    return [number(frame) for frame in frames]


def write(path: Path, codec: str = "libx264", options: dict[str, str] | None = None, count: int = N,
          size: tuple[int, int] = (H, W), pts: Sequence[int] | None = None, pix_fmt: str = "yuv420p",
          container: dict[str, str] | None = None, rate: int = 25) -> Path:  # fmt: skip
    """Frames 0 to count - 1, 25 a second or at these milliseconds."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options={"threads": "1", **(options or {"g": "12", "bf": "3"})})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000) if pts else Fraction(1, rate)
        file.start_encoding()
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame.pts, frame.time_base = pts[i] if pts else i, stream.codec_context.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, (codec, options) in CORPUS.items():
        write(folder / name, codec, options)
    return folder


@pytest.mark.parametrize("name", CORPUS)
def test_every_frame_is_found_by_its_number(corpus: Path, name: str) -> None:
    video = io.Video.open(corpus / name)
    assert (
        torch.allclose(video.times, torch.arange(N).double() / 25, atol=1e-3, rtol=0)
        and abs(video.duration - N / 25) < 2e-3
    )
    every = video.frames(range(N))
    assert every.shape == (N, 3, H, W) and every.dtype == torch.uint8 and numbers(every) == list(range(N))
    for i in range(N):
        assert torch.equal(video.frames([i])[0], every[i])
    for some in ([29, 3, 3, 17, 0], [11, 12, 13], [23, 24], list(range(0, N, 7))):
        assert torch.equal(video.frames(some), every[some])


def test_a_recording_begins_at_its_first_key(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "x.ts").write_bytes((corpus / "plain.ts").read_bytes()[4 * 188 :])  # without the first packets
    video = io.Video.open(tmp_path / "x.ts")
    assert numbers(video.frames(range(len(video.pts)))) == list(range(12, N))


def test_seeks_save_decoding(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned, seen = io._turned, []
    monkeypatch.setattr(io, "_turned", lambda frame: seen.append(frame.pts) or turned(frame))
    video, sought = io.Video.open(corpus / "plain.mp4"), []
    real = io._sought
    monkeypatch.setattr(io, "_sought", lambda f, s, times, wanted: sought.append(times) or real(f, s, times, wanted))
    video.frames([0, 1, 2, 28])
    assert len(seen) == 4 and len(sought) == 1 and sought[0][-1] > video.pts[20]


def test_a_seek_that_goes_too_far_is_tried_again() -> None:
    """Where it lands, frames that are shown before the key come first, without what they are based on."""
    stored = {0: [(0, True), (4, False), (8, True)], 8: [(6, False), (8, True), (10, False)]}
    file = SimpleNamespace(landed=[])
    file.seek = lambda time, stream: file.landed.append(8 if time >= 5 else 0)
    file.decode = lambda stream: (SimpleNamespace(pts=p, key_frame=k) for p, k in stored[file.landed[-1]])
    assert [frame.pts for frame in io._sought(file, None, [0, 5], 6)] == [0, 4, 8] and file.landed == [8, 0]
    assert [frame.pts for frame in io._sought(file, None, [0, 5], 9)] == [8, 10]


def test_variable_frame_rate_is_read_by_time(tmp_path: Path) -> None:
    gaps = np.random.default_rng(0).integers(15, 200, N)
    pts = [0, *np.cumsum(gaps)[:-1].tolist()]
    for ending in ("mp4", "mkv"):
        path = write(tmp_path / f"x.{ending}", pts=pts)
        clip = io.read(path, start=0.5, length=1.0, fps=16)
        true = [max(i for i in range(N) if pts[i] <= 500 + k * 62.5 + 0.5) for k in range(16)]
        assert numbers(clip.frames) == true and len(set(true)) < 16
        assert torch.allclose(clip.times, torch.tensor([pts[i] / 1000 for i in true]).double(), atol=1e-3, rtol=0)
        constant = [round((0.5 + k / 16) * N / (pts[-1] / 1000)) for k in range(16)]  # as if frames came evenly
        assert constant != true
        every = io.read(path, start=0.5, length=1.0)  # the one on show when the window begins, and all that follow
        shown = [i for i in range(N) if pts[i] < 1500 and (pts[i] >= 500 or pts[i + 1] > 500)]
        assert numbers(every.frames) == shown


@pytest.mark.parametrize("ending", ["mp4", "mkv", "flv"])  # clocks of 1/12800 and of 1/1000 seconds
def test_rounded_times_repeat_and_skip_no_frame(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"x.{ending}", rate=24)
    assert numbers(io.read(path, fps=24).frames) == list(range(N))
    assert numbers(io.read(path, start=0.5, fps=8).frames) == [12, 15, 18, 21, 24, 27]
    assert numbers(io.read(path, length=0.25, fps=48).frames) == [i // 2 for i in range(12)]


def test_floats(corpus: Path) -> None:
    clip = io.read(corpus / "plain.mp4", length=0.2)
    pixels = clip.pixels()
    assert pixels.dtype == torch.float32 and -1 <= float(pixels.min()) < -0.6 and 0.6 < float(pixels.max()) <= 1
    assert torch.equal(((pixels + 1) * 127.5).round().byte(), clip.frames)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "ending"), [("libx264", "yuv444p", "mp4"), ("libvpx-vp9", "yuv420p", "webm")]
)
def test_odd_sizes(tmp_path: Path, codec: str, pix_fmt: str, ending: str) -> None:
    path = write(tmp_path / f"x.{ending}", codec, {"b": "500k"}, 5, (33, 45), pix_fmt=pix_fmt)
    found = io.read(path).frames
    assert found.shape == (5, 3, 33, 45) and numbers(found) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", MATRICES)
def test_rotation_flags_are_applied(corpus: Path, tmp_path: Path, name: str) -> None:
    matrix, turn = MATRICES[name]
    path = tmp_path / "turned.mp4"
    path.write_bytes(turned((corpus / "plain.mp4").read_bytes(), matrix))
    plain, found = (io.Video.open(p).frames([19])[0].permute(1, 2, 0).numpy() for p in (corpus / "plain.mp4", path))
    assert np.array_equal(found, turn(plain)) and not np.array_equal(found, plain)


def turned(data: bytes, matrix: Sequence[int]) -> bytes:
    """The MP4 with another display matrix in its track header (version 0)."""
    at = data.index(b"tkhd") + 44
    a, b, c, d = (65536 * value for value in matrix)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def test_edit_lists_cut_both_ends(corpus: Path, tmp_path: Path) -> None:
    data = bytearray((corpus / "plain.mp4").read_bytes())
    at = data.index(b"elst") + 12
    length, start, _ = struct.unpack(">IiI", data[at : at + 12])
    ticks = start // 2  # of a frame: two are stored ahead of the one that is shown first
    data[at : at + 8] = struct.pack(">Ii", length // 3, start + 5 * ticks)
    (tmp_path / "cut.mp4").write_bytes(data)
    video = io.Video.open(tmp_path / "cut.mp4")
    assert numbers(video.frames(range(len(video.pts)))) == list(range(5, 15))
    assert numbers(video.frames([9])) == [14] and float(video.times[0]) == 0 and abs(video.duration - 0.4) < 1e-3


@pytest.mark.parametrize(("name", "disguise"), [("plain.mp4", "x.avi"), ("vp9.webm", "x.txt"), ("plain.flv", "x")])
def test_wrong_extensions_do_not_matter(corpus: Path, tmp_path: Path, name: str, disguise: str) -> None:
    (tmp_path / disguise).write_bytes((corpus / name).read_bytes())
    assert numbers(io.read(tmp_path / disguise, length=0.2).frames) == [0, 1, 2, 3, 4]


def sound(path: Path, cover: bool = False) -> None:
    """A second of silence; with a cover where it is asked for."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        if cover:
            picture_ = file.add_stream("mjpeg", rate=1)
            picture_.width, picture_.height, picture_.pix_fmt = 16, 16, "yuvj420p"
            picture_.disposition = av.stream.Disposition.attached_pic
            file.mux(picture_.encode(av.VideoFrame.from_ndarray(picture(3, 16, 16), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        file.mux([*stream.encode(frame), *stream.encode()])


def bad(folder: Path, kind: str) -> Path:
    """A file that is no readable video."""
    path = folder / "x.mp4"
    whole = write(folder / "whole.mp4", container={"movflags": "+faststart"}).read_bytes()
    late = write(folder / "late.mp4").read_bytes()  # with its index at the end
    still = bytesio.BytesIO()
    Image.fromarray(picture(1)).save(still, "JPEG")
    large = bytesio.BytesIO()
    Image.fromarray(picture(1)).save(large, "GIF")
    made = {
        "half": whole[: len(whole) // 2], "most": whole[: len(whole) * 9 // 10],
        "no index": late[: len(late) * 9 // 10],
        "large": large.getvalue()[:6] + b"\x40\x1f" * 2 + large.getvalue()[10:],
        "empty": b"", "text": b"a cat jumps\n" * 100, "still": still.getvalue(), "noise": bytes(range(256)) * 20,
        "playlist": f"#EXTM3U\n#EXTINF:1,\n{folder}/whole.mp4\n#EXT-X-ENDLIST\n".encode(),
        "concat": f"ffconcat version 1.0\nfile {folder.name}/whole.mp4\n".encode(),
        "damaged": whole[: whole.index(b"mdat") + 900] + bytes(600) + whole[whole.index(b"mdat") + 1500 :],
    }  # fmt: skip
    if kind in made:
        path.write_bytes(made[kind])
    elif kind == "no frames":
        write(path, count=0, codec="mpeg4")
    elif kind in ("sound", "sound with a cover"):
        sound(path, "cover" in kind)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("kind", "message"), [
    ("half", "cut off"), ("most", "cut off"), ("no index", "cannot read it"), ("empty", "cannot read it"),
    ("large", "8000 x 8000 pixels"),
    ("text", "cannot read it"), ("still", "cannot read it"), ("noise", "cannot read it"),
    ("playlist", "cannot read it"), ("concat", "cannot read it"), ("damaged", "cannot be decoded|cannot read it"),
    ("no frames", "no frame|no pictures"), ("sound", "no pictures"), ("sound with a cover", "no pictures"),
    ("pipe", "no such file"), ("folder", "no such file"), ("missing", "no such file"),
])  # fmt: skip
def test_what_is_no_whole_video_gets_one_line(tmp_path: Path, kind: str, message: str) -> None:
    path = bad(tmp_path, kind)
    with pytest.raises(BadInput, match=message) as caught:
        io.read(path)
    assert "\n" not in str(caught.value) and "x.mp4: " in str(caught.value)


def test_no_cut_goes_unseen(corpus: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "whole.mp4", container={"movflags": "+faststart"})
    whole, flv = path.read_bytes(), (corpus / "plain.flv").read_bytes()
    with av.open(str(path)) as file:
        between = [packet.pos for packet in file.demux(video=0) if packet.size]  # where no packet is cut in two
    cuts = [whole[:size] for size in (100, 700, len(whole) - 1, *between)]
    with av.open(str(corpus / "plain.flv")) as file:
        cuts += [flv[: packet.pos + 20 + packet.size // 2] for packet in file.demux(video=0) if packet.size][5:]
    for i, cut in enumerate(cuts):
        (tmp_path / "x").write_bytes(cut)
        with pytest.raises(BadInput, match="cut off|cannot read it|no pictures|no frame"):
            assert io.Video.open(tmp_path / "x").times.shape == i


def test_no_made_up_frame_is_given(tmp_path: Path) -> None:
    """A frame that the decoder leaves out, and one of which a part is missing: FFmpeg makes that up and goes on."""
    path = write(tmp_path / "x.avi", "mpeg4", {"g": "12", "b": "900k"}, 12)
    data = bytearray(path.read_bytes())
    data[packets(path)[6] + 5] &= ~0x20  # the bit that says that the picture is coded
    path.write_bytes(data)
    noise = torch.randint(256, (12, 3, H, W), generator=torch.Generator().manual_seed(0)).byte()
    other = film.write(noise, tmp_path / "x.mp4", 25)
    data, at = bytearray(other.read_bytes()), packets(other)[6] + 400
    data[at : at + 800] = bytes(800)
    other.write_bytes(data)
    for damaged in (path, other):
        video = io.Video.open(damaged)
        assert len(video.frames(range(6))) == 6
        with pytest.raises(BadInput, match="frame 6 cannot be decoded"):
            video.frames(range(12))


def packets(path: Path) -> list[int]:
    """Where the packet of each frame begins."""
    with av.open(str(path)) as file:
        found = sorted((packet.pts, packet.pos) for packet in file.demux(video=0) if packet.size)
    return [pos for _, pos in found]


def test_windows_and_numbers_outside_are_refused(corpus: Path) -> None:
    video = io.Video.open(corpus / "plain.mp4")
    for start, length in ((-0.1, None), (1.2, None), (0.5, 0.8), (0.0, 0.0)):
        with pytest.raises(BadInput, match=r"it has 1.200 s; change start or length"):
            video.window(start, length)
    for wanted in ([], [30], [-1]):
        with pytest.raises(BadInput, match="has frames 0 to 29"):
            video.frames(wanted)


def test_missing_packages_name_their_remedy(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, remedy in (("torchcodec.decoders", "pip install torchcodec"), ("decord", "pip install decord")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(BadInput, match=f"{remedy}`, or use reader: pyav"):
            io.read(corpus / "plain.mp4", reader=name.split(".")[0])  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadInput, match=r"pip install 'limbeck\[video\]'"):
        io.read(corpus / "plain.mp4")


@pytest.mark.parametrize("reader", ["torchcodec", "decord"])
def test_other_readers_agree_or_refuse(corpus: Path, tmp_path: Path, reader: Any) -> None:
    if not importlib.util.find_spec(reader):
        pytest.skip(f"{reader} is not installed")
    refused = []
    (tmp_path / "turned.mp4").write_bytes(turned((corpus / "plain.mp4").read_bytes(), MATRICES["90"][0]))
    vfr = write(tmp_path / "variable.mp4", pts=[i * i * 3 for i in range(N)])
    for path in (*(corpus / name for name in CORPUS), tmp_path / "turned.mp4", vfr):
        video, other = io.Video.open(path), io.Video.open(path, reader)
        for some in (list(range(N)), [17], [29, 2, 2, 16], [9, 10]):
            try:
                assert torch.equal(other.frames(some), video.frames(some)), (path.name, some)
            except BadInput as error:
                assert "use reader: pyav" in str(error)
                refused.append(path.name)
    assert not {"plain.mp4", "short-groups.mp4", "plain.mkv", "vp9.webm", "variable.mp4"} & set(refused)


def blocks(count: int, h: int, w: int) -> Tensor:
    """Clips [count,3,h,w] of four flat colours, which move from frame to frame."""
    colours = torch.tensor([[220, 30, 30], [30, 200, 40], [40, 50, 210], [230, 220, 60]], dtype=torch.uint8)
    which = (torch.arange(h)[:, None] * 2 // h) * 2 + torch.arange(w) * 2 // w
    return torch.stack([colours[(which + i) % 4] for i in range(count)]).movedim(-1, 1)


def inner(frames: Tensor) -> Tensor:
    """The middles of the four blocks [F,3,2,2]."""
    h, w = frames.shape[2:]
    return frames[:, :, [h // 4, 3 * h // 4]][..., [w // 4, 3 * w // 4]].int()


@pytest.mark.parametrize(("h", "w"), [(32, 48), (33, 45)])
def test_mp4_is_what_browsers_play(tmp_path: Path, h: int, w: int) -> None:
    true = blocks(7, h, w)
    path = film.write(true, tmp_path / "x.mp4", 23.976)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(23.976, abs=1e-3)
        tags = stream.codec_context
        assert (tags.colorspace, tags.color_primaries, tags.color_trc, tags.color_range) == (1, 1, 1, 1)
    clip = io.read(path)
    assert clip.frames.shape == (7, 3, h + h % 2, w + w % 2)  # no pixel is lost
    assert (inner(clip.frames[..., :h, :w]) - inner(true)).abs().max() < 6  # by another matrix: 20
    assert torch.allclose(clip.times, torch.arange(7).double() / 23.976, atol=1e-4)
    floats = film.write(true.float() / 127.5 - 1, tmp_path / "y.mp4", 23.976)
    assert floats.read_bytes() == data


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_animations_keep_their_time(tmp_path: Path, ending: str) -> None:
    true = blocks(25, 33, 45)
    path = film.write(true, tmp_path / f"x.{ending}", 24)
    clip = io.read(path)
    assert clip.frames.shape == true.shape and (inner(clip.frames) - inner(true)).abs().max() < 8
    assert (clip.times - torch.arange(25).double() / 24).abs().max() <= 0.005 + 1e-9  # 41 ms a frame: 40 are written
    assert torch.equal(io.read(path, fps=24).times, clip.times)
    with Image.open(path) as image:
        assert image.info["loop"] == 0
    half = tmp_path / f"half.{ending}"
    half.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(BadInput, match=f"half.{ending}: pillow cannot read it"):
        io.read(half)


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_animations_of_others(tmp_path: Path, ending: str) -> None:
    """Their own delays, no delay at all, and what is transparent."""
    clear = [np.dstack([picture(i), np.where(picture(i)[..., 0] > 100, 255, 0).astype(np.uint8)]) for i in range(1, 5)]
    first, *rest = (Image.fromarray(x) for x in clear)
    path = tmp_path / "x.mp4"  # by its first bytes, not by its name
    delays = [40, 0, 200, 60]
    first.save(path, ending, save_all=True, append_images=rest, duration=delays, loop=0, disposal=2, lossless=True)
    clip = io.read(path)
    shown = list(itertools.accumulate([0, 40, 100, 200]))
    assert torch.allclose(clip.times, torch.tensor(shown).double() / 1000, atol=1e-6)
    light = (clip.frames[:, :, 4, [4, 20, 36]] == 255).all(1)
    assert light.tolist() == [[not i >> b & 1 for b in range(3)] for i in range(1, 5)]
    assert torch.equal(io.Video.open(path).frames([3, 1]), clip.frames[[3, 1]])


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    good = blocks(3, 8, 8)
    for pictures, name, fps, message in (
        (good, "x.avi", 24.0, "written as .mp4, .gif or .webp"), (good[:0], "x.mp4", 24.0, "made of pictures"),
        (good[0], "x.gif", 24.0, "made of pictures"), (good, "x.gif", 60.0, "at most 50 pictures a second"),
        (good, "x.mp4", 0.0, "cannot be written"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            film.write(pictures, tmp_path / name, fps)
    assert list(tmp_path.iterdir()) == []
