"""Codecs between pixels and latents: with gradient, in chunks along the batch, with the family's scaling inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Codec(Protocol):
    """What a model needs to move between the space it works in and the space people see."""

    def encode(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        """Pixels [B,C,…] in [-1,1] to latents."""

    def decode(self, z: Tensor) -> Tensor:
        """Latents to pixels."""

    def read(self, z: Tensor, space: str) -> Tensor:
        """Latents in another space: what a reward that names it is shown."""


class Identity:
    """Models that work on the samples themselves."""

    def encode(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z

    def read(self, z: Tensor, space: str) -> Tensor:
        return z


class Autoencoder(nn.Module):
    """A diffusers autoencoder: latent = (vae(x) - shift) * scaling; one number or one per channel.

    `chunk` samples go through at a time. The posterior mean is taken unless a generator is given.
    """

    def __init__(
        self,
        vae: nn.Module,
        scaling: float | Sequence[float] = 1.0,
        shift: float | Sequence[float] = 0.0,
        chunk: int = 8,
    ) -> None:
        super().__init__()
        self.vae, self.chunk = vae, chunk
        self.register_buffer("scaling", torch.as_tensor(scaling, dtype=torch.float32), persistent=False)
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float32), persistent=False)

    def encode(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        """Pixels [B,C,…] to scaled latents, with gradient."""
        return self._chunked(lambda part: self._encode(part, gen), x)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents to pixels [B,C,…], with gradient."""
        return self._chunked(self._decode, z)

    def read(self, z: Tensor, space: str) -> Tensor:
        """Pixels, whatever they are called."""
        return self.decode(z)

    def _encode(self, x: Tensor, gen: torch.Generator | None) -> Tensor:
        posterior = self.vae.encode(x.to(self._dtype())).latent_dist  # type: ignore[operator]
        latent = posterior.mode()
        if gen is not None:
            noise = torch.randn(latent.shape, generator=gen, device=gen.device)
            latent = latent + posterior.std * noise.to(latent)
        return ((latent.to(x.dtype) - self._channels("shift", latent)) * self._channels("scaling", latent)).to(x.dtype)

    def _decode(self, z: Tensor) -> Tensor:
        latent = z / self._channels("scaling", z) + self._channels("shift", z)
        return self.vae.decode(latent.to(self._dtype())).sample.to(z.dtype)  # type: ignore[operator]

    def _channels(self, name: str, like: Tensor) -> Tensor:
        """The constant as [C,1,…] beside a batch of samples."""
        value = self.get_buffer(name)
        return value.reshape(-1, *[1] * (like.ndim - 2)) if value.ndim else value

    def _dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def _chunked(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(part) for part in torch.split(x, self.chunk)])
