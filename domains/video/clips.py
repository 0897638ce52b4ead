"""The data `video.folder`: a folder's own clips with captions, cut at random times. Legend: B clips, F frames."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from limbeck.core.diffusion.codec import Codec, Identity
from limbeck.core.distillation.shards import hashed
from limbeck.core.run.build import Batch, Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput, clean
from limbeck.core.stored_states import Stored, fingerprint
from limbeck.domains.video import config as settings
from limbeck.domains.video.io import Video

LIST = "captions.jsonl"
KEYS = {"file", "caption"}
PACKAGES = {"pyav": "av"}  # where a decoder's package has another name
ENDINGS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".flv", ".ogv", ".gif", ".webp"}


def fitted(frame: Tensor, height: int, width: int) -> Tensor:
    """The largest middle part of this aspect of a frame uint8 [3,H,W], resized: float32 [3,height,width] in [-1,1]."""
    scale = min(frame.shape[1] / height, frame.shape[2] / width)
    h, w = max(1, round(scale * height)), max(1, round(scale * width))
    top, left = (frame.shape[1] - h) // 2, (frame.shape[2] - w) // 2
    middle = frame[None, :, top : top + h, left : left + w].float()
    small = F.interpolate(middle, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return (small[0] / 127.5 - 1).clamp(-1, 1)


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """The clips of a folder and what each shows: the lines of captions.jsonl, or else the text file beside each."""
    if not folder.is_dir():
        raise BadInput(f"{clean(folder)}: there is no such folder; check data.path")
    found = sorted(_listed(folder) if (folder / LIST).is_file() else _beside(folder))
    if not found:
        raise BadInput(f"{clean(folder)}: holds no clips; put videos into it, each with a .txt of its name")
    return found


def _listed(folder: Path) -> Iterator[tuple[Path, str]]:
    """Lines such as {"file": "cats/1.mp4", "caption": "a cat jumps"}; the files lie in the folder or below."""
    for number, line in enumerate((folder / LIST).read_text("utf-8", "replace").splitlines(), 1):
        try:
            row: Any = json.loads(line) if line.strip() else None
        except ValueError:
            row = line
        if row is None:
            continue
        if not isinstance(row, dict) or row.keys() != KEYS or not all(isinstance(v, str) for v in row.values()):
            raise BadInput(f'{clean(folder / LIST)}:{number}: write {{"file": NAME, "caption": TEXT}}')
        if not (folder / row["file"]).resolve().is_relative_to(folder.resolve()):
            raise BadInput(f"{clean(folder / LIST)}:{number}: the file lies outside of the folder; copy it there")
        yield folder / row["file"], row["caption"]


def _beside(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in folder.rglob("*"):
        if path.suffix.lower() in ENDINGS:
            text = path.with_suffix(".txt")
            if not text.is_file():
                raise BadInput(f"{clean(path)}: has no caption; write it into {clean(text.name)} or {LIST}")
            yield path, " ".join(text.read_text("utf-8", "replace").split())


def decoded(video: Video, numbers: list[int], size: tuple[int, int]) -> Tensor:
    """Frames [3,F,H,W] in [-1,1] of this size."""
    return video.frames(numbers, lambda frame: fitted(frame, *size)).transpose(0, 1)


class Latents:
    """Cuts as latents of a codec, each encoded once for all runs, and alone: no other has a part in its bits."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self.codec, self.device = codec, device
        self.stored = Stored("clips", lambda: fingerprint(codec, decoded, Video))
        self.sums: dict[Path, str] = {}  # of the files

    def of(self, video: Video, numbers: list[int], size: tuple[int, int]) -> Tensor:
        """[*S] on the CPU."""
        if video.path not in self.sums:
            self.sums[video.path] = hashed(video.path)
        decoder = f"{video.decoder} {version(PACKAGES.get(video.decoder, video.decoder))}"
        key = json.dumps([self.sums[video.path], numbers, size, decoder])
        return self.stored.of(key, lambda: {"x": self.encoded(video, numbers, size)})["x"]

    def encoded(self, video: Video, numbers: list[int], size: tuple[int, int]) -> Tensor:
        """The same, made anew."""
        return self.codec.encode(decoded(video, numbers, size)[None].to(self.device))[0]


