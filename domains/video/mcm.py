"""MCM: motion from a video teacher by consistency, appearance from a judge of single frames.

Zhai et al. 2024, "Motion Consistency Model" (arXiv 2406.06890) and its code. Deviations: the judge's features are
EfficientNet-lite0's in place of DINO's; a head is a small MLP at every place whose logits are averaged, without
spectral norm, text and gradient penalty (of weight 1e-5). Legend: b local batch, C channels, F frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.compositing import resampling
from limbeck.core.diffusion.codec import Codec
from limbeck.core.diffusion.denoiser import Encoded, Features, tapped
from limbeck.core.diffusion.process import expand
from limbeck.core.distillation.adversarial import Head
from limbeck.core.distillation.consistency import (
    Consistency,
    Leg,
    Shadow,
    continuous,
    distance,
    drawn_scale,
    told,
)
from limbeck.core.distillation.source import Source, plain
from limbeck.core.lite0 import Lite0, resize
from limbeck.core.run.build import Build, Data
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Phase, Player
from limbeck.domains.video import config as settings
from limbeck.domains.video import motion
from limbeck.domains.video.metrics import frames
from limbeck.domains.video.pipelines.codec import ClipCodec

Made = Callable[[str, nn.Module, OptimConfig], Player]
PARTS = 2  # of a clip; the judge sees a frame of each (temporal segment networks)
TAPS = {"blocks.0": 16, "blocks.2": 24, "blocks.4": 40, "blocks.10": 112}  # of lite0: channels at 1/2 to 1/16
DRAWS = 7  # uniform numbers an augmented picture
SHIFT = 1 / 8  # of a side
HOLE = 1 / 2  # of a side


@dataclass(frozen=True)
class Look:
    """One glance at a batch: which frames, and how they are augmented; the same for all that one loss compares."""

    place: Tensor  # [b,PARTS] in [0,1), within each part
    change: Tensor  # [b,PARTS,DRAWS] in [0,1)

    @classmethod
    def drawn(cls, ctx: Context, name: str) -> Look:
        """The glance of this loss in this step."""
        return cls(ctx.draws.uniform(f"{name}.frames", (PARTS,)), ctx.draws.uniform(f"{name}.look", (PARTS, DRAWS)))


def picked(x: Tensor, place: Tensor) -> Tensor:
    """One frame of each of K equal parts of clips [b,C,F,H,W] at places [b,K] within them: clips [b,C,K,H,W]."""
    count, parts = x.shape[2], place.shape[1]
    part = torch.arange(parts, device=x.device)
    index = ((part + place) * count / parts).long().clamp(max=count - 1)  # 1 + the largest place rounds to 2
    rows = (count * torch.arange(len(x), device=x.device)[:, None] + index).flatten()
    return motion.clips(frames(x).index_select(0, rows), len(x))


def augmented(x: Tensor, u: Tensor) -> Tensor:
    """DiffAugment (Zhao et al. 2020): colour, translation by whole pixels, cutout; x [N,3,H,W], u [N,7] in [0,1)."""
    brightness, saturation, contrast = u[:, :3].T[..., None, None, None]
    x = x + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (contrast + 0.5)
    return shifted(x, u[:, 3:5]) * hole(x.shape[-2:], u[:, 5:7])[:, None]


def shifted(x: Tensor, u: Tensor) -> Tensor:
    """x [N,3,H,W] moved by up to an eighth of a side each way, zeros coming in; u [N,2] for down and right."""
    straight = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    down, right = (
        resampling(torch.ones_like(at), ((2 * at - 1) * SHIFT * n).round(), straight, n).to(x.dtype)
        for at, n in zip(u.T, x.shape[-2:], strict=True)
    )
    moved: Tensor = down[:, None] @ x @ right[:, None].mT
    return moved


def hole(shape: tuple[int, ...], u: Tensor) -> Tensor:
    """1 but for a rectangle of half the sides around a place u [N,2], which is 0: [N,H,W]."""
    down, right = (
        (torch.arange(n, device=u.device) + 0.5 - at[:, None] * n).abs() < HOLE * n / 2
        for at, n in zip(u.T, shape, strict=True)
    )
    inside: Tensor = down[:, :, None] & right[:, None]
    return (~inside).float()


class Judge:
    """Hinge losses on logits of augmented frames: lite0's features at four depths, a head that learns."""

    def __init__(self, config: settings.FrameAdversary, net: Lite0, head: Head, codec: Codec) -> None:
        self.config, self.net, self.head, self.codec = config, net, head, codec

    def features(self, pictures: Tensor) -> Features:
        """Frozen, with the gradient to pictures [N,3,H,W] in [-1,1]."""
        with tapped(self.net, tuple(TAPS)) as found:
            self.net(resize(pictures, self.config.size))
        return found

    def pictures(self, clips: Tensor, look: Look) -> Tensor:
        """The look's frames of pixels [b,3,K,H,W], augmented [b*K,3,H,W]; of pictures the first change alone."""
        return augmented(frames(clips), look.change[:, : clips.shape[2]].flatten(0, 1))

    def shown(self, x: Tensor, look: Look) -> Tensor:
        """Logits [b*PARTS] of samples x [b,C,F,H,W]; only the frames looked at are decoded, by themselves.

        An autoencoder whose latent frames stand for several decodes whole clips.
        """
        if isinstance(self.codec, ClipCodec) and not self.codec.framewise:
            return self.logits(picked(self.codec.decode(x), look.place), look)
        return self.logits(self.codec.decode(picked(x, look.place)), look)

    def logits(self, clips: Tensor, look: Look) -> Tensor:
        """Logits [b*K] of pixels [b,3,K,H,W]; positive means real."""
        found: Tensor = self.head(self.features(self.pictures(clips, look)))
        return found

    def fool(self, ctx: Context, x: Tensor) -> Tensor:
        """-weight * mean logit: the gradient reaches the student's x [b,C,F,H,W]."""
        return -ctx.at(self.config.weight) * self.shown(x, Look.drawn(ctx, "mcm.fool")).mean()

    def tell(self, ctx: Context, fake: Tensor, real: Callable[[Look], Tensor]) -> Tensor:
        """mean max(0, 1 + l_fake) + mean max(0, 1 - l_real): the paper's "wgan", which is 2 less; the same glance."""
        look = Look.drawn(ctx, "mcm.tell")
        l_fake, l_real = self.shown(fake.detach(), look), real(look)
        ctx.log("gan/fake", l_fake.mean())
        ctx.log("gan/real", l_real.mean())
        return F.relu(1 + l_fake).mean() + F.relu(1 - l_real).mean()


