"""What a recipe may say about a distillation loss (torch-free). Numbers that may change with the step are Scheduled.

Each method has its own small class per nested setting, so that overriding one key keeps the method's other defaults.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from limbeck.core.diffusion.config import Edm, ProcessConfig, TimeLaw, Uniform
from limbeck.core.run.config import Average, Betas, Decay, Norm, OptimConfig, OptimKind
from limbeck.core.run.recipe import Student
from limbeck.core.scheduled import Scheduled, within

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
ScheduledShare = Annotated[Scheduled, AfterValidator(within(0, 1))]
ScheduledPositive = Annotated[Scheduled, AfterValidator(within(above=0))]
Reduction = Literal["sum", "mean"]  # over a sample's elements; always a mean over the batch
Space = Literal["eps", "x0", "v", "flow"]
Weighting = Literal["one", "sigma2", "alpha", "alpha2", "snr_trunc", "edm"]
Divergence = Literal["rkl", "kl", "js", "sf", "sh", "jf", "neyman", "pearson"]
FULL = Uniform(lo=0.0, hi=1.0)  # what learns a distribution sees every t; the law clamps to the process's ends


class Config(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Compared(Config):
    """How an answer is compared with what it should be."""

    space: Space | None = None  # what is compared; null: what the net predicts natively
    weighting: Weighting = "one"
    sigma_data: Positive = 0.5  # only for weighting: edm


class Denoising(Compared):
    """Plain denoising regression of the student (or of the teacher, in a recipe without a student)."""

    optim: OptimConfig = OptimConfig()
    time: TimeLaw = FULL
    t_group: Count = 1  # neighbours of a batch that share one t (the views of a scene, the frames of a clip)
    dropout: ScheduledShare = 0.1  # share of conditions replaced by the null condition
    whole_batch: bool = False  # drop the condition of the whole batch or of none


class CriticConfig(Denoising):
    """The net that follows the student's own distribution; trained by denoising on detached samples."""

    kind: Literal["full", "lora", "mlp"] = "lora"  # the teacher copied, LoRA on the shared teacher, a small net
    rank: Count = 64
    alpha: Positive | None = None  # LoRA scale is alpha/rank; null: alpha = rank
    width: Count = 128  # of `mlp`
    depth: Count = 3
    steps_per: Count = 1  # critic updates per step
    warm: Annotated[int, Field(ge=0)] = 0  # critic-only steps before the student moves
    guidance: Scheduled | Literal["same"] | None = None  # in the student's step; null: none; "same": the teacher's


class AdversaryConfig(Config):
    """A classifier head on a denoiser's features: real data against samples, both noised to the same t."""

    features: Literal["critic", "teacher"] = "critic"
    width: Count = 256
    generator: Scheduled = 1e-3  # weight of softplus(-l_fake) in the student's loss
    discriminator: Scheduled = 1e-2  # weight of the head's loss in the critic's
    time: TimeLaw = FULL
    t_group: Count = 1  # neighbours of a batch that share one t (the views of a scene, the frames of a clip)


class RatioConfig(Config):
    """f-distill's weight h(r): r = exp(logit) clamped to [lo, hi], over the running mean of its time bin."""

    divergence: Divergence = "js"
    lo: ScheduledPositive = 0.1
    hi: ScheduledPositive = 20.0
    bins: Count = 10
    rate: ScheduledShare = 0.0  # how much of the old mean is kept when a batch arrives

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not isinstance(self.lo, list) and not isinstance(self.hi, list) and self.lo >= self.hi:
            raise ValueError(f"lo is {self.lo:g}, not below hi, {self.hi:g}: every sample would weigh the same")
        return self


class Matched(Config):
    """What all matching losses share; `optim.every` is the two-time-scale ratio (critic steps per student step)."""

    optim: OptimConfig = OptimConfig(lr=1e-5)
    time: TimeLaw = Uniform(lo=0.02, hi=0.98)
    t_group: Count = 1  # neighbours of a batch that share one t (the views of a scene, the frames of a clip)
    guidance: Scheduled = 1.0  # of the teacher: eps_u + g (eps_c - eps_u)
    critic: CriticConfig = CriticConfig()
    reduction: Reduction = "mean"


class StudentOptim(OptimConfig):
    lr: Scheduled = 1e-6
    ema: Average | None = 0.999


class LoraOptim(OptimConfig):
    lr: Scheduled = 1e-3


