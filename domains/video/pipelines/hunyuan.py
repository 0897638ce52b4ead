"""HunyuanVideo: Llama and CLIP text, rectified flow, guidance as an input of the net."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.pipelines.family import JOINT, Net, Options, Pipe, guidance_rows, middle_block
from limbeck.domains.video.pipelines.family import VideoFamily

SCALE = 1000.0  # the net takes this times the guidance scale
# of the blocks of clips and text alone: the refiner of the text has layers of the same names
TARGETS = tuple(
    f"{blocks}.*.{name}" for blocks in ("transformer_blocks", "single_transformer_blocks") for name in JOINT
)


def encode(pipe: Pipe, prompts: list[str], options: Options) -> Encoded:
    """Llama states and mask, pooled CLIP state and, for guidance-distilled nets, the guidance scale of each row."""
    states, pooled, mask = pipe.encode_prompt(prompts, device=pipe.device)
    cond = {"states": states, "mask": mask.to(states.dtype), "pooled": pooled}
    if pipe.transformer.config.guidance_embeds:
        cond["guidance"] = guidance_rows(options.guidance, states)
    return cond


def call(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    guidance = SCALE * cond["guidance"] if "guidance" in cond else None
    raw: Tensor = net(
        x, time, cond["states"], cond["mask"], cond["pooled"], guidance=guidance, return_dict=False)[0]  # fmt: skip
    return raw


def taps(net: Net) -> tuple[str, ...]:
    return (f"transformer_blocks.{middle_block(net)}.ff",)


HUNYUAN = VideoFamily(
    name="hunyuanvideo", pipelines=("HunyuanVideoPipeline",), net="transformer", encode=encode, call=call,
    sample_size=lambda pipe: (720, 1280), targets=TARGETS, taps=taps, guidance=6.0, linear_sigmas=True,
    embeds_guidance=True, frames=lambda pipe: 129, spatial=lambda pipe: int(pipe.vae_scale_factor_spatial),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal))  # fmt: skip
