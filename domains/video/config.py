"""What a recipe may say about clips (torch-free)."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from limbeck.core.distillation.config import Consistency
from limbeck.core.run.config import Average, OptimConfig
from limbeck.core.run.recipe import Reward, Strict, piece
from limbeck.core.scheduled import Scheduled

Name = Annotated[str, Field(min_length=1, max_length=4096)]
Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=8, le=4096)]
Rates = Annotated[list[Literal[4, 6, 12]], Field(min_length=1)]  # frames a second


class Motion(Strict):
    """The embedded captioned clips, each a window of a loop on a random ground."""

    frames: Literal[8, 16] = 16
    fps: Rates = [12, 6, 4]  # drawn for each clip
    captions: Literal["name", "mixed"] = "mixed"  # "mixed": a third at the level of the group or a keyword
    vary: Share = 1.0  # of scale, shift and mirror; 0: sprites stay as they are
    drift: Share = 0.25  # of the clips: the sprite goes to another place in a straight line
    patterned: Share = 0.5  # of the grounds: two colours in waves; the others have one colour
    moving: Share = 0.5  # of the patterned grounds: go at a constant velocity, as under a camera that pans
    shapes: Share = 0.0  # of the clips: a moving shape as in `video.shapes` instead


class Shapes(Strict):
    """One shape that moves in a straight line at 12 frames a second, over a plain ground."""

    frames: Literal[8, 16] = 16
    size: Literal[16, 32, 64] = 32  # pixels


class Folder(Strict):
    """One's own clips with captions; the middle of each picture is cut to the aspect of `size` and resized."""

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    size: tuple[Side, Side] = (32, 32)  # pixels: height, width
    frames: Annotated[int, Field(ge=1, le=1024)] = 16
    fps: Annotated[float, Field(gt=0, le=240)] = 12.0
    reader: Literal["pyav", "torchcodec", "decord"] = "pyav"
    # Only so many places of each clip at which it is cut, evenly spread, so that a teacher of latents encodes each cut
    # once and for all later runs; null: anywhere, encoded anew each time.
    cuts: Annotated[int, Field(ge=1, le=4096)] | None = None


class FreshVideo(Strict):
    """A small text-to-video U-Net: what `video/teacher` trains, from random weights or from a teacher's."""

    frames: Literal[8, 16] = 8
    size: Literal[32, 64] = 32
    channels: Annotated[list[Annotated[int, Field(ge=16, multiple_of=16)]], Field(min_length=2, max_length=5)] = [
        48,
        80,
        128,
    ]
    layers: Annotated[int, Field(ge=1, le=4)] = 1
    start: str | None = None  # an embedded teacher, or a folder in its format, to go on from; all else is then its own


class VideoTeacher(Strict):
    """A frozen text-to-video model: an embedded name, the folder of a diffusers pipeline, or a hub id.

    All but `model` is for pipelines.
    """

    model: Name = "motion-32"
    motion: Name | None = None  # AnimateDiff's motion adapter, where `model` is Stable Diffusion: a folder or a hub id
    size: tuple[Side, Side] | None = None  # pixels: height, width; null: the pipeline's own
    frames: Annotated[int, Field(ge=1, le=1024)] | None = None  # null: the pipeline's own
    guidance: Annotated[float, Field(ge=0)] | None = None  # where it is an input (HunyuanVideo); null: the pipeline's
    slicing: bool = False  # the autoencoder takes one clip at a time
    tiling: bool = False  # ... and large pictures in pieces
    checkpointing: bool = False  # the net's blocks are computed again in the backward pass instead of kept


class Clips(Strict):
    """How clips are shown: the teacher's sampler beside the student's own steps."""

    guidance: Annotated[float, Field(ge=0)] = 3.0  # of the teacher
    steps: Annotated[int, Field(ge=1, le=1000)] = 30  # of the teacher
    fps: Annotated[float, Field(gt=0, le=120)] = 6.0  # asked of the nets, and of the files


class Quality(Strict):
    """The table of a student, its teacher and real clips on all captions."""

    each: Annotated[int, Field(ge=1, le=64)] = 1  # clips of every caption, of each generator
    captions: Annotated[int, Field(ge=2)] | None = None  # only so many; null: all
    teacher_steps: list[Annotated[int, Field(ge=1, le=1000)]] = [4, 30]
    guidance: Annotated[float, Field(ge=0)] = 3.0  # of the teacher
    fps: Annotated[float, Field(gt=0, le=120)] = 6.0
    batch: Annotated[int, Field(ge=1, le=4096)] = 16
    shapes: Annotated[int, Field(ge=0, le=4096)] = 48  # clips of moving shapes, for their directions
    timed: Annotated[int, Field(ge=1, le=256)] = 4  # clips in one batch that is timed
    seed: Annotated[int, Field(ge=0)] = 0


class PlainMap(Strict):
    """Frames, their differences, or how alike every pixel is to every pixel of the next frame."""

    kind: Literal["raw", "diff", "gcor", "sgcor"] = "diff"


class FrequencyMap(Strict):
    """The slow or the fast part of a clip, over time and space together."""

    kind: Literal["freql", "freqh"]
    cutoff: Annotated[float, Field(gt=0)] = 0.25  # of the highest frequency
    order: Annotated[int, Field(ge=1, le=16)] = 4


class LocalMap(Strict):
    """How alike every pixel is to its surroundings in the next frame."""

    kind: Literal["lcor"]
    radius: Annotated[int, Field(ge=1, le=64)] = 7  # of the window, in pixels of the latents


class LearnedMap(Strict):
    """A small residual net that learns with the student; the target's is its running average."""

    kind: Literal["learn"]
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 64
    ema: Average = 0.95


MotionMap = Annotated[PlainMap | FrequencyMap | LocalMap | LearnedMap, Field(discriminator="kind")]


class FrameAdversary(Strict):
    """A judge of single frames on frozen features: real pictures against the student's."""

    optim: OptimConfig = OptimConfig(lr=5e-5)
    start: Annotated[int, Field(ge=0)] = 0  # the step of the run's stage from which it learns and is heard
    weight: Scheduled = 1.0  # of -logit in the student's loss
    images: Annotated[Any, PlainValidator(lambda v: None if v is None else piece("data", v, {}))] = None  # null: `data`
    size: Annotated[int, Field(ge=32, le=512)] = 64  # pixels a side of what the features see
    width: Annotated[int, Field(ge=1)] = 64


class Mcm(Consistency):
    """Consistency of motion alone, appearance from a judge of frames; guidance is the LCM papers' w + 1."""

    optim: OptimConfig = OptimConfig(lr=5e-6, clip=10.0, warmup=500, decay="cosine")
    motion: MotionMap = LearnedMap(kind="learn")
    mixed: Share = 0.5  # of the steps with the judge: from the student's own one-step samples instead of data
    adversary: FrameAdversary | None = FrameAdversary()


class FrameReward(Strict):
    """A reward on pictures of one random frame of each segment, weighted by exp(-decay |i - F//2|); their mean.

    The weights do not add up to one: at decay 1 and 16 frames in 4 segments their mean is .134. decay 0: a plain mean.
    """

    of: Reward
    segments: Annotated[int, Field(ge=1)] = 4
    decay: Annotated[float, Field(ge=0)] = 1.0
