"""Reads moving pictures: frames by number or by time, from MP4, MOV, MKV, WebM, AVI, TS, FLV, OGG, GIF and WebP.

Which frames a file has and when it shows them is told by its packets, in one pass that decodes nothing; a decoder is
then asked for frames by number, so that all decoders read the same ones. Rotation flags are applied.
Legend: N frames of a file, F frames that are read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.core.run.errors import BadInput, clean

Reader = Literal["pyav", "torchcodec", "decord"]
# Neither playlists, which name other files, nor still pictures; no ASF and MPEG-PS, whose frames have uncertain times.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,flv,ogg"
SHORT, INSTEAD = 20, 100  # milliseconds: a GIF's delay below the one is shown for the other, as in browsers
NEAR = 4  # frames: as few are rather decoded in vain, as a seek throws away what threads have read ahead
LARGEST = 7680 * 4320  # pixels of a GIF or WebP: each of its pictures has the size that its first bytes tell
SLACK = 0.005  # seconds, at most half a tick of the file's clock: by so much may a frame's time be rounded up


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [F,3,H,W] and the times [F] at which the file shows them, float64 seconds from its first frame."""

    frames: Tensor
    times: Tensor

    def pixels(self) -> Tensor:
        """The frames as float32 in [-1,1]."""
        return self.frames.float() / 127.5 - 1


@dataclass(frozen=True)
class Video:
    """A readable file; nothing of it is kept open."""

    path: Path
    format: str  # FFmpeg's name of the container, or Pillow's of the picture
    decoder: str
    pts: Tensor  # int64 [N], rising: when frames are shown, in ticks
    keys: Tensor  # int64 [K,2]: when a frame that decoding can begin at is decoded, and when it is shown (rising)
    end: int  # the tick at which the last frame has been shown
    tick: float  # seconds

    @classmethod
    def open(cls, path: str | Path, reader: Reader = "pyav") -> Video:
        """Finds the frames of a file; BadInput where it has none that can be read."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise BadInput(f"{clean(path)}: there is no such file; check the path")
        with path.open("rb") as file:
            head = file.read(12)
        animation = head[:4] == b"GIF8" or head[:4] + head[8:] == b"RIFFWEBP"
        with _faults(path, "pillow" if animation else "pyav"):
            return _animation(path, head) if animation else _container(path, reader)

    @property
    def times(self) -> Tensor:
        """When each frame is shown [N], float64 seconds from the first on."""
        return (self.pts - self.pts[0]).double() * self.tick

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return (self.end - int(self.pts[0])) * self.tick

    @property
    def slack(self) -> float:
        """Seconds by which the file's clock may show a frame late."""
        return min(0.5 * self.tick, SLACK)

    def at(self, times: Tensor) -> Tensor:
        """The numbers [F] of the frames that are shown at these times, float64 seconds [F]."""
        return (torch.searchsorted(self.times, times + self.slack, right=True) - 1).clamp_min(0)

    def window(self, start: float = 0.0, length: float | None = None, fps: float | None = None) -> Tensor:
        """The numbers of the frames shown from `start` on for `length` seconds: each one, or `fps` of them a second."""
        length = self.duration - start if length is None else length
        if start < 0 or length <= 0 or start + length > self.duration + SLACK:
            asked = f"{length:g} s from {start:g} s on are asked for"
            raise BadInput(f"{clean(self.path)}: {asked}, and it has {self.duration:.3f} s; change start or length")
        count = 1 if fps is None else max(1, math.ceil((length - self.slack) * fps))
        numbers = self.at(start + torch.arange(count, dtype=torch.float64) / (fps or 1))
        if fps is not None:
            return numbers
        past = int(torch.searchsorted(self.times, start + length - self.slack))
        return torch.arange(int(numbers), max(past, int(numbers) + 1))

    def frames(self, numbers: Sequence[int], change: Callable[[Tensor], Tensor] = lambda frame: frame) -> Tensor:
        """Frames [F,...] by their numbers, in any order; `change` is given each as uint8 [3,H,W] when it comes."""
        wanted = sorted(set(numbers))
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(self.pts):
            raise BadInput(f"{clean(self.path)}: has frames 0 to {len(self.pts) - 1}; others are asked for")
        found = {number: change(frame) for number, frame in zip(wanted, self._decoded(wanted), strict=True)}
        if len({frame.shape for frame in found.values()}) > 1:
            raise BadInput(f"{clean(self.path)}: its pictures change their size midway; split or re-encode it")
        # Channels stay the innermost in memory, as decoders give them: transposing costs a third of the decoding.
        return torch.stack([found[number].movedim(0, -1) for number in numbers]).movedim(-1, 1)

    def _decoded(self, numbers: list[int]) -> Iterator[Tensor]:
        with _faults(self.path, self.decoder):
            yield from DECODERS[self.decoder](self, numbers)


