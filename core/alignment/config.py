"""What a recipe may say about tuning with rewards (torch-free). Numbers that may change with the step are Scheduled."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from limbeck.core.diffusion.config import TimeLaw, Uniform
from limbeck.core.diffusion.config import Walk as Walk
from limbeck.core.distillation.config import Space
from limbeck.core.rewards.config import Judging
from limbeck.core.run.config import OptimConfig
from limbeck.core.scheduled import Scheduled, within

Count = Annotated[int, Field(ge=1)]
Share = Annotated[Scheduled, AfterValidator(within(0, 1))]
Positive = Annotated[Scheduled, AfterValidator(within(above=0))]
NotNegative = Annotated[Scheduled, AfterValidator(within(0))]


class Config(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class OwnSample(Config):
    """Reward of the student's own sample (few-step students), with its gradient."""

    optim: OptimConfig = OptimConfig(lr=1e-5)
    normalise: bool = False  # R0: each reward's gradient on the sample is divided by its own norm
    judge: Judging = Judging()


class Anchor(Config):
    """Holds the student's weights to those it started from: |theta - theta_0|^2/2, summed over all of them."""

    optim: OptimConfig = OptimConfig(lr=1e-5)


class Tuned(Config):
    """What every method shares that tunes a sampler of many steps."""

    optim: OptimConfig = OptimConfig(lr=1e-4)
    walk: Walk = Walk()
    judge: Judging = Judging()


class Edit(Config):
    """The walk starts from data made noisy, not from noise, and is as much shorter (InstructVideo)."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.6  # of the walk's steps, rounded, that are taken
    offset: Annotated[float, Field(ge=0)] = 0.1  # deviation of more noise that is one number a channel of each picture


class Draft(Tuned):
    """DRaFT-K; with `noises` > 1 DRaFT-LV: the last step is taken again from that many noisings of the sample."""

    last: Count = 1  # steps with gradient
    noises: Count = 1
    edit: Edit | None = None  # null: walks start from noise
    kl: NotNegative = 0.0  # weight of the path KL to the reference, over the steps with gradient


class AlignProp(Tuned):
    """Randomised truncation: the number of steps with gradient is drawn anew, round N(mean, std) within [1, steps]."""

    mean: Positive = 8.0
    std: NotNegative = 5.0
    kl: NotNegative = 0.0


class Refl(Tuned):
    """One step with gradient at a random place near the end, judged by its predicted x0."""

    lo: Share = 0.75  # the share of the walk already done, at least
    hi: Share = 0.975


class TokenWalk(Walk):
    """On tokens; without guidance unless a recipe asks for it."""

    steps: Count = 128
    guidance: NotNegative = 1.0


class Drakes(Tuned):
    """DRAKES: hard draws, then Gumbel-soft ones whose gradient reaches the student.

    `kl` is in nats of the walk's law; that of the authors' code is another quantity, so its numbers do not carry over.
    Words of soft walks score otherwise than those of hard draws: on toy words 1.75 against 1.00 with all 16 steps soft,
    1.80 against 1.83 with the last 6. Metrics draw hard; the rewards logged in training and their stop do not.
    """

    walk: TokenWalk = TokenWalk()
    last: Count = 50  # steps that are soft and have a gradient
    tau: Positive = 1.0  # temperature of the soft draws; the lower, the nearer to hard ones and the noisier
    kl: NotNegative = 0.03  # price of a nat of path KL to the reference
    kl_steps: Literal["last", "all"] = "last"  # the steps it is summed over: the soft ones, or the hard ones too
    kl_through: bool = False  # its gradient also runs through what the reference says of soft states
    remat: bool = True  # activations are computed again in the backward pass: memory for one step, more time


class Policy(Tuned):
    """What methods share that read log-probabilities of stored trajectories; rewards need no gradient."""

    per_prompt: Count = 2  # neighbours of a batch that share a prompt
    inner: Count = 1  # updates on one batch of trajectories


class Ddpo(Policy):
    """Clipped policy gradient with advantages per prompt; log-probabilities are means over dimensions."""

    optim: OptimConfig = OptimConfig(lr=3e-4)
    clip: Positive = 1e-4
    limit: Positive = 5.0  # of an advantage
    buffer: Count = 32  # rewards remembered for each prompt
    fewest: Count = 16  # below this many, the batch's own mean and deviation are used


class Reinforce(Policy):
    """Policy gradient on r - beta (log p - log p_ref)."""

    beta: Positive = 0.1


class Prdp(Policy):
    """Reward differences of pairs that share a prompt; null clip: plain regression."""

    beta: Positive = 0.1
    clip: Positive | None = None


class D3po(Policy):
    """DPO on every step of pairs of trajectories, ranked by the reward; log-probabilities are means over dimensions."""

    optim: OptimConfig = OptimConfig(lr=3e-5)
    beta: Positive = 0.1
    clip: Positive = 0.1


class Rwr(Policy):
    """Reward-weighted regression: denoising on the model's own samples, weighted by exp(r/temperature)."""

    temperature: Positive = 1.0


class DpoOptim(OptimConfig):
    """The authors' rate of 1e-8 a sample at their batch of 2048."""

    lr: Scheduled = 2e-5
    warmup: Annotated[int, Field(ge=0)] = 500


class DiffusionDpo(Config):
    """DPO on the denoising errors of pairs from data, at the same t and noise for winner and loser."""

    optim: DpoOptim = DpoOptim()
    beta: Positive = 5000.0  # the authors' for SDXL; 2000 for Stable Diffusion 1.5
    time: TimeLaw = Uniform(lo=0.0, hi=1.0)
    t_group: Count = 1  # neighbours of a batch that share one t
    space: Space = "eps"  # of the errors; flow models are tuned in flow
