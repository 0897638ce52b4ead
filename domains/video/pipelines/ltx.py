"""LTX-Video: T5 text, rectified flow whose shift grows with the clip, tokens of one latent, positions in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.pipelines.family import ATTENTION, Net, Options, Pipe, middle_block
from limbeck.domains.video.pipelines.family import VideoFamily

RATE = 25.0  # frames a second where none is told: the pipeline's default


def encode(pipe: Pipe, prompts: list[str], options: Options) -> Encoded:
    """T5 states, their mask, and how many frames and pixels a latent stands for."""
    states, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=pipe.device)
    ratio = torch.tensor([temporal(pipe), spatial(pipe)], dtype=torch.float32, device=states.device)
    return {"states": states, "mask": mask, "ratio": ratio.repeat(len(prompts), 1)}


def call(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """Time is laid out in seconds: at the frame rate of each clip."""
    frames, height, width = x.shape[2:]
    per_frame, per_side = cond["ratio"].float()[:, :, None, None, None, None].unbind(1)
    rate = cond["fps"].float()[:, None, None, None, None] if "fps" in cond else RATE
    tokens: Tensor = net(
        x.flatten(2).mT, encoder_hidden_states=cond["states"], timestep=time, encoder_attention_mask=cond["mask"],
        num_frames=frames, height=height, width=width, return_dict=False,
        rope_interpolation_scale=(per_frame / rate, per_side, per_side),
    )[0]  # fmt: skip
    return tokens.mT.reshape(x.shape)


class AtZero(nn.Module):
    """The autoencoder of LTX 0.9.1 and later, which is told a time when it decodes: 0, the pipeline's default."""

    def __init__(self, vae: Net) -> None:
        super().__init__()
        self.vae, self.encode = vae, vae.encode

    def decode(self, z: Tensor) -> object:
        """Latents [B,C,F,H,W] as the autoencoder's own output."""
        return self.vae.decode(z, z.new_zeros(len(z)))


def vae(pipe: Pipe) -> nn.Module:
    """What decodes without a time."""
    found: nn.Module = AtZero(pipe.vae) if pipe.vae.config.timestep_conditioning else pipe.vae
    return found


def spatial(pipe: Pipe) -> int:
    return int(pipe.vae_spatial_compression_ratio)


def temporal(pipe: Pipe) -> int:
    return int(pipe.vae_temporal_compression_ratio)


def taps(net: Net) -> tuple[str, ...]:
    return (f"transformer_blocks.{middle_block(net)}.ff",)


LTX = VideoFamily(
    name="ltx", pipelines=("LTXPipeline",), net="transformer", encode=encode, call=call,
    sample_size=lambda pipe: (512, 704), targets=ATTENTION, taps=taps, guidance=3.0, patch=1, linear_sigmas=True,
    frames=lambda pipe: 161, vae=vae, spatial=spatial, temporal=temporal)  # fmt: skip
