"""Measures of clips x [B,3,F,H,W] in [-1,1], from known formulas; no number is VBench's or FVD's.

VBench (Huang et al. 2023, arXiv 2311.17982) judges with DINO, CLIP, AMT and RAFT. Here features come from a net that
the caller gives and names, motion from OpenCV, and smoothness from neighbours. A frozen clip has the best flicker,
smoothness and consistency there is: read them only beside the dynamic degree. Legend: B clips, F frames, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.pictures import to_bytes
from limbeck.core.run.errors import BadInput
from limbeck.domains.video.shapes import DIRECTIONS

Features = Callable[[Tensor], Tensor]  # pictures [N,3,H,W] in [-1,1] -> [N,D]
SIDE = 128  # pixels: smaller clips are enlarged to it before the flow is taken, whose patches have 8
DISPLACED = 6 / 256  # of the shorter side: the threshold of VBench's dynamic degree
SAMPLED = 8.0  # frames a second that this threshold is meant for
BORDER = 1 / 8  # of a side
STRONGEST = 0.05  # of the pixels
PAIRS = 4 / 16  # of the frames: so many pairs must move
LEAST = 0.25  # pixels a frame, below which a shape counts as at rest


def frames(x: Tensor) -> Tensor:
    """Clips [B,3,F,H,W] as pictures [B*F,3,H,W], the frames of a clip one after another."""
    return x.transpose(1, 2).flatten(0, 1)


def several(x: Tensor, least: int) -> None:
    """BadInput where clips have fewer frames than a measure needs."""
    if x.shape[2] < least:
        raise BadInput(f"this measure needs clips of {least} frames or more, not {x.shape[2]}")


def levels(x: Tensor) -> Tensor:
    """Clips as the values 0 to 255 that a file would hold, float32."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round()


def features_of(x: Tensor, features: Features) -> Tensor:
    """[B,F,D] of each frame."""
    return features(frames(x)).view(x.shape[0], x.shape[2], -1)


def consistency(found: Tensor) -> Tensor:
    """How alike frames are to the one before and to the first, by features [B,F,D]: VBench's formula, [B] in [0,1]."""
    unit = F.normalize(found.float(), dim=-1)
    before = (unit[:, 1:] * unit[:, :-1]).sum(-1).clamp(min=0)
    first = (unit[:, 1:] * unit[:, :1]).sum(-1).clamp(min=0)
    return (before + first).mean(1) / 2


def border(x: Tensor) -> Tensor:
    """Clips whose middle is filled with the mean of each frame's border: hardly more than their background is left."""
    height, width = x.shape[-2:]
    top, left = round(BORDER * height), round(BORDER * width)
    outside = torch.ones(height, width, dtype=x.dtype, device=x.device)
    outside[top : height - top, left : width - left] = 0
    mean = (x * outside).sum((-2, -1), keepdim=True) / outside.sum()
    return x * outside + mean * (1 - outside)


def subject_consistency(x: Tensor, features: Features) -> Tensor:
    """Consistency [B] of whole frames; VBench's with DINO."""
    return consistency(features_of(x, features))


def background_consistency(x: Tensor, features: Features) -> Tensor:
    """Consistency [B] of the frames' borders. Deviation: VBench has CLIP see whole frames; one net needs two views."""
    return consistency(features_of(border(x), features))


def flicker(x: Tensor) -> Tensor:
    """VBench's temporal flickering [B]: 1 - mean |x_{i+1} - x_i| / 255; 1 where nothing moves, .667 for pure noise."""
    several(x, 2)
    return 1 - levels(x).diff(dim=2).abs().flatten(1).mean(1) / 255


def neighbour_smoothness(x: Tensor) -> Tensor:
    """1 - mean |x_i - (x_{i-1} + x_{i+1}) / 2| / 255 [B] over the odd frames that have both neighbours.

    A proxy of VBench's motion smoothness, whose frames between come from AMT-S: a mean of neighbours cannot follow fast
    motion, so that it falls with speed as well as with jerks.
    """
    several(x, 3)
    value = levels(x)
    odd = value[:, :, 1:-1:2]
    between = (value[:, :, :-2:2] + value[:, :, 2::2]) / 2
    return 1 - (odd - between).abs().flatten(1).mean(1) / 255


