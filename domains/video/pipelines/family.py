"""What a family of video pipelines must say beyond what every family does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from limbeck.core.pipelines.family import ATTENTION, Family, Net, Pipe

# MCM's list for U-Nets (Zhai et al. 2024, its code); LoRA takes linear layers and 2-D convolutions, so no Conv3d
MOTION = (
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VideoFamily(Family):
    """A family of clips. Its samples are latents [C,F,H,W] inside limbeck, whatever the pipeline's own layout."""

    frames: Callable[[Pipe], int]  # the family's usual number of frames
    spatial: Callable[[Pipe], int]  # pixels per latent and side
    vae: Callable[[Pipe], nn.Module] = lambda pipe: pipe.vae
    temporal: Callable[[Pipe], int] = lambda pipe: 1  # frames per latent frame after the first; 1: each by itself
    together: int = 1  # latent frames after the first that the autoencoder decodes together
    depth: Callable[[Net], int] = lambda net: 1  # latent frames per token; those that are missing go before the first
    most: Callable[[Net], int | None] = lambda net: None  # frames that the net has positions for
