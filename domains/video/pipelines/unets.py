"""AnimateDiff and ModelScope: U-Nets over time and space, an autoencoder of single frames, CLIP text."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.pipelines.family import Net, Options, Pipe
from limbeck.domains.video.pipelines.family import MOTION, VideoFamily

# a motion module calls its own proj_in and proj_out by keyword, and layers that peft has patched cannot be called so
PATCHED = tuple(f"attentions.*.{name}" if name in ("proj_in", "proj_out") else name for name in MOTION)


def encode(pipe: Pipe, prompts: list[str], options: Options) -> Encoded:
    states, _ = pipe.encode_prompt(prompts, pipe.device, 1, False)
    return {"states": states}


def call_animatediff(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """This net takes text for each frame."""
    states = cond["states"].repeat_interleave(x.shape[2], 0)
    raw: Tensor = net(x, time, encoder_hidden_states=states, return_dict=False)[0]
    return raw


def call_modelscope(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    raw: Tensor = net(x, time, encoder_hidden_states=cond["states"], return_dict=False)[0]
    return raw


def sample_size(pipe: Pipe) -> tuple[int, int]:
    return (int(pipe.unet.config.sample_size * pipe.vae_scale_factor),) * 2


def spatial(pipe: Pipe) -> int:
    return int(pipe.vae_scale_factor)


def taps(net: Net) -> tuple[str, ...]:
    return ("mid_block",)


ANIMATEDIFF = VideoFamily(
    name="animatediff", pipelines=("AnimateDiffPipeline",), net="unet", encode=encode, call=call_animatediff,
    sample_size=sample_size, targets=PATCHED, taps=taps, guidance=7.5, patch=1, frames=lambda pipe: 16, spatial=spatial,
    most=lambda net: int(net.config.motion_max_seq_length))  # fmt: skip
MODELSCOPE = VideoFamily(
    name="modelscope", pipelines=("TextToVideoSDPipeline",), net="unet", encode=encode, call=call_modelscope,
    sample_size=sample_size, targets=MOTION, taps=taps, guidance=9.0, patch=1, frames=lambda pipe: 16,
    spatial=spatial)  # fmt: skip
