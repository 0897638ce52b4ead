"""InstructVideo's reward (Yuan et al. 2023, arXiv 2312.12490): a reward on pictures, asked of a few frames of a clip.

The walk that it tunes is core's (`draft` with `edit`). Legend: B clips, F frames, S segments, H and W pixels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from limbeck.core.rewards.base import Condition, Reward, as_reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.video import config as settings
from limbeck.domains.video.metrics import frames


def segmental(count: int, frames: int, segments: int, gen: torch.Generator) -> Tensor:
    """A random frame of each of `segments` equal parts of a clip, int64 [count,S] (section 4.2, SegVR).

    Where F is no multiple of S the parts differ by one frame.
    """
    if segments > frames:
        raise BadInput(f"video.frames: {segments} segments of clips of {frames} frames; set segments={frames} or less")
    edges = torch.arange(segments + 1) * frames // segments
    u = torch.rand(count, segments, generator=gen)
    return edges[:-1] + (u * edges.diff()).long()


def attenuation(index: Tensor, frames: int, decay: float) -> Tensor:
    """exp(-decay |i - F//2|) of frames i, any shape, float32 (section 4.2, TAR); the sum is not made one."""
    return torch.exp(-decay * (index - frames // 2).abs())


def of_frames(inner: Reward, segments: int, decay: float) -> Reward:
    """mean_S of weight times reward of one frame a segment; a gradient reaches the frames that were drawn alone.

    Evaluations without a generator see the same frames each time.
    """

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        b, _, count, _, _ = x.shape
        index = segmental(b, count, segments, gen or generator(0, "video.frames", 0))
        places = (index + count * torch.arange(b)[:, None]).flatten().to(x.device)
        repeated = {key: _repeated(rows, segments) for key, rows in cond.items()}
        values = inner(frames(x).index_select(0, places), repeated, gen=gen).view(b, segments)
        return (attenuation(index, count, decay).to(values) * values).mean(1)

    return replace(inner, score=score, name=f"frames of {inner.name}", space="frames", chunk=None)


def _repeated(rows: list[str] | Tensor, times: int) -> list[str] | Tensor:
    """Every row `times` times, one after another."""
    return rows.repeat_interleave(times, 0) if isinstance(rows, Tensor) else [row for row in rows for _ in range(times)]


def build(config: settings.FrameReward, build: Build) -> Reward:
    """Factory of the reward `video.frames`."""
    inner = as_reward(build.part("reward", config.of), config.of.kind)
    if inner.space not in ("pixels", "any"):
        raise BadInput(f"video.frames: {inner.name} judges {inner.space}, not pictures; name a reward on pictures")
    return of_frames(inner, config.segments, config.decay)
