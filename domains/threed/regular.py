"""What scenes should be like whatever they show: the objective `threed.regular`.

Weights are those of the papers beside a distillation loss that is summed over a picture and averaged over views: terms
over pixels or rays are the papers' means, variation is summed over a picture but a mean over a grid. Legend: V views,
R rays, S samples along a ray, H and W pixels, N splats, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.distillation.source import Source, plain
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player, Single
from limbeck.domains.threed import config as settings

SURE = 1e-3  # opacities nearer to 0 or 1 count as this far away
SEEN = 0.5  # opacity from which a ray has a depth
Aux = Mapping[str, Tensor]
Term = Callable[[Aux, Any], Tensor]


def opacity(alpha: Tensor) -> Tensor:
    """Mean of sqrt(alpha^2 + .01) over pixels (DreamFusion, appendix A.4; threestudio's sparsity)."""
    return (alpha.square() + 0.01).sqrt().mean()


def opaque(alpha: Tensor) -> Tensor:
    """Mean binary entropy, in nats, of opacities, which should be 0 or 1 (threestudio); both arguments learn."""
    sure = alpha.clamp(SURE, 1 - SURE)
    return F.binary_cross_entropy(sure, sure)


def orientation(weights: Tensor, facing: Tensor, alpha: Tensor) -> Tensor:
    """Sum of w max(0, n.d)^2, w constant, over rays [R,S], for each pixel that shows something (Ref-NeRF, equation 11).

    `facing` is the cosine of normal and ray: what is positive looks away from the camera that sees it.
    """
    away = (weights.detach() * facing.clamp_min(0).square()).sum()
    return away / (alpha > 0).sum().clamp_min(1)


def distortion(weights: Tensor, places: Tensor, widths: Tensor) -> Tensor:
    """Mean over rays of sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 d_i / 3 (mip-NeRF 360, equation 15), [R,S] each.

    In time linear in S. Deviation: distances are in scene units, not in shares of a ray.
    """
    before = weights.cumsum(1) - weights
    moment = (weights * places).cumsum(1) - weights * places
    between = 2 * (weights * (places * before - moment)).sum(1)
    return (between + (weights.square() * widths).sum(1) / 3).mean()


def variance(weights: Tensor, places: Tensor) -> Tensor:
    """Mean variance of depth along the rays whose opacity is above one half (HiFA, equation 12); 0 where none is.

    Masked before it is divided by: opacities near 0 make it and its gradient NaN else.
    """
    total = weights.sum(1, keepdim=True)
    share = weights / total.clamp_min(SEEN)
    middle = (share * places).sum(1, keepdim=True)
    spread = (share * (places - middle).square()).sum(1)
    shown = (total[:, 0] > SEEN).to(spread)
    return (spread * shown).sum() / shown.sum().clamp_min(1)


def variation(grid: Tensor) -> Tensor:
    """Mean squared difference of neighbours in a grid [F,S,S] or [F,S,S,S], summed over the axes."""
    return torch.stack([grid.diff(dim=axis).square().mean() for axis in range(1, grid.ndim)]).sum()


def picture_variation(picture: Tensor) -> Tensor:
    """Squared differences of neighbours in pictures [V,C,H,W], summed over a picture, mean over views."""
    return (picture.diff(dim=2).square().sum() + picture.diff(dim=3).square().sum()) / len(picture)


def _smooth(aux: Aux, scene: Any) -> Tensor:
    grids: list[Tensor] = scene.body.grids() if hasattr(scene, "body") else []
    if not grids:
        raise BadInput("losses: smooth is for voxels and planes; this scene has none, use smooth_image")
    return torch.stack([variation(grid) for grid in grids]).sum()


def _size(aux: Aux, scene: Any) -> Tensor:
    if not hasattr(scene, "living"):
        raise BadInput("losses: size is for splats; this scene has none")
    mean: Tensor = scene.living()[0].scales.exp().mean()
    return mean


def _laplacian(aux: Aux, scene: Any) -> Tensor:
    if not hasattr(scene, "laplacian"):
        raise BadInput("losses: laplacian is for meshes; this scene has none")
    found: Tensor = scene.laplacian()
    return found


def _read(aux: Aux, *names: str) -> list[Tensor]:
    if missing := [name for name in names if name not in aux]:
        remedy = "set student.oriented: true" if missing == ["facing"] else "it needs a scene that samples rays"
        raise BadInput(f"losses: this scene gives no {missing[0]} to threed.regular; {remedy}")
    return [aux[name] for name in names]


TERMS: dict[str, Term] = {
    "opacity": lambda aux, scene: opacity(aux["alpha"]),
    "opaque": lambda aux, scene: opaque(aux["alpha"]),
    "orientation": lambda aux, scene: orientation(*_read(aux, "weights", "facing", "alpha")),
    "distortion": lambda aux, scene: distortion(*_read(aux, "weights", "places", "widths")),
    "variance": lambda aux, scene: variance(*_read(aux, "weights", "places")),
    "smooth": _smooth,
    "smooth_image": lambda aux, scene: picture_variation(aux["image"]),
    "smooth_depth": lambda aux, scene: picture_variation(aux["depth"]),
    "size": _size,
    "laplacian": _laplacian,
}


class Regular(Single):
    """Weighted terms on the sample that the step's other losses see; a term of weight 0 is not computed."""

    def __init__(self, source: Source, config: settings.Regular, player: Player) -> None:
        super().__init__(player)
        self.source, self.config = source, config

    def terms(self, ctx: Context) -> dict[str, Tensor]:
        """The weighted terms of this step by name; all weights being 0, a zero that has a gradient."""
        sample = self.source.sampled(ctx)
        scene: Any = self.source.student.particle(sample.cond)  # type: ignore[operator]
        weights = {name: ctx.at(getattr(self.config, name)) for name in TERMS}
        found = {name: w * TERMS[name](sample.aux, scene) for name, w in weights.items() if w != 0}
        self._tell(ctx, found, sample.aux)
        return found or {"none": 0 * sample.aux["alpha"].sum()}

    def _tell(self, ctx: Context, found: Mapping[str, Tensor], aux: Aux) -> None:
        """Leaves our own gradient of splats on the screen where densification can subtract it from the whole one."""
        if "screen" not in aux or not found:
            return
        total = torch.stack(list(found.values())).sum() * ctx.at(self.config.weight)
        (slope,) = torch.autograd.grad(total, aux["screen"], retain_graph=True, allow_unused=True)
        if slope is not None:
            others: list[Tensor] = ctx.once("threed.other_screen", list)
            others.append(slope / len(ctx.parts))  # of the mean over parts, as the whole one is


def build(config: settings.Regular, build: Build) -> Regular:
    """Factory of the loss `threed.regular`; it shares the student's player, and so its `optim`, with the others."""
    source = Source.of(build)
    return Regular(source, config, build.player("student", source.student, plain(config.optim)))