def read(
    path: str | Path, start: float = 0.0, length: float | None = None, fps: float | None = None, reader: Reader = "pyav"
) -> Clip:
    """The frames that a file shows from `start` on for `length` seconds (to its end): each one, or `fps` a second."""
    video = Video.open(path, reader)
    numbers = video.window(start, length, fps)
    return Clip(video.frames(numbers.tolist()), video.times[numbers])


def _container(path: Path, reader: Reader) -> Video:
    """The index of a container, from its packets."""
    with _opened(path) as (file, stream):
        packets = [
            (packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, packet.is_discard, packet.is_corrupt)
            for packet in file.demux(stream)
            if packet.size
        ]
        format, tick = file.format.name, float(stream.time_base)
        promised = max((entry.pos + entry.size for entry in stream.index_entries), default=0)  # bytes
    if any(corrupt for *_, corrupt in packets) or promised > path.stat().st_size:
        raise BadInput(f"{clean(path)}: is cut off or damaged; copy it again")
    rows = [(dts if pts is None else pts, pts if dts is None else dts, *more) for pts, dts, *more in packets]
    keys = [(dts, pts) for pts, dts, _, key, *_ in sorted(rows) if key]
    # VP8 keeps pictures that are never shown under the time of the next one; what comes before all keys has no base.
    shown = dict(sorted((row[0], row[2]) for row in rows if keys and row[0] >= keys[0][1] and not row[4]))
    if not shown:
        raise BadInput(f"{clean(path)}: holds no frame that can be decoded; give a video with pictures")
    last = max(shown)
    ticks = torch.tensor(list(shown)), torch.tensor(keys)
    return Video(path, format, reader, *ticks, last + max(shown[last], 1), tick)


def _animation(path: Path, head: bytes) -> Video:
    """The index of a GIF or WebP, whose delays are known once all pictures are decoded."""
    from PIL import Image, ImageSequence

    tick = 10 if head[:4] == b"GIF8" else 1  # milliseconds
    ends = [0]
    with Image.open(path, formats=("GIF", "WEBP")) as image:
        if image.width * image.height > LARGEST:
            raise BadInput(f"{clean(path)}: is {image.width} x {image.height} pixels large; at most 8K is read")
        for picture in ImageSequence.Iterator(image):
            picture.load()
            delay = round(picture.info.get("duration", 0))
            ends.append(ends[-1] + (delay if delay >= SHORT else INSTEAD) // tick)
        format = str(image.format)
    return Video(path, format, "pillow", torch.tensor(ends[:-1]), torch.tensor([[0, 0]]), ends[-1], tick / 1000)


def by_pyav(video: Video, numbers: list[int]) -> Iterator[Tensor]:
    """Frames uint8 [3,H,W] by rising numbers; seeks where that saves decoding, and never trusts where a seek ends."""
    pts, shown = video.pts.tolist(), video.keys[:, 1].contiguous()
    base = torch.searchsorted(shown, video.pts[numbers], right=True)  # how many keys come before each frame
    starts = torch.searchsorted(video.pts, shown)[base - 1].tolist()  # the first frame that the last of them can give
    with _opened(video.path) as (file, stream):
        stream.thread_type = "AUTO"
        flow, ahead = file.decode(stream), 0
        for number, start, keys in zip(numbers, starts, base.tolist(), strict=True):
            if start > ahead + NEAR:
                flow = _sought(file, stream, video.keys[:keys].flatten().tolist(), pts[number])
            frame = next((f for f in flow if f.pts is not None and f.pts >= pts[number]), None)
            if frame is None or frame.pts != pts[number] or frame.is_corrupt:
                raise BadInput(f"{clean(video.path)}: frame {number} cannot be decoded; copy or re-encode the file")
            ahead = number + 1
            yield _turned(frame)


def _sought(file: Any, stream: Any, times: list[int], wanted: int) -> Iterator[Any]:
    """Decoded frames from the latest key on that comes early enough: containers seek by either time, and some too far.

    Frames that are stored behind the key and shown before it lack what they are based on, and are dropped.
    """
    for time in reversed(times):
        file.seek(time, stream=stream)
        flow = file.decode(stream)
        first = next((f for f in flow if f.key_frame and f.pts is not None), None)
        if first is not None and first.pts <= wanted:
            return chain([first], flow)
    return iter(())


def _turned(frame: Any) -> Tensor:
    """The picture uint8 [3,H,W] of a decoded frame, turned and mirrored as its display matrix says."""
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1)).movedim(-1, 0)
    if "DISPLAYMATRIX" not in {side.type.name for side in frame.side_data}:
        return picture
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(frame.side_data["DISPLAYMATRIX"]))
    if abs(b) > abs(a):  # right becomes up or down
        picture, a, d = picture.mT, c, b
    return picture.flip([axis for axis, sign in ((1, d), (2, a)) if sign < 0])


