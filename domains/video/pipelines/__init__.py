"""Real video pipelines as teachers: AnimateDiff, ModelScope, Wan, LTX, CogVideoX, HunyuanVideo."""

from __future__ import annotations

import torch

from limbeck.core.distillation.lora import recomputed
from limbeck.core.pipelines import PipelineModel
from limbeck.core.pipelines.family import Options, Pipe
from limbeck.core.pipelines.loading import assemble, codec_of, locate, open_pipeline, read
from limbeck.core.run.errors import BadInput
from limbeck.domains.video.config import VideoTeacher
from limbeck.domains.video.pipelines import cogvideox, hunyuan, ltx, unets, wan
from limbeck.domains.video.pipelines.codec import ClipCodec
from limbeck.domains.video.pipelines.family import VideoFamily

FAMILIES = (unets.ANIMATEDIFF, unets.MODELSCOPE, wan.WAN, ltx.LTX, cogvideox.COGVIDEOX, hunyuan.HUNYUAN)
KNOWN: dict[str, VideoFamily] = {name: family for family in FAMILIES for name in family.pipelines}


def load_pipeline(config: VideoTeacher, device: str | torch.device, dtype: torch.dtype) -> PipelineModel:
    """The teacher of a diffusers pipeline, its frozen parts in this dtype."""
    pipe, family = opened(config, device, dtype)
    size, count = config.size or family.sample_size(pipe), config.frames or family.frames(pipe)
    shape, extra = latents(pipe, family, size, count)
    if config.tiling:
        pipe.vae.enable_tiling()
    if config.checkpointing:
        getattr(pipe, family.net).enable_gradient_checkpointing(recomputed)
    inner = codec_of(pipe, family.vae(pipe), chunk=1 if config.slicing else 8)
    codec = ClipCodec(inner, size, count, framewise=family.temporal(pipe) == 1, extra=extra)
    options = Options(size, family.guidance if config.guidance is None else config.guidance)
    return assemble(pipe, family, options, shape, codec, config.model)


def opened(config: VideoTeacher, device: str | torch.device, dtype: torch.dtype) -> tuple[Pipe, VideoFamily]:
    """The pipeline of a folder, or Stable Diffusion with a motion adapter and the noise that adapters are made for."""
    if config.motion is None:
        return open_pipeline(config.model, KNOWN, device, dtype)
    from diffusers import DDIMScheduler, MotionAdapter

    adapter = read(MotionAdapter, *locate(config.motion), dtype, {})
    base = {"StableDiffusionPipeline": unets.ANIMATEDIFF}
    pipe, family = open_pipeline(config.model, base, device, dtype, {"motion_adapter": adapter})
    made_for = {"beta_schedule": "linear", "steps_offset": 1, "clip_sample": False}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **made_for)  # type: ignore[no-untyped-call]
    return pipe, family


def latents(pipe: Pipe, family: VideoFamily, size: tuple[int, int], count: int) -> tuple[tuple[int, ...], int]:
    """The shape [C,F,H,W] of `count` frames of this size in pixels, and how many of F are there to fill a token."""
    net, spatial, temporal = getattr(pipe, family.net), family.spatial(pipe), family.temporal(pipe)
    unit, most = spatial * family.patch, family.most(net)
    if any(side % unit for side in size):
        raise BadInput(f"teacher.size: {list(size)} are not both multiples of {unit}, as {family.name} needs")
    step = temporal * family.together
    if over := (count - 1) % step:
        near = f"{count - over} or {count - over + step}"
        raise BadInput(f"teacher.frames: {count} is not {step}k + 1, as {family.name} needs; set {near}")
    if most is not None and count > most:
        raise BadInput(f"teacher.frames: {count} is more than the {most} that this motion adapter knows")
    frames = (count - 1) // temporal + 1
    extra = -frames % family.depth(net)
    return (family.channels(net), frames + extra, *(side // spatial for side in size)), extra