class SwiftBrushCritic(CriticConfig):
    optim: LoraOptim = LoraOptim()
    alpha: Positive | None = 108.0
    space: Space | None = "eps"
    weighting: Weighting = "alpha2"
    whole_batch: bool = True
    guidance: Scheduled | Literal["same"] | None = "same"


class SwiftBrush(Matched):
    """VSD with the same guidance on teacher and critic; LoRA critic, eps loss weighted by alpha^2."""

    optim: StudentOptim = StudentOptim()
    guidance: Scheduled = 4.5
    critic: SwiftBrushCritic = SwiftBrushCritic()


class CriticOptim(OptimConfig):
    lr: Scheduled = 1e-5
    weight_decay: Decay = 0.01
    clip: Norm | None = 10.0
    warmup: Annotated[int, Field(ge=0)] = 500


class SlowOptim(CriticOptim):
    every: Count = 5


class FullCritic(CriticConfig):
    kind: Literal["full", "lora", "mlp"] = "full"
    optim: CriticOptim = CriticOptim()
    dropout: ScheduledShare = 0.0


class Dmd2(Matched):
    """DMD's residual, two time scales, a full critic and a GAN head on its features (null: no adversary)."""

    optim: SlowOptim = SlowOptim()
    guidance: Scheduled = 1.75
    critic: FullCritic = FullCritic()
    adversary: AdversaryConfig | None = AdversaryConfig()


class TeacherFeatures(AdversaryConfig):
    features: Literal["teacher"] = "teacher"  # the ratio is read from the teacher's own forward


class FDistill(Dmd2):
    """DMD2 with the residual weighted by h(r); the discriminator reads teacher features."""

    adversary: TeacherFeatures = TeacherFeatures()
    ratio: RatioConfig = RatioConfig()


class SimOptim(OptimConfig):
    kind: OptimKind = "adam"
    lr: Scheduled = 1e-5
    betas: Betas = (0.0, 0.999)


class SimStudentOptim(SimOptim):
    ema: Average | None = 0.999


class SimCritic(CriticConfig):
    kind: Literal["full", "lora", "mlp"] = "full"
    optim: SimOptim = SimOptim()
    dropout: ScheduledShare = 0.0


class Sim(Matched):
    """Score implicit matching: the gradient also flows through the inputs of both nets."""

    optim: SimStudentOptim = SimStudentOptim()
    critic: SimCritic = SimCritic()
    huber: ScheduledPositive = 0.03  # the pseudo-Huber's c is huber * sqrt(numel)
    weighting: Weighting = "one"


class Score(Config):
    """Any operator on any student; a critic is needed by the operators that read one (vsd, dmd)."""

    operator: str = "sds"
    scale: Scheduled | None = None  # nfsd's s, bsd's lambda, auto_bsd's smoothing factor; null: the paper's
    optim: OptimConfig = OptimConfig(lr=1e-3)
    time: TimeLaw = Uniform(lo=0.02, hi=0.98)
    t_group: Count = 1  # neighbours of a batch that share one t (the views of a scene, the frames of a clip)
    guidance: Scheduled = 7.5
    negative: str | None = None  # the unconditional branch's prompt (nfsd: the bad-quality one); null: the teacher's
    shift: Annotated[Scheduled, AfterValidator(within(0, 1, above=0))] = 0.1  # asd: t2 = t + shift (t - t_min) u
    shift_random: bool = True  # u uniform in (0, 1), or 1
    critic: CriticConfig | None = None  # null: the default critic, where the operator reads one
    reduction: Reduction = "sum"


class Refine(Config):
    """Image to image: the student's sample moves to what the teacher makes of it (DreamGaussian's second stage)."""

    optim: OptimConfig = OptimConfig(lr=1e-3)
    time: TimeLaw = Uniform(lo=0.05, hi=0.2)  # how noisy the sample is made; the paper starts 10 to 3 steps of 50 up
    t_group: Count = 1  # neighbours of a batch that share one t (the views of a scene, the frames of a clip)
    steps: Count = 5  # back down
    guidance: Scheduled = 7.5


class Trainable(Config):
    """The teacher itself, to be trained: a full copy, or LoRA on the frozen teacher."""

    lora: Count | Literal["auto"] | None = "auto"  # its rank; null: a full copy; auto: 64 on pipelines, else a copy
    alpha: Positive | None = None  # LoRA's scale is alpha/rank; null: alpha = rank
    targets: list[str] = []  # ends of the names of the layers that LoRA patches; none named: the family's, or all


