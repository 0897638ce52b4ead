"""The critic (fake score): the denoiser that follows the student's own distribution."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Model, Preconditioned
from limbeck.core.distillation.config import CriticConfig
from limbeck.core.distillation.denoising import Regression
from limbeck.core.distillation.lora import LoRA, Patched
from limbeck.core.run.context import Context


class Critic:
    """A trainable denoiser with its denoising loss (own law of t over the full range, condition dropout)."""

    def __init__(self, denoiser: Denoiser, config: CriticConfig, null: Encoded) -> None:
        self.denoiser, self.config = denoiser, config
        self.regression = Regression(denoiser, config, null)

    def loss(self, ctx: Context, name: str, x0: Tensor, cond: Encoded) -> Tensor:
        """Denoising on the student's sample x0 [b, *S]; nothing reaches the student."""
        return self.regression.loss(ctx, name, x0.detach(), cond)

    def scale(self, ctx: Context, teacher: float) -> float:
        """The critic's own guidance in the student's step; plain conditional unless the method says otherwise."""
        own = self.config.guidance
        return 1.0 if own is None else teacher if own == "same" else ctx.at(own)

    @classmethod
    def of(cls, config: CriticConfig, model: Model, null: Encoded, device: torch.device) -> Critic:
        """A fresh critic for this teacher; equal to the teacher at the start unless it is a small net of its own."""
        config = config.model_copy(update={"t_group": model.group(config.t_group)})
        return cls(_net(config, model, null).to(device), config, null)


def _net(config: CriticConfig, model: Model, null: Encoded) -> Denoiser:
    if config.kind == "mlp":
        return mlp_denoiser(model, config.width, config.depth, config.sigma_data, null)
    if not list(model.denoiser.parameters()):
        raise ValueError(f"the teacher {model.name} has no network to start a critic from; set critic.kind: mlp")
    if config.kind == "lora":
        return Patched(model.denoiser, LoRA(model.denoiser, config.rank, config.alpha))
    net = copy.deepcopy(model.denoiser).requires_grad_(True)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in net.parameters())
    return net.float() if half else net  # small updates are lost in half precision


class FlatNet(nn.Module):
    """An MLP on flattened samples: (x [B,*S], c_noise [B], cond) -> [B,*S]; labels are one-hot, -1 is none."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int) -> None:
        super().__init__()
        numel = math.prod(shape)
        sizes = [numel + 1 + classes, *[width] * depth]
        layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.SiLU())]
        self.body, self.out = nn.Sequential(*layers), nn.Linear(width, numel)
        self.classes = classes

    def forward(self, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
        """The raw output."""
        parts = [x.flatten(1), time[:, None]]
        if self.classes:
            parts.append((cond["label"][:, None] == torch.arange(self.classes, device=x.device)).to(x))
        return self.out(self.body(torch.cat(parts, 1))).view_as(x)


def mlp_denoiser(model: Model, width: int, depth: int, sigma_data: float, null: Encoded) -> Preconditioned:
    """A small net of the teacher's process, EDM-preconditioned, its hidden layer tapped for heads."""
    classes = _label_count(model.denoiser) if "label" in null else 0
    net = FlatNet(model.shape, classes, width, depth)
    return Preconditioned(net, model.denoiser.process, sigma_data, taps=("body",))


def _label_count(denoiser: Denoiser) -> int:
    """How many labels a closed-form teacher knows: a number, or one label a component."""
    classes: Any = getattr(denoiser, "classes", 0)
    return int(classes.max()) + 1 if isinstance(classes, Tensor) else int(classes)
