"""Measures of an asset's views: do they show the prompt, has it one face, do neighbouring views agree.

Judges are rewards that the recipe names, and so are their numbers: those of two judges are not comparable. Legend: V
views, P prompts, H and W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.core.rewards.base import Reward
from limbeck.domains.threed.cameras import Cameras
from limbeck.domains.threed.known import Known

ALIKE = 25.0  # decibels between front and back from which an object looks alike from both sides
LEVEL = 25.0  # degrees of elevation that they may differ by
OPPOSITE = math.cos(math.radians(175))  # of the angle between two directions of view, seen from above


@torch.no_grad()
def fits(judge: Reward, image: Tensor, prompts: list[str]) -> Tensor:
    """The judge's values [V,P] of every picture [V,3,H,W] with every prompt."""
    return torch.stack([judge(image, {"prompt": [prompt] * len(image)}) for prompt in prompts], 1)


def r_precision(judge: Reward, image: Tensor, prompt: str, prompts: list[str]) -> float:
    """R@1 (DreamFusion, section 4): the share of views that fit their prompt better than any other of `prompts`.

    Of equal values none is the best. Chance is 1/P, P counting the own prompt.
    """
    value = fits(judge, image, [prompt, *(other for other in prompts if other != prompt)])
    return float((value[:, :1] > value[:, 1:]).all(1).float().mean())


def janus(image: Tensor, truth: Known) -> float | None:
    """The share of views from behind that look more like the true view from the other side: 0 one face, 1 two.

    image [V,3,H,W] is what the known object's cameras see. A face on the back may be turned round or mirrored, so the
    true front counts as it is and flipped. None where the object looks alike from both sides (ALIKE). It hardly accuses
    wrongly, and misses second faces of objects whose sides differ little: tables, crates, pots.
    """
    found = []
    for back, front in opposites(truth.cameras):
        own, other = truth.image[back], truth.image[front]
        faces = torch.stack([other, other.flip(-1)])
        if decibels(faces, own).amax() < ALIKE:
            found.append(float(decibels(faces, image[back]).amax() > decibels(own[None], image[back])[0]))
    return sum(found) / len(found) if found else None


def opposites(cameras: Cameras) -> list[tuple[int, int]]:
    """Pairs of a camera behind the object and one on the other side of it at about its elevation."""
    azimuth, elevation = cameras.angles()
    flat = torch.stack([azimuth.cos(), azimuth.sin()], 1)
    across = (flat @ flat.T < OPPOSITE) & ((elevation[:, None] - elevation).abs() < math.radians(LEVEL))
    behind = azimuth.abs() > math.pi / 2
    return [(i, j) for i, j in (across & behind[:, None]).nonzero().tolist()]


def decibels(a: Tensor, b: Tensor) -> Tensor:
    """PSNR [N] of pictures a [N,3,H,W] in [-1, 1] against b [3,H,W]."""
    return -10 * ((a - b) / 2).square().flatten(1).mean(1).clamp_min(1e-12).log10()


def front_words(judge: Reward, image: Tensor, cameras: Cameras, prompt: str) -> tuple[float, float]:
    """How often the judge finds "front view" fitter than "back view", in front of the object and behind it.

    A judge that knows views says often in front and hardly ever behind; often in both is a second face (Janus). A judge
    that does not know views, such as the embedded one, says about as often in both of anything.
    """
    value = fits(judge, image, [f"{prompt}, {view} view" for view in ("front", "back")])
    front, azimuth = value[:, 0] > value[:, 1], cameras.angles()[0].abs()
    near, far = front[azimuth < math.pi / 3], front[azimuth > 2 * math.pi / 3]
    return float(near.float().mean()), float(far.float().mean())


@torch.no_grad()
def between_neighbours(likeness: Reward, image: Tensor) -> float:
    """The mean distance (minus the reward) of neighbouring views [V,3,H,W] of a turntable, the last and first too.

    With LPIPS this is A-LPIPS: lower is steadier, and least for a grey ball, so read it beside a measure of quality.
    """
    return float(-likeness(image, {"image": image.roll(-1, 0)}).mean())