@dataclass
class Mcm:
    """Consistency and the judge's word train the student (and the map's head); then the judge; then the averages."""

    source: Source
    rule: Consistency
    config: settings.Mcm
    students: list[Player]
    shadows: list[Shadow]
    judge: Judge | None = None
    judging: Player | None = None
    images: Data | None = None

    def __post_init__(self) -> None:
        self.players = {player.name: player for player in (*self.students, self.judging) if player}

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """The paper's order."""
        judge = self.heard(ctx)
        yield Phase(tuple(player.name for player in self.students), lambda: self.student_terms(ctx, judge))
        if judge and self.judging:
            yield Phase(
                (self.judging.name,), lambda: {"hinge": judge.tell(ctx, self.own(ctx)[0], self.real(ctx, judge))}
            )
        for shadow in self.shadows:
            if shadow.player.due(ctx.step):
                shadow.follow(ctx)

    def heard(self, ctx: Context) -> Judge | None:
        """The judge, from its first step on."""
        return self.judge if self.judge and ctx.step >= self.judge.config.start else None

    def student_terms(self, ctx: Context, judge: Judge | None) -> dict[str, Tensor]:
        """Consistency of motion, and -logit of two frames."""
        own, goal = self.own(ctx)
        c = None if self.rule.huber is None else ctx.at(self.rule.huber)
        terms = {"consistency": distance(self.rule.motion(own), goal, c).mean()}
        return terms if judge is None else terms | {"gan": judge.fool(ctx, own)}

    def own(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """What the student says at (x_t, t) [b,C,F,H,W], with its graph, and the map of what it should say."""
        return ctx.once("mcm.own", lambda: self._own(ctx))

    def _own(self, ctx: Context) -> tuple[Tensor, Tensor]:
        scale = drawn_scale(ctx, "mcm", self.rule.guidance, self.rule.guidance_to)
        x0, cond = self.source.real(ctx)
        leg = self.leg(ctx, self.mixed(ctx, x0, told(cond, scale)), cond, scale)
        goal = self.rule.goal(leg)
        return self.rule.student.denoise(leg.x, leg.t, leg.cond).x0, goal

    @torch.no_grad()
    def mixed(self, ctx: Context, x0: Tensor, given: Encoded) -> Tensor:
        """Data x0 [b,C,F,H,W], or in a share of the steps with the judge what the student makes of noise in one step.

        One throw of the dice for all processes.
        """
        throw = torch.rand(1, generator=ctx.draws.gen("mcm.mixed"))
        if self.heard(ctx) is None or throw >= self.config.mixed:
            return x0
        noise = ctx.draws.normal("mcm.mixed.noise", tuple(x0.shape[1:])).to(x0)
        t = self.rule.times[:1].to(noise.device).expand(len(noise))
        x: Tensor = self.rule.student.denoise(self.rule.teacher.process.start(noise, t), t, given).x0
        return x

    @torch.no_grad()
    def leg(self, ctx: Context, x0: Tensor, cond: Encoded, scale: Any) -> Leg:
        """The rule's leg; at the grid's first time x_t is pure noise, as where a sampler starts."""
        i = ctx.draws.integers("mcm.i", len(self.rule.times) - 1)
        grid, process = self.rule.times.to(i.device), self.rule.teacher.process
        eps = ctx.draws.normal("mcm.eps", tuple(x0.shape[1:])).to(x0)
        t, first = grid[i], expand(i == 0, x0)
        x = torch.where(first, process.start(eps, t), process.add_noise(x0, eps, t))
        return self.rule.advanced(x, t, grid[i + 1], cond, scale)

    def real(self, ctx: Context, judge: Judge) -> Callable[[Look], Tensor]:
        """Logits of real frames: of the image set, else of the data, through the codec as the student's are."""
        if self.images is None:
            return lambda look: judge.shown(self.source.real(ctx)[0], look)
        x = self.images.batch(ctx.global_batch, ctx.draws.gen("mcm.images"), ctx.draws.rows).x
        if x is None:
            raise BadInput("adversary.images gives prompts and no pictures; name a data set with pictures or clips")
        clips = (x if x.dim() == 5 else x[:, :, None]).to(ctx.device)
        return lambda look: judge.logits(picked(clips, look.place[:, : clips.shape[2]]), look)

    def state(self) -> dict[str, Tensor]:
        """The averages of the target, under their players' names."""
        return {f"{s.player.name}/{key}": value for s in self.shadows for key, value in s.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring them back."""
        for shadow in self.shadows:
            prefix = f"{shadow.player.name}/"
            shadow.load({key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)})


def lent(shadows: list[Shadow]) -> Callable[[], AbstractContextManager[None]]:
    """All of their weights together."""

    @contextmanager
    def on() -> Iterator[None]:
        with ExitStack() as stack:
            for shadow in shadows:
                stack.enter_context(shadow.on())
            yield

    return on


def judge_of(config: settings.FrameAdversary, codec: Codec, device: torch.device) -> Judge:
    """A fresh head on lite0's features."""
    return Judge(config, Lite0(device=device), Head(list(TAPS.values()), config.width).to(device), codec)


def assembled(config: settings.Mcm, source: Source, make: Made, device: torch.device, images: Data | None) -> Mcm:
    """The objective of these settings: `make` gives the players, `images` the judge's pictures where they are apart."""
    model = source.model
    compared, optim = motion.build(config.motion, tuple(model.shape)), plain(config.optim)
    students = [make("student", source.student, optim)]
    shadows = [] if config.target is None else [Shadow(students[0], config.target)]
    if isinstance(config.motion, settings.LearnedMap) and isinstance(compared, nn.Module):
        students.append(make("motion", compared.to(device), optim))
        shadows.append(Shadow(students[1], config.motion.ema))
    rule = Consistency.of("video.mcm", source, config, lent(shadows), compared)
    if config.adversary is None:
        return Mcm(source, rule, config, students, shadows)
    judge = judge_of(config.adversary, model.codec, device)
    judging = make("judge", judge.head, plain(config.adversary.optim))
    return Mcm(source, rule, config, students, shadows, judge, judging, images)


def build(config: settings.Mcm, build: Build) -> Mcm:
    """Factory of the objective `video.mcm`."""
    apart = config.adversary and config.adversary.images
    images = None if apart is None else build.part("data", apart)
    return assembled(config, continuous(Source.of(build), "video.mcm"), build.player, build.device, images)