class Clips:
    """The slot `data`: which clip and where it is cut depends on the step's generator alone; a resume repeats it."""

    def __init__(self, config: settings.Folder, build: Build | None = None) -> None:
        self.config, self.build = config, build
        self.kept: Latents | None = None
        self.span = (config.frames - 1) / config.fps  # seconds from the first frame's time to the last one's
        rows = captioned(Path(config.path).expanduser())
        self.videos = [Video.open(path, config.reader) for path, _ in rows]
        self.captions = [caption for _, caption in rows]
        short = [video for video in self.videos if video.duration <= self.span]
        if short:
            needed = f"{config.frames} frames at {config.fps:g} a second take {self.span:.2f} s"
            first = f"the first, {clean(short[0].path.name, 80)}, has {short[0].duration:.2f} s"
            less = f"{len(short)} of {len(rows)} clips have less ({first})"
            raise BadInput(f"{clean(config.path)}: {needed} and {less}; take them out or lower data.frames")

    def drawn(self, n: int, gen: Generator, rows: slice) -> list[tuple[int, float]]:
        """Which clip, and where in [0,1) it is cut: rows of a batch of n."""
        which = torch.randint(len(self.videos), (n,), generator=gen)[rows].tolist()
        where = torch.rand(n, dtype=torch.float64, generator=gen)[rows]
        if self.config.cuts is not None:
            where = ((where * self.config.cuts).floor() + 0.5) / self.config.cuts
        return list(zip(which, where.tolist(), strict=True))

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """x [b,3,F,H,W] in [-1,1], captions and cond fps [b]: rows of a batch of n; only they are decoded.

        With `cuts`, a teacher of latents is given them [b,*S], encoded once for all runs.
        """
        drawn, latents = self.drawn(n, gen, rows), self.latents()
        cuts = [(self.videos[i], self.numbers(self.videos[i], u)) for i, u in drawn]
        size = self.config.size
        x = torch.stack([latents.of(*cut, size) if latents else decoded(*cut, size) for cut in cuts])
        told = [self.captions[i] for i, _ in drawn]
        fps = torch.full((len(drawn),), self.config.fps)
        return Batch(x, told, {"fps": fps}, encoded=latents is not None)

    def latents(self) -> Latents | None:
        """What keeps them, where cuts come again, the teacher has latents, and its student learns from these clips."""
        if self.config.cuts is None or self.build is None or self.build.piece("data") is not self:
            return None
        codec = self.build.piece("teacher").codec
        if self.kept is None or self.kept.codec is not codec:
            self.kept = Latents(codec, self.build.device)
        return None if isinstance(codec, Identity) else self.kept

    def numbers(self, video: Video, u: float) -> list[int]:
        """Frames of a cut at even times; u in [0,1) says where it begins: from the file's start to the last place."""
        times = u * (video.duration - self.span) + torch.arange(self.config.frames).double() / self.config.fps
        numbers: list[int] = video.at(times).tolist()
        return numbers

    def prompts(self, n: int, gen: Generator, rows: slice = slice(None)) -> list[str]:
        """Captions without clips."""
        return [self.captions[i] for i in torch.randint(len(self.captions), (n,), generator=gen).tolist()][rows]

    def ask(self, ctx: Context, prompts: list[str]) -> tuple[list[str], dict[str, Tensor]]:
        """The frame rate that is asked of each sample: that of the data."""
        return prompts, {"fps": torch.full((len(prompts),), self.config.fps, device=ctx.device)}


def build(config: settings.Folder, build: Build) -> Clips:
    """Factory of the data `video.folder`."""
    return Clips(config, build)