class FewStepStudent(Trainable):
    """A few-step generator that starts as the teacher itself."""

    times: list[Annotated[float, Field(gt=0, le=1)]] = Field([1.0], min_length=1, max_length=64)  # falling


class ManyStepStudent(Trainable):
    """The teacher with its sampler of many steps, to be tuned."""

    steps: Count = 30
    guidance: Annotated[float, Field(ge=0)] = 3.0
    shift: Positive | None = None  # s of times s u/(1 + (s - 1) u), u uniform; null: the model's own grid


class ConsistencyStudent(Config):
    """A few-step student with the boundary condition of consistency models."""

    of: Student
    scaling: Positive = 1e4  # of t in c_skip and c_out; LCM's 10 an index of 1000, MCM's 4 is 4e3
    sigma_data: Positive = 0.5


class Consistency(Config):
    """Consistency distillation and LCM; the guidance scale is eps_u + g (eps_c - eps_u), LCM's w + 1."""

    optim: OptimConfig = OptimConfig(lr=1e-5)
    intervals: Count = 50  # of the grid; a step of the teacher skips one (LCM: 20 of 1000 indices)
    solver: Literal["ddim", "heun"] = "ddim"
    guidance: Scheduled = 8.0
    guidance_to: Scheduled | None = None  # each sample's scale is drawn between the two, and the student is told it
    huber: ScheduledPositive | None = 1e-3  # c of the pseudo-Huber distance; null: the mean square
    target: Average | None = 0.95  # EMA that says the target; null: the student itself (LCM-LoRA)


class StageOptim(OptimConfig):
    kind: OptimKind = "adam"
    lr: Scheduled = 5e-5
    decay: Literal["constant", "cosine", "linear"] = "linear"


class Progressive(Compared):
    """Progressive distillation: a stage that halves the number of steps of the student it starts from."""

    optim: StageOptim = StageOptim()
    steps: Count = 1  # of the student at the end of the stage
    guidance: Scheduled = 1.0  # of the student it starts from: for the first stage alone
    space: Space | None = "x0"
    weighting: Weighting = "snr_trunc"


class Pairing(Config):
    """How the teacher leads noise to its end: DDIM without noise on its own grid."""

    steps: Count = 25
    guidance: Scheduled = 3.0


class Reflow(Compared):
    """Rectified flow again, on pairs of noise and the end to which the teacher's ODE leads it."""

    optim: OptimConfig = OptimConfig(lr=1e-5)
    time: TimeLaw = FULL
    walk: Pairing = Pairing()
    pairs: Count | None = None  # so many (whole batches) are made once and used again; null: fresh ones at each step
    space: Space | None = "flow"


class TrajectorySet(Config):
    """Stored walks of the guided teacher. Two losses that agree in all of this share the set."""

    count: Count = 1024  # walks
    each: Count = 10  # steps of the teacher between two of the student's times
    guidance: Annotated[float, Field(ge=0)] = 3.0
    folder: Annotated[str, Field(min_length=1, max_length=4096)] | None = None  # null: in the run's own folder


class Trajectories(Config):
    """Makes the set, a batch a step."""

    set: TrajectorySet = TrajectorySet()


class HeadOptim(OptimConfig):
    lr: Scheduled = 1e-4


class KeyAdversaryConfig(Config):
    """A head on features of the frozen teacher for each of the student's times; hinge losses."""

    weight: Scheduled = 0.1  # of -D(landed) in the student's loss
    width: Count = 256
    optim: HeadOptim = HeadOptim()


class Trajectory(Compared):
    """AccVideo: the student's steps are the secants of stored walks between its times."""

    set: TrajectorySet = TrajectorySet()
    optim: OptimConfig = OptimConfig(lr=1e-5)
    adversary: KeyAdversaryConfig | None = KeyAdversaryConfig()
    space: Space | None = "flow"


class Ring4Teacher(Config):
    """The exact denoiser of ring4; `labels` makes it conditional on the mode."""

    process: ProcessConfig = Edm(sigma_max=80.0, sigma_min=0.002, rho=7.0)
    labels: bool = False


class Ring4Student(Config):
    """A small net from noise to sample."""

    width: Count = 128
    depth: Count = 3


class Ring4Data(Config):
    """Exact samples of ring4."""


class Ring4Space(Config):
    """Scatter plots of that many points."""

    count: Count = 2000


class EnergyDistance(Config):
    """Energy distance and mode shares on that many samples."""

    count: Count = 4000
