"""Pictures with alpha put on grounds: colours, placing by resampling (B pictures, S pixels a side)."""

import torch
from torch import Tensor


def colours(u: Tensor) -> Tensor:
    """Uniform draws [n,3] -> colours in [0,1]: any hue, from pastel (high value, low saturation) to saturated."""
    hue, saturation, value = u[:, :1], 0.1 + 0.8 * u[:, 1:2] ** 1.5, 0.55 + 0.45 * u[:, 2:]
    wheel = (hue * 6 + torch.tensor([[5.0, 3.0, 1.0]], device=u.device)) % 6
    return value * (1 - saturation * torch.minimum(wheel, 4 - wheel).clamp(0, 1))


def cubic(x: Tensor) -> Tensor:
    """The Catmull-Rom kernel."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def resampling(scale: Tensor, shift: Tensor, flip: Tensor, size: int) -> Tensor:
    """Antialiased cubic weights [B,size,size] from source to output pixels, for scale, shift (in pixels), mirror [B].

    Scaling and shifting are separable: two small matrix products are ten times faster than a bicubic grid lookup.
    """
    margin = size // 2  # weights sum to one over a lattice that every output pixel lies on; outside all is transparent
    centre = (size - 1) / 2
    out = torch.arange(size, device=scale.device) - centre
    source = (torch.where(flip, -1.0, 1.0)[:, None] * (out - shift[:, None])) / scale[:, None] + centre
    lattice = torch.arange(-margin, size + margin, device=scale.device)
    weights = cubic((source[:, :, None] - lattice) * scale[:, None, None])
    return (weights / weights.sum(2, keepdim=True))[:, :, margin:-margin]


def resampled(pictures: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Premultiplied pictures [B,4,S,S] under the weights [B,S,S] of both directions."""
    out = rows[:, None] @ pictures @ columns[:, None].transpose(2, 3)
    alpha = out[:, 3:].clamp(0, 1)  # the kernel overshoots at edges
    return torch.cat([torch.minimum(out[:, :3].clamp(min=0), alpha), alpha], 1)
