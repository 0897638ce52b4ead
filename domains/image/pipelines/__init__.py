"""Real image pipelines as teachers: Stable Diffusion 1.x/2.x, XL and 3, Flux, PixArt (one file a family)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Autoencoder
from limbeck.core.pipelines import PipelineModel, guided, sample
from limbeck.core.pipelines.family import Family, Options, Pipe
from limbeck.core.pipelines.loading import assemble, codec_of, open_pipeline
from limbeck.core.run.errors import BadInput
from limbeck.domains.image.pipelines import flux, pixart, sd3, stable_diffusion

__all__ = ["KNOWN", "PipelineModel", "guided", "load_pipeline", "sample"]
FAMILIES = (stable_diffusion.SD, stable_diffusion.SDXL, sd3.SD3, flux.FLUX, pixart.PIXART)
KNOWN: dict[str, Family] = {name: family for family in FAMILIES for name in family.pipelines}


def load_pipeline(
    path_or_hub_id: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    guidance: float | None = None,
) -> PipelineModel:
    """The teacher of a diffusers pipeline. `size`: pixels of the square picture; `guidance`: for nets that embed it."""
    pipe, family = open_pipeline(path_or_hub_id, KNOWN, device, dtype)
    side = size or family.sample_size(pipe)[0]
    options = Options((side, side), family.guidance if guidance is None else guidance)
    shape = (family.channels(getattr(pipe, family.net)), *(latent_side(pipe, family, side),) * 2)
    return assemble(pipe, family, options, shape, AtSize(codec_of(pipe), side), path_or_hub_id)


def latent_side(pipe: Pipe, family: Family, size: int) -> int:
    """Latents per side; the size must fill whole tokens."""
    unit = pipe.vae_scale_factor * family.patch
    if size <= 0 or size % unit:
        raise BadInput(f"teacher.size: {size} is not a multiple of {unit}, as {family.name} needs")
    return size // int(pipe.vae_scale_factor)


class AtSize:
    """The autoencoder at the model's size: pictures of another size are resized (antialiased) before encoding."""

    def __init__(self, inner: Autoencoder, size: int) -> None:
        self.inner, self.size = inner, size

    def encode(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        """Pixels [B,3,H,W] of any size -> latents of the model's shape, with gradient."""
        if x.shape[-2:] != (self.size, self.size):
            x = nn.functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
        return self.inner.encode(x, gen)

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pixels [B,3,size,size] in about [-1,1], with gradient."""
        return self.inner.decode(z)

    def read(self, z: Tensor, space: str) -> Tensor:
        """Pixels, whatever they are called."""
        return self.decode(z)
