"""The feature net: its numbers against the original weights, its padding, gradient and chunking."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core import lite0
from limbeck.core.lite0 import Lite0, SameConv, resize

# Features of picture(97) by the original float32 weights, with batch norm (eps 1e-3) as a layer of its own.
NORM = 25.0219
STRONGEST = {71: 4.7442, 900: 4.4667, 77: 4.0783, 265: 3.9073, 786: 3.8920, 285: 3.8492}


@pytest.fixture(scope="module")
def net() -> Lite0:
    return Lite0()


def picture(side: int) -> Tensor:
    """A ramp, a wave and a disc as the three colours."""
    ramp = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    return torch.stack([x, torch.sin(5 * y), (x * x + y * y < 0.5).float() * 2 - 1])[None]


def error(found: Tensor) -> float:
    """Largest deviation from the known features, relative to the strongest."""
    deviation = [abs(float(found[0, i]) - value) for i, value in STRONGEST.items()]
    return max(*deviation, abs(float(found.norm()) - NORM) / 5) / 4.7442


def test_features_are_those_of_the_original_weights(net: Lite0) -> None:
    assert error(net(picture(97))) < 0.02


def test_symmetric_padding_is_caught(net: Lite0, monkeypatch: pytest.MonkeyPatch) -> None:
    def symmetric(self: SameConv, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.reach // 2, 1, self.groups)

    monkeypatch.setattr(lite0.SameConv, "forward", symmetric)
    assert error(net(picture(96))) > 0.1


@pytest.mark.parametrize(("side", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 1)])
def test_same_padding_gives_ceil_sides_and_puts_the_odd_pixel_last(side: int, kernel: int, stride: int) -> None:
    conv = SameConv(1, 1, kernel, stride)
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    out = conv(torch.ones(1, 1, side, side))
    assert out.shape[-1] == -(-side // stride)
    missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    assert out[0, 0, 0, 0] == (kernel - missing // 2) ** 2
    assert out[0, 0, -1, -1] == (kernel - (missing - missing // 2)) ** 2


def test_features_do_not_depend_on_chunks_and_are_frozen(net: Lite0) -> None:
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = net.features(x)
    chunk, net.chunk = net.chunk, 2
    parts = net.features(x)
    net.chunk = chunk
    assert whole.shape == (5, 1280) and torch.allclose(whole, parts, atol=1e-5)
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    assert net.features(x[:0]).shape == (0, 1280)


def test_gradient_reaches_the_picture(net: Lite0) -> None:
    x = picture(32).requires_grad_()
    net(resize(x, 64)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def test_resize_is_antialiased() -> None:
    stripes = torch.tensor([1.0, -1.0]).repeat(32).expand(1, 3, 64, 64)
    assert resize(stripes, 16)[..., 2:-2].abs().max() < 0.1
    assert F.interpolate(stripes, (16, 16), mode="nearest").abs().max() == 1
