"""Readers of videos against each other and against a bare PyAV loop: all frames, some of them, and single ones.

python benchmarks/video_io.py            prints a markdown table; exit status 1 when a bar is missed

The clip is written first: moving bands under noise, H.264, a key frame each second. Times are CPU time of the
process with all its threads, medians of interleaved rounds, as shares of what the bare loop takes for all frames.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from limbeck.core.run.rng import generator
from limbeck.domains.video.io import Reader, Video

PACKAGES: dict[Reader, str] = {"pyav": "av", "torchcodec": "torchcodec", "decord": "decord"}
MORE, RANDOM = 1.3, 0.5  # bars for PyAV: all frames against a bare loop, random ones against decoding from the first on
RATE, FEWER = 24, 8  # frames a second of the clip, and those that are read of it


def clip(path: Path, frames: int, height: int, width: int) -> Path:
    """A film of bands that move two pixels a frame, with noise; a key frame each second."""
    gen = generator(0, "video_io", frames)
    shade = torch.linspace(-1, 1, height)[:, None] * torch.tensor([1.0, -0.5, 0.3])[:, None, None]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"g": str(RATE), "bf": "2", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(frames):
            wave = torch.sin((torch.arange(width) + 2 * i) / 19) * shade
            noise = torch.randn(1, height, width, generator=gen)
            pixels = (127.5 + 80 * wave + 6 * noise).clamp(0, 255).byte().permute(1, 2, 0).numpy()
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


def bare(path: Path, wanted: Iterable[int]) -> list[np.ndarray]:
    """Frames by the shortest PyAV loop: from the first on to the last that is wanted, in rising order."""
    found, numbers = [], set(wanted)
    with av.open(str(path)) as file:
        file.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(file.decode(video=0)):
            if number in numbers:
                found.append(frame.to_ndarray(format="rgb24", threads=1))
            if number == max(numbers):
                return found
    return found


def costs(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of CPU time, interleaved; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            found[name] += [time.process_time() - began] if i else []
    return {name: statistics.median(values) for name, values in found.items()}


def tasks(video: Video, some: list[int]) -> dict[str, Callable[[], object]]:
    """What is read, by name."""
    return {
        "all frames": lambda: video.frames(range(len(video.pts))),
        f"{FEWER} a second": lambda: video.frames(video.window(fps=FEWER).tolist()),
        f"{len(some)} random, one call": lambda: video.frames(some),
        f"{len(some)} random, a call each": lambda: [video.frames([number]) for number in some],
    }


def right(video: Video, truth: Tensor, some: list[int]) -> str:
    """How many of the frames, read one by one, are those of the bare loop bit for bit."""
    good = sum(torch.equal(video.frames([number])[0], truth[number]) for number in some)
    return f"{good} of {len(some)}"


def measured(path: Path, count: int, some: list[int], rounds: int) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of every task of every reader that is installed, and how many of the frames are right."""
    truth = torch.from_numpy(np.stack(bare(path, range(count)))).movedim(-1, 1)
    here = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]
    videos = {name: Video.open(path, name) for name in here}
    steps: dict[str, Callable[[], object]] = {
        "bare": lambda: np.stack(bare(path, range(count))),
        "first on": lambda: [bare(path, [number]) for number in some],
        "index": lambda: Video.open(path),
    }
    for name, video in videos.items():
        steps |= {f"{name}, {task}": step for task, step in tasks(video, some).items()}
    return costs(steps, rounds), {name: right(video, truth, some) for name, video in videos.items()}


def table(cost: dict[str, float], exact: dict[str, str]) -> None:
    """Prints a row a task, a column a reader."""
    print(f"| read | {' | '.join(exact)} |\n|---|{'---|' * len(exact)}")
    for task in [name.removeprefix("pyav, ") for name in cost if name.startswith("pyav, ")]:
        shares = [f"{cost[f'{name}, {task}'] / cost['bare']:.2f}" for name in exact]
        print(f"| {task} | {' | '.join(shares)} |")
    print(f"| right frames | {' | '.join(exact.values())} |")


def main(arguments: list[str] | None = None) -> int:
    """The table and what it is measured by; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--size", type=int, nargs=2, default=[180, 320], help="height and width")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--random", type=int, default=12, help="frames that are read in any order")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    some = torch.randint(given.frames, (given.random,), generator=generator(0, "video_io.some", 0)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = clip(Path(folder) / "clip.mp4", given.frames, *given.size)
        cost, exact = measured(path, given.frames, some, given.rounds)
    whole = cost["bare"]
    print(
        f"{given.frames} frames of {given.size[0]} x {given.size[1]}, {1e3 * whole / given.frames:.2f} ms each bare\n"
    )
    table(cost, exact)
    print(
        f"\nbare from the first frame on, a call for each of {given.random}: {cost['first on'] / whole:.2f}; ", end=""
    )
    print(f"finding all frames (the index): {cost['index'] / whole:.3f}\n")
    more, share = cost["pyav, all frames"] / whole, cost[f"pyav, {given.random} random, a call each"] / cost["first on"]
    missed = [f"all frames: {more:.2f} of the bare loop"] if more > MORE else []
    missed += [f"random: {share:.2f} of decoding from the first on"] if share > RANDOM else []
    missed += [
        f"{name}: {found} right" for name, found in exact.items() if found != f"{given.random} of {given.random}"
    ]
    print("pass" if not missed else "missed: " + "; ".join(missed))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
