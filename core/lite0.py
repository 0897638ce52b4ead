"""EfficientNet-lite0 as a frozen feature extractor: [B,3,H,W] pictures in [-1,1] to [B,1280] features."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

ASSET = Path(__file__).parent / "assets" / "lite0"
WIDTH = 1280

# One row a stage: expansion, kernel, stride of the first block, channels, blocks.
# Tan & Le 2019 (EfficientNet), table 1; the lite variant drops squeeze-and-excite and uses relu6.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding (the odd pixel goes right and below), batch norm folded in."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        self.step, self.reach = stride, kernel

    def forward(self, x: Tensor) -> Tensor:
        """Pads so that the output has ceil(side / stride) pixels a side."""
        down, right = (self._missing(side) for side in x.shape[-2:])
        padded = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return super().forward(padded)

    def _missing(self, side: int) -> int:
        covered = (-(-side // self.step) - 1) * self.step + self.reach
        return max(covered - side, 0)


class Block(nn.Module):
    """Inverted residual (MobileNetV2) without squeeze-and-excite: expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = SameConv(inputs, inner) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The projection stays linear."""
        h: Tensor = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.residual else h


def stages() -> list[Block]:
    """The sixteen blocks in order."""
    made, inputs = [], 32
    for expansion, kernel, stride, outputs, count in STAGES:
        for i in range(count):
            made.append(Block(inputs, outputs, expansion, kernel, stride if i == 0 else 1))
            inputs = outputs
    return made


class Lite0(nn.Module):
    """EfficientNet-lite0 (ImageNet weights), frozen; pictures are resized to `size` pixels first.

    96 pixels tell the embedded pictures apart as well as 128 do, at a third of the time (assets/lite0/README.md).
    """

    def __init__(self, size: int = 96, chunk: int = 64, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.size, self.chunk = size, chunk
        self.stem = SameConv(3, 32, 3, 2)
        self.blocks = nn.Sequential(*stages())
        self.head = SameConv(320, WIDTH)
        weights = load_file(ASSET / "model.safetensors")
        self.load_state_dict({name: value.float() for name, value in weights.items()})
        self.requires_grad_(False).eval().to(device)

    def forward(self, x: Tensor) -> Tensor:
        """[B,3,H,W] in [-1,1] at the size given -> [B,1280]; differentiable in x."""
        h: Tensor = self.head(self.blocks(F.relu6(self.stem(x))))
        return F.relu6(h).mean(dim=(2, 3))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """[B,3,H,W] in [-1,1] -> float32 [B,1280] on the CPU, a chunk of pictures at a time."""
        out = torch.empty(len(x), WIDTH)
        for start in range(0, len(x), self.chunk):
            part = x[start : start + self.chunk].to(self.head.weight.device, torch.float32)
            out[start : start + self.chunk] = self(resize(part, self.size))
        return out


def resize(x: Tensor, size: int) -> Tensor:
    """Antialiased bilinear resize to size x size."""
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
