"""Where Gaussians are added and taken away: the objective `threed.density_control`.

"3D Gaussian Splatting" (Kerbl et al. 2023, section 5.2): where the loss pulls at splats on the screen, small ones are
copied and large ones split in two; faint ones go. As in threestudio's splats, the statistics are those of the
distillation gradient alone: what regularisers say of the screen is taken off. Deviations: faint splats go first, so
that their rows are free; rows come from a fixed capacity, for those that are pulled most; opacities are never reset.
Legend: N rows of a scene (its capacity), n living ones, V views.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Generator, Tensor

from limbeck.core.distillation.source import Source, plain
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput, LimbeckError
from limbeck.core.run.players import Phase, Player
from limbeck.domains.threed import config as settings
from limbeck.domains.threed.gaussians import DEAD, PARTS, Gaussians
from limbeck.domains.threed.rasteriser import rotation
from limbeck.domains.threed.scene import SceneStudent

SHRINK = 1.6  # the scales of a split splat's parts are so many times smaller: .8 for each of 2


class Pull:
    """How hard the loss pulls at each row on the screen: sums of norms and the number of views [N] that it was in."""

    def __init__(self, scene: Gaussians) -> None:
        self.total = torch.zeros_like(scene.opacity.detach())
        self.views = torch.zeros_like(self.total)

    def mean(self) -> Tensor:
        """Over views, [N]."""
        return self.total / self.views.clamp_min(1)

    def clear(self) -> None:
        """Start again."""
        self.total.zero_()
        self.views.zero_()


class DensityControl:
    """Gathers what the distillation loss says of splats' places, and every n steps changes the splats."""

    def __init__(self, source: Source, config: settings.DensityControl, player: Player) -> None:
        self.source, self.config, self.player = source, config, player
        self.start, self.end = int(config.start), int(config.end)
        self.players = {player.name: player}
        self.student = cast(SceneStudent, source.student)
        self.scenes = cast(list[Gaussians], list(self.student.scenes))
        self.pulls = [Pull(scene) for scene in self.scenes]

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """A phase of the student without a loss of its own, once statistics count; then, if it is time, the change."""
        done = ctx.step + 1
        if self.start - self.config.every < done <= self.end:
            yield Phase((self.player.name,), dict, partial(self.gather, ctx))
            if done >= self.start and done % self.config.every == 0:
                self.change(ctx)

    def gather(self, ctx: Context) -> None:
        """Add what every part of the batch says."""
        for _ in ctx.each():
            self.add(ctx)

    @torch.no_grad()
    def add(self, ctx: Context) -> None:
        """Add this step's gradient on the screen, per view and with the picture's half side as unit."""
        found = self.source.sampled(ctx)
        screen, rows = found.aux["screen"], found.aux["rows"]
        if screen.grad is None:
            return
        others: list[Tensor] = ctx.once("threed.other_screen", list)
        height, width = found.aux["image"].shape[-2:]
        views = ctx.batch * len(ctx.parts)  # the loss is a mean over them
        unit = screen.new_tensor([width / 2, height / 2]) * views
        norm = ((screen.grad - sum(others)) * unit).norm(dim=2)
        pull = self.pulls[self.scenes.index(cast(Gaussians, self.student.particle(found.cond)))]
        for kept, new in ((pull.total, norm), (pull.views, screen.grad.ne(0).any(2).to(norm))):
            kept += ctx.world * ctx.mean(torch.zeros_like(kept).index_copy(0, rows, new.sum(0)))

    @torch.no_grad()
    def change(self, ctx: Context) -> None:
        """Prune, then copy and split; statistics start again."""
        gen, counts = ctx.whole.gen("threed.density_control"), torch.zeros(4)
        for scene, pull in zip(self.scenes, self.pulls, strict=True):
            faint = prune(scene, self.player, self.config.prune)
            if not scene.alive.any():
                raise LimbeckError(
                    f"step {ctx.step}: all splats had become fainter than {self.config.prune:g}; lower prune, the "
                    "learning rate of opacity, or the weight of losses on it"
                )
            kept = int(scene.alive.sum())
            counts += torch.tensor([kept, len(faint), *grow(scene, self.player, pull.mean(), self.config, gen)])
            pull.clear()
        for name, value in zip(("kept", "pruned", "copied", "split"), counts.tolist(), strict=True):
            ctx.log(f"splats/{name}", value)

    def state(self) -> dict[str, Tensor]:
        """`total/<i>` and `views/<i>` of every scene."""
        return {f"{name}/{i}": getattr(p, name) for i, p in enumerate(self.pulls) for name in ("total", "views")}

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring them back."""
        for key, mine in self.state().items():
            mine.copy_(state[key])


def prune(scene: Gaussians, player: Player, below: float) -> Tensor:
    """Splats of an opacity below this die; their rows."""
    faint = (scene.alive & (scene.opacity.sigmoid() < below)).nonzero()[:, 0]
    scene.opacity[faint] = DEAD
    renewed(scene, player, faint)
    return faint


def grow(
    scene: Gaussians, player: Player, pull: Tensor, config: settings.DensityControl, gen: Generator
) -> tuple[int, int]:
    """Copies small and splits large splats at which the loss pulls [N], as long as rows are free; how many of each.

    A copy keeps its opacity (the reference does not halve it); the parts of a split one are drawn from it, and take its
    row and a free one.
    """
    hot = (scene.alive & (pull >= config.threshold)).nonzero()[:, 0]
    free = (~scene.alive).nonzero()[:, 0]
    hot = hot[pull[hot].argsort(descending=True, stable=True)][: len(free)]
    free = free[: len(hot)]
    for name in PARTS:
        value = getattr(scene, name)
        value[free] = value[hot]
    long = scene.scales[hot].exp().amax(1) > config.large
    parts = torch.cat([hot[long], free[long]])
    scatter(scene, parts, gen)
    renewed(scene, player, torch.cat([free, hot[long]]))
    return int((~long).sum()), int(long.sum())


def scatter(scene: Gaussians, rows: Tensor, gen: Generator) -> None:
    """Move splats to a place drawn from themselves, and shrink them."""
    draw = torch.randn(len(rows), 3, generator=gen).to(scene.means)
    axes = rotation(scene.quats[rows]) * scene.scales[rows].exp()[:, None]
    scene.means[rows] += (axes @ draw[..., None])[..., 0]
    scene.scales[rows] -= torch.tensor(SHRINK).log().to(scene.scales)


def renewed(scene: Gaussians, player: Player, rows: Tensor) -> None:
    """The optimiser forgets these rows, and their average is what they are; all other rows stay as they were."""
    names = {id(p): name for name, p in player.params.items()}
    for part in PARTS:
        p = getattr(scene, part)
        for slot in player.optim.state.get(p, {}).values():
            if isinstance(slot, Tensor) and slot.shape == p.shape:
                slot[rows] = 0
        if player.ema:
            average = player.ema[names[id(p)]]
            average[rows] = p[rows].to(average)


def build(config: settings.DensityControl, build: Build) -> DensityControl:
    """Factory of the loss `threed.density_control`; it shares the student's player, and so its `optim`."""
    source = Source.of(build)
    if not isinstance(source.student, SceneStudent) or not _splats(source.student):
        raise BadInput("threed.density_control is for splats; set student.kind: threed.gaussians or drop this loss")
    if build.stage is None or len(build.stage.losses) < 2:
        raise BadInput("threed.density_control only listens to other losses; add one, such as kind: score")
    control = DensityControl(source, config, build.player("student", source.student, plain(config.optim)))
    if control.end < control.start:
        raise BadInput(f"threed.density_control: end {control.end} is before start {control.start}; swap them")
    return control


def _splats(student: SceneStudent) -> bool:
    return all(isinstance(scene, Gaussians) for scene in student.scenes)
