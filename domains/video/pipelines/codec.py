"""Between clips in pixels and a pipeline's latents. Legend: B clips, C channels, F frames, H and W pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from limbeck.core.diffusion.codec import Autoencoder
from limbeck.domains.video.metrics import frames
from limbeck.domains.video.motion import clips


class ClipCodec:
    """An autoencoder of clips, or (`framewise`) of their single frames, at the model's size.

    Clips of another size are cut to the model's aspect around the middle and resized, longer ones end early. `extra`
    latent frames before the first, which fill the first token of the net, are like it and are not shown.
    """

    def __init__(self, inner: Autoencoder, size: tuple[int, int], count: int, framewise: bool, extra: int = 0) -> None:
        self.inner, self.size, self.count, self.framewise, self.extra = inner, size, count, framewise, extra

    def encode(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        """Pixels [B,3,F,H,W] in [-1,1] -> latents, with gradient."""
        x = x[:, :, : self.count]
        if tuple(x.shape[-2:]) != self.size:
            x = clips(fitted(frames(x), self.size), len(x))
        z = self._each(lambda part: self.inner.encode(part, gen), x)
        return torch.cat([z[:, :, :1].expand(-1, -1, self.extra, -1, -1), z], 2)

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pixels [B,3,F,H,W] in about [-1,1], with gradient."""
        return self._each(self.inner.decode, z[:, :, self.extra :])

    def read(self, z: Tensor, space: str) -> Tensor:
        """Pixels, whatever they are called."""
        return self.decode(z)

    def _each(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return clips(function(frames(x)), len(x)) if self.framewise else function(x)


def fitted(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest middle part of this aspect of pictures [N,3,H,W], resized (antialiased) to `size`, in [-1,1]."""
    scale = min(have / want for have, want in zip(x.shape[-2:], size, strict=True))
    height, width = (max(1, round(scale * side)) for side in size)
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    part = x[..., top : top + height, left : left + width]
    return functional.interpolate(part, size, mode="bicubic", antialias=True).clamp(-1, 1)