def by_pillow(video: Video, numbers: list[int]) -> Iterator[Tensor]:
    """Frames uint8 [3,H,W] of a GIF or WebP by rising numbers, on white where they are transparent."""
    from PIL import Image

    with Image.open(video.path, formats=("GIF", "WEBP")) as image:
        for number in numbers:
            image.seek(number)
            picture = image.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            flat = Image.alpha_composite(white, picture).convert("RGB")
            yield torch.from_numpy(np.array(flat)).movedim(-1, 0)


def by_torchcodec(video: Video, numbers: list[int]) -> Iterator[Tensor]:
    """The same by torchcodec, which turns frames itself (and takes a mirrored one for one turned by 180 degrees)."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(video.path), seek_mode="exact", num_ffmpeg_threads=0)
    if len(decoder) == len(video.pts):
        found = decoder.get_frames_at(indices=numbers)
        if (found.pts_seconds - video.pts[numbers].double() * video.tick).abs().max() < 0.5 * video.tick:
            yield from found.data
            return
    raise BadInput(f"{clean(video.path)}: torchcodec gives other frames than are asked for; use reader: pyav")


def by_decord(video: Video, numbers: list[int]) -> Iterator[Tensor]:
    """The same by decord, last released in 2021: always from the first frame on, as it lands on wrong ones by seeks."""
    from decord import VideoReader

    decoder, wanted = VideoReader(str(video.path)), set(numbers)
    right = len(decoder) == len(video.pts) and video.format != "mpegts"  # whose frames it gives in a wrong order
    for number in range(numbers[-1] + 1 if right else 0):
        frame = torch.from_numpy(decoder.next().asnumpy())
        right = right and frame.shape[-1] == 3  # 4 where rows are padded, as at a width of 48
        if right and number in wanted:
            yield frame.movedim(-1, 0)
    if not right:
        raise BadInput(f"{clean(video.path)}: decord gives other frames than are asked for; use reader: pyav")


DECODERS: dict[str, Callable[[Video, list[int]], Iterator[Tensor]]] = {
    "pyav": by_pyav, "pillow": by_pillow, "torchcodec": by_torchcodec, "decord": by_decord,
}  # fmt: skip


@contextmanager
def _faults(path: Path, decoder: str) -> Iterator[None]:
    """What a decoder raises as one line."""
    try:
        yield
    except BadInput:
        raise
    except ImportError:
        raise BadInput(f"{decoder} is not installed: run `pip install {decoder}`, or use reader: pyav") from None
    except Exception as error:  # four libraries, each with kinds of its own
        why = clean(getattr(error, "strerror", None) or error or type(error).__name__, 80)
        remedy = "use reader: pyav" if decoder in ("torchcodec", "decord") else "give a whole video, or re-encode it"
        raise BadInput(f"{clean(path)}: {decoder} cannot read it ({why}); {remedy}") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and its first stream of pictures that is no cover; only local files are ever opened."""
    try:
        import av
    except ImportError:
        raise BadInput("videos are read by PyAV: run `pip install 'limbeck[video]'`") from None
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    with av.open(f"file:{path}", options=options) as file:
        streams = [s for s in file.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise BadInput(f"{clean(path)}: has sound at most and no pictures; give a video")
        yield file, streams[0]
