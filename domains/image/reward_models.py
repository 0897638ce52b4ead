"""Rewards by published models on pictures [B,3,H,W] in [-1,1]: CLIP score, PickScore, HPSv2, LAION's aesthetic head.

Each needs `model:`, a local folder or a hub id; nothing is fetched that a recipe does not name. Text is cond["prompt"].
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from limbeck.core.pipelines.loading import DTYPES
from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean
from limbeck.domains.image import clip as towers
from limbeck.domains.image.config import Aesthetic, ClipModel


def load(config: ClipModel, build: Build) -> towers.Clip:
    """The recipe's CLIP model; it is frozen, so it is held in the precision of the run."""
    return towers.load(config.model, config.processor, build.device, DTYPES[build.recipe.precision])


def logits(config: ClipModel, build: Build) -> Reward:
    """exp(logit_scale) cos: the CLIP score, 100 cos for the released models (not cut at 0, where a gradient would end).

    PickScore (Kirstain et al. 2023, eq. 1) is the same formula on a CLIP-H tuned on preferences.
    """
    net = load(config, build)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return net.scale * net.cosine(x, prompts(cond))

    return Reward(score, "clip", "pixels", differentiable=True, chunk=config.chunk)


def hpsv2(config: ClipModel, build: Build) -> Reward:
    """HPS v2 (Wu et al. 2023) as its tables print it, 100 cos, whatever logit scale is stored.

    The released weights are a pickle of open_clip: give them as a CLIPModel in safetensors. Deviation: their code pads
    pictures that are not square, here the centre is cut out, as by CLIP's own processor.
    """
    net = load(config, build)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return 100 * net.cosine(x, prompts(cond))

    return Reward(score, "hpsv2", "pixels", differentiable=True, chunk=config.chunk)


def aesthetic(config: Aesthetic, build: Build) -> Reward:
    """LAION's aesthetic predictor (Schuhmann et al. 2022) on unit CLIP-L/14 vectors: ratings of 1 to 10."""
    net = load(config, build)
    weight, bias = (part.to(build.device) for part in head(Path(config.head).expanduser()))
    if net.width != len(weight):
        raise BadInput(f"head: it judges vectors of {len(weight)} numbers and {clean(config.model)} gives {net.width}")

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return net.images(x) @ weight + bias

    return Reward(score, "aesthetic", "pixels", differentiable=True, chunk=config.chunk)


def head(path: Path) -> tuple[Tensor, Tensor]:
    """The head's weight [D] and bias []: its linear layers, `layers.N.weight` and `.bias`, multiplied out in float64.

    The published head has dropout between its layers but no activation, so that in use it is one affine map.
    """
    try:
        found = load_file(path)
        names = sorted((int(m[1]), m[0]) for name in found if (m := re.fullmatch(r"layers\.(\d+)\.weight", name)))
        weight, bias = torch.eye(found[names[0][1]].shape[1]).double(), torch.zeros(())
        for _, name in names:
            matrix, shift = found[name].double(), found[name.replace("weight", "bias")].double()
            weight, bias = matrix @ weight, matrix @ bias.expand(matrix.shape[1]).double() + shift
    except (OSError, SafetensorError, IndexError, KeyError, RuntimeError) as error:
        reason = clean(str(error).splitlines()[0], 100) if str(error) else type(error).__name__
        raise BadInput(f"head: {clean(path)} is no safetensors file of linear layers layers.N ({reason})") from None
    if weight.shape[0] != 1:
        raise BadInput(f"head: {clean(path)} ends in {weight.shape[0]} numbers a picture, not in one")
    return weight[0].float(), bias[0].float()


def prompts(cond: Condition) -> list[str]:
    """The prompt of each row."""
    if "prompt" not in cond:
        raise BadInput('this reward compares pictures with text: it needs the condition "prompt", one a picture')
    return list(cond["prompt"])
