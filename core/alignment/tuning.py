"""What the reward methods share: a student under its sampler, the frozen reference, rewards and their judge."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.core.alignment.config import Config, Edit, Walk
from limbeck.core.diffusion.denoiser import Denoiser, Encoded
from limbeck.core.diffusion.draws import Shared
from limbeck.core.diffusion.guidance import guided_by, with_scale
from limbeck.core.diffusion.sampling import Kernel, usual
from limbeck.core.distillation.source import Source, plain
from limbeck.core.rewards.base import Condition
from limbeck.core.rewards.panel import Judge, Panel
from limbeck.core.run.build import Build
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player


@dataclass
class Tuning:
    """One student under training with rewards."""

    source: Source
    trained: Panel
    judge: Judge
    player: Player

    @classmethod
    def of(cls, config: Config, optim: OptimConfig, build: Build) -> Tuning:
        """The recipe's teacher, student, data and rewards; the teacher is the reference."""
        source = Source.of(build)
        judge = Judge(config.judge, Panel.of(build, "held_out"))  # type: ignore[attr-defined]
        player = build.player("student", source.student, plain(optim))
        return cls(source, Panel.of(build, "train"), judge, player)

    @property
    def student(self) -> Denoiser:
        """The student as a denoiser."""
        found = getattr(self.source.student, "denoiser", None)
        if not isinstance(found, Denoiser):
            raise BadInput("this loss tunes a denoiser, and the student is none; use the loss reward")
        return found

    @property
    def reference(self) -> Denoiser:
        """The teacher: what the student was before."""
        return self.source.model.denoiser

    def begin(self, ctx: Context, walk: Walk, per_prompt: int = 1) -> tuple[Tensor, Encoded, Condition]:
        """The first state x [b,*S], the encoded condition and the raw one; `per_prompt` neighbours share a prompt."""
        if ctx.batch % per_prompt:
            raise BadInput(f"{ctx.batch} samples a process are no whole groups of per_prompt: {per_prompt}")
        model = self.source.model
        prompts = [p for p in self.source.prompts(ctx, per_prompt) for _ in range(per_prompt)]
        cond = with_scale(model.encode(prompts), ctx.at(walk.guidance))
        noise = ctx.draws.normal("tuning.noise", tuple(model.shape))
        t = self.times(walk)[0].expand(len(noise)).to(noise.device)
        return model.begin(noise, t, cond), cond, {"prompt": prompts}

    def edited(self, ctx: Context, walk: Walk, edit: Edit, t: Tensor) -> tuple[Tensor, Encoded, Condition]:
        """The same from data: x_t of this step's data at t (one number), its condition and its prompts.

        InstructVideo's noise: standard normal plus `offset` times noise that all pixels of a channel of one picture or
        frame share.
        """
        x0, cond = self.source.real(ctx)
        shape = tuple(x0.shape[1:])
        noise = ctx.draws.normal("tuning.noise", shape)
        if edit.offset:
            noise = noise + edit.offset * ctx.draws.normal("tuning.offset", (*shape[:-2], 1, 1))
        x = self.source.model.denoiser.process.add_noise(x0, noise.to(x0), t.expand(len(x0)).to(x0.device))
        batch = self.source.batch(ctx)
        assert batch is not None
        return x, with_scale(cond, ctx.at(walk.guidance)), {"prompt": batch.prompts}

    def guided(self, ctx: Context, denoiser: Denoiser, walk: Walk) -> Denoiser:
        """Classifier-free guidance at this step's scale; both branches carry a gradient."""
        return guided_by(denoiser, self.source.null, ctx.at(walk.guidance))

    def kernel(self, ctx: Context, walk: Walk) -> Kernel:
        """The model's usual one, DDIM with this step's eta and floor.

        A floor gives the last step a density whose gradient, one over a tiny deviation, drowns all others' on pictures.
        """
        return usual(self.source.model, ctx.at(walk.eta), ctx.at(walk.floor))

    def gen(self, ctx: Context) -> Shared:
        """Draws of the walk's steps: of the whole batch, so that they do not depend on the number of processes."""
        return Shared(ctx.draws.gen("tuning.walk"), ctx.global_batch, ctx.draws.rows)

    def times(self, walk: Walk) -> Tensor:
        """The model's own grid [K+1]."""
        return self.source.model.grid(walk.steps)

    def score(self, ctx: Context, x: Tensor, cond: Condition) -> Tensor:
        """The weighted trained reward [b] of samples x [b,*S], with its gradient; the judge takes note."""
        reward = self.trained.total(ctx, x, cond, ctx.draws.gen("reward"))
        self.judge.observe(ctx, x, cond, reward)
        return reward