def displacement(x: Tensor) -> Tensor:
    """How far the fastest 5% of the pixels go between two frames, in pixels [B,F-1], by OpenCV's DIS flow (CPU)."""
    several(x, 2)
    return torch.stack([_displacement(clip) for clip in x])


def _displacement(clip: Tensor) -> Tensor:
    try:
        import cv2
    except ImportError:
        raise BadInput("motion is measured with OpenCV: run `pip install 'limbeck[video]'`") from None
    factor = max(1, -(-SIDE // min(clip.shape[-2:])))
    large = F.interpolate(clip.transpose(0, 1).float(), scale_factor=factor, mode="bicubic")
    grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in to_bytes(large).numpy()]
    flow: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = [torch.from_numpy(flow.calc(one, two, None)) for one, two in zip(grey, grey[1:], strict=False)]
    speed = torch.stack(pairs).norm(dim=-1).flatten(1) / factor
    fastest: Tensor = speed.topk(max(1, int(STRONGEST * speed.shape[1])), dim=1).values
    return fastest.mean(1)


def moving(displaced: Tensor, fps: Tensor, side: int) -> Tensor:
    """Which clips move, bool [B]: VBench's rule on displacements [B,F-1] of clips with `side` pixels at rates [B].

    At least a quarter as many pairs as there are frames go further than 6/256 of the side. Deviation: VBench takes
    every n-th frame to come near 8 a second; short clips keep all, and the threshold is that of their own rate.
    """
    least = DISPLACED * side * SAMPLED / fps.to(displaced)
    return (displaced > least[:, None]).sum(1) >= round(PAIRS * (displaced.shape[1] + 1))


def dynamic_degree(x: Tensor, fps: Tensor) -> float:
    """Share of clips that move, of clips at frame rates [B]."""
    return float(moving(displacement(x), fps, min(x.shape[-2:])).float().mean())


def sharpness(x: Tensor) -> Tensor:
    """Mean |gradient| [B] over the pixels and frames, in units of [-1,1] a pixel."""
    across, down = x.float().diff(dim=-1).abs(), x.float().diff(dim=-2).abs()
    return across.flatten(1).mean(1) + down.flatten(1).mean(1)


def velocities(x: Tensor) -> Tensor:
    """Velocity [B,2] in pixels a frame (right, down) of the one thing that differs from a clip's ground.

    The slope of its centroid over time by least squares. Pixels count by their squared distance from the frame's median
    colour, less a quarter of the largest, so that a noisy ground does not pull.
    """
    several(x, 2)
    value = x.float()
    ground = value.flatten(3).median(-1).values[..., None, None]
    far = (value - ground).square().sum(1)  # [B,F,H,W]
    mass = (far - far.amax((-2, -1), keepdim=True) / 4).clamp(min=0) + 1e-12
    total = mass.sum((-2, -1))
    down, right = (torch.arange(n, device=x.device) - (n - 1) / 2 for n in x.shape[-2:])
    centre = torch.stack([(mass.sum(-2) * right).sum(-1), (mass.sum(-1) * down).sum(-1)], -1) / total[..., None]
    time = torch.arange(x.shape[2], device=x.device) - (x.shape[2] - 1) / 2
    return (time[:, None] * centre).sum(1) / time.square().sum()


def named_directions(prompts: list[str]) -> Tensor:
    """Unit vectors [B,2] (right, down) of the prompts of moving shapes."""
    return torch.tensor([DIRECTIONS[prompt.split()[-1]] for prompt in prompts])


def direction_accuracy(x: Tensor, prompts: list[str]) -> float:
    """Share of clips that go where their prompts say: of the four ways, theirs is nearest; at rest is wrong."""
    found, wanted = velocities(x).cpu(), named_directions(prompts)
    ways = torch.tensor(list(DIRECTIONS.values()))
    nearest = ways[(found @ ways.T).argmax(1)]
    return float(((nearest == wanted).all(1) & (found.norm(dim=1) >= LEAST)).float().mean())


def changes(x: Tensor) -> Tensor:
    """Half the differences between frames [B,3,F-1,H,W], in [-1,1]: what moves, not what is shown."""
    several(x, 2)
    return x.diff(dim=2) / 2
