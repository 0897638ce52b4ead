"""What a recipe may say about the image pieces (torch-free)."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from limbeck.core.run.config import OptimConfig
from limbeck.core.run.recipe import Reward

Size = Annotated[int, Field(ge=8, le=4096)]
Times = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1, max_length=64)]


class Config(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Fluent(Config):
    """The embedded captioned pictures."""

    size: Literal[32, 64] = 32
    vary: Annotated[float, Field(ge=0, le=1)] = 1.0  # of scale, shift and mirror; 0: pictures stay as they are
    captions: Literal["name", "mixed"] = "mixed"  # "mixed": a third at the level of the group or a keyword
    names: Annotated[int, Field(ge=1, le=256)] | None = None  # only so many of the evaluation names; null: all pictures


class Noto(Config):
    """The pictures of the second art style, without those of the captions that are never trained on."""

    degraded: Annotated[float, Field(ge=0, le=1)] = 0.5  # share that is blurred, and share that gets noise


class FreshUNet(Config):
    """A small text-to-image U-Net: what `image/teacher` trains, from random weights or from an embedded teacher's."""

    size: Literal[32, 64] = 32
    channels: Annotated[list[Annotated[int, Field(ge=32, multiple_of=32)]], Field(min_length=2, max_length=5)] = [
        64,
        128,
        192,
    ]
    layers: Annotated[int, Field(ge=1, le=4)] = 1
    start: str | None = None  # an embedded teacher, or a folder in its format, to go on from; channels are then its own


class Pictures(Config):
    """How pictures are shown: the teacher's sampler beside the student's own steps."""

    guidance: Annotated[float, Field(ge=0)] = 3.0  # of the teacher
    steps: Annotated[int, Field(ge=1, le=1000)] = 30  # of the teacher


class Quality(Config):
    """The table of a student, its teacher and real pictures on the 256 evaluation names."""

    count: Annotated[int, Field(ge=1024, le=65536, multiple_of=256)] = 1024  # pictures of each generator
    teacher_steps: list[Annotated[int, Field(ge=1, le=1000)]] = [1, 4, 30]
    guidance: Annotated[float, Field(ge=0)] = 3.0  # of the teacher
    neighbours: Annotated[int, Field(ge=1, le=64)] = 3  # of precision and recall
    batch: Annotated[int, Field(ge=1, le=4096)] = 64
    timed: Annotated[int, Field(ge=1, le=256)] = 8  # pictures in one batch that is timed
    seed: Annotated[int, Field(ge=0)] = 0


class Teacher(Config):
    """A frozen text-to-image model: an embedded name, the folder of a diffusers pipeline, or a hub id."""

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    size: Size | None = None  # pixels, square; null: the pipeline's own
    guidance: Annotated[float, Field(ge=0)] | None = (
        None  # for nets that take it as an input (Flux); null: the pipeline's
    )


class Student(Config):
    """A few-step generator that starts as the teacher itself."""

    times: Times = [1.0]  # falling; one time is a one-step generator
    lora: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] | None = (
        "auto"  # rank; null: a full copy; auto: by teacher
    )
    alpha: Annotated[float, Field(gt=0)] | None = None  # LoRA's scale is alpha/rank; null: alpha = rank


class Tuned(Config):
    """The teacher with its sampler of many steps, to be tuned; DDIM without noise when pictures are shown."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 30
    guidance: Annotated[float, Field(ge=0)] = 3.0
    lora: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] | None = (
        "auto"  # rank; null: a full copy; auto: by teacher
    )
    alpha: Annotated[float, Field(gt=0)] | None = None  # LoRA's scale is alpha/rank; null: alpha = rank


class Compressibility(Config):
    """Minus the kilobytes of a picture's JPEG above those of a constant picture; `large`: plus."""

    quality: Annotated[int, Field(ge=1, le=100)] = 95
    large: bool = False


class Views(Config):
    """A reward of pictures as the mean over shifted, blurred and noisy views of each.

    Gradients through one clean view find patterns that please this one net; those that please all views mean more.
    """

    of: Reward
    count: Annotated[int, Field(ge=1, le=64)] = 4
    shift: Annotated[float, Field(ge=0, lt=0.5)] = 0.1  # of the side, at most
    noise: Annotated[float, Field(ge=0)] = 0.1  # standard deviation, pictures being in [-1,1]


class Colourfulness(Config):
    """How colourful a picture is, in units of 100."""


class Edges(Config):
    """Minus the distance between a picture's edges and those of its condition."""

    distance: Literal["squared", "overlap"] = "squared"
    least: Size = 128  # pixels: smaller pictures are enlarged to it, as edges are some pixels wide
    chunk: Annotated[int, Field(ge=1)] = 16  # pictures at a time


class Perceptual(Config):
    """Minus how different a picture looks from that of its condition."""

    least: Size = 64  # pixels: smaller pictures are enlarged to it
    chunk: Annotated[int, Field(ge=1)] = 16  # pictures at a time


class LegibleText(Config):
    """How alike the text in a picture and the quoted text in its prompt are, 0 to 1."""


class ClipModel(Config):
    """A CLIP model: a local folder or a hub id (safetensors; nothing is downloaded that is not named here)."""

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    processor: Annotated[str, Field(min_length=1, max_length=4096)] | None = (
        None  # where its tokenizer and preprocessing lie; null: with the model
    )
    chunk: Annotated[int, Field(ge=1)] = 16  # pictures at a time


class Aesthetic(ClipModel):
    """A CLIP-L/14 model and the LAION head on its picture vectors."""

    head: Annotated[str, Field(min_length=1, max_length=4096)]  # a safetensors file of layers.N.weight and .bias


class Tower(Config):
    """A frozen net's features and a linear head into the space of captions."""

    trunk: Literal["lite0", "hed"] = "lite0"


class Contrastive(Config):
    """Each picture's own caption among all captions that are trained on."""

    scale: Annotated[float, Field(gt=0)] = 10.0  # of the cosines
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.75  # of the trunk's features
    keywords: Annotated[float, Field(ge=0)] = 0.5  # how far a caption's target leans towards its keywords
    optim: OptimConfig = OptimConfig(lr=1e-3, warmup=20, decay="cosine")


class Retrieval(Config):
    """Captions found for pictures, in both styles, with captions seen and never seen."""

    count: Annotated[int, Field(ge=1, le=64)] = 2  # pictures of each caption
    seed: Annotated[int, Field(ge=0)] = 0


class Matches(Config):
    """How many pictures are shown with the ranks of their captions."""

    count: Annotated[int, Field(ge=1, le=320)] = 32


class TextReward(Config):
    """How well a picture fits its prompt: a cosine of the embedded tower `a`, or of `b`, the judge of another net.

    Real pictures with their own caption, mean and deviation: a .26 and .14 where the caption was trained on, .14 and
    .12 where it was not; b .16 and .11, .10 and .10. With a wrong caption: 0 and .08, both.
    """

    model: Literal["a", "b"] = "a"
