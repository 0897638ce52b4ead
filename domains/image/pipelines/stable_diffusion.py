"""Stable Diffusion 1.x/2.x and XL: a U-Net on latents, eps or v."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.pipelines.family import ATTENTION, Family, Net, Options, Pipe


def encode_sd(pipe: Pipe, prompts: list[str], options: Options) -> Encoded:
    states, _ = pipe.encode_prompt(prompts, pipe.device, 1, False)
    return {"states": states}


def call_sd(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    raw: Tensor = net(x, time, encoder_hidden_states=cond["states"], return_dict=False)[0]
    return raw


def encode_sdxl(pipe: Pipe, prompts: list[str], options: Options) -> Encoded:
    """Token and pooled states, (original size, crop corner, target size); "" is the null condition, zeros in SDXL."""
    states, _, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device, do_classifier_free_guidance=False)
    if pipe.config.force_zeros_for_empty_prompt:
        keep = torch.tensor([prompt != "" for prompt in prompts], device=states.device)
        states, pooled = states * keep[:, None, None], pooled * keep[:, None]
    ids = torch.tensor([*options.size, 0, 0, *options.size], dtype=states.dtype)
    return {"states": states, "pooled": pooled, "time_ids": ids.to(states.device).repeat(len(prompts), 1)}


def call_sdxl(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    raw: Tensor = net(x, time, encoder_hidden_states=cond["states"], added_cond_kwargs=added, return_dict=False)[0]
    return raw


def unet_size(pipe: Pipe) -> tuple[int, int]:
    return (int(pipe.unet.config.sample_size * pipe.vae_scale_factor),) * 2


def unet_taps(net: Net) -> tuple[str, ...]:
    return ("mid_block",)


SD = Family(
    name="stable-diffusion", pipelines=("StableDiffusionPipeline",), net="unet", encode=encode_sd, call=call_sd,
    sample_size=unet_size, targets=ATTENTION, taps=unet_taps, guidance=7.5)  # fmt: skip
SDXL = Family(
    name="stable-diffusion-xl", pipelines=("StableDiffusionXLPipeline",), net="unet", encode=encode_sdxl,
    call=call_sdxl, sample_size=unet_size, targets=ATTENTION, taps=unet_taps, guidance=5.0)  # fmt: skip
