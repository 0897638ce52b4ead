"""Rewards on pictures without a network, in a process and behind a server."""

import signal
from typing import Any

import pytest
import torch

from limbeck.core.rewards.remote import remote
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.image import rewards
from limbeck.domains.image.data import FluentData

GEN = torch.Generator().manual_seed(0)
PICTURES = FluentData().batch(torch.tensor([3, 400, 900]), GEN, "name")[0]


def build(**reward: object) -> Build:
    both = {split: [reward] for split in ("train", "held_out")}
    return Build(recipes.of({"name": "r", "job": "sample", "steps": 1, "batch": 1, "rewards": both}))


def test_a_constant_picture_has_no_payload_and_noise_has_the_most() -> None:
    grey, noise = torch.full((1, 3, 32, 32), 0.3), torch.rand(1, 3, 32, 32, generator=GEN) * 2 - 1
    assert rewards.payload(grey, 95)[0] < 0.01 < float(rewards.payload(PICTURES, 95).min())
    assert rewards.payload(noise, 95)[0] > rewards.payload(PICTURES, 95).max()
    made = [build(kind="image.compressibility", large=large) for large in (False, True)]
    small, large = (one.piece("rewards.train.0") for one in made)
    cond = {"prompt": ["", "", ""]}
    assert torch.equal(small(PICTURES, cond), -large(PICTURES, cond))
    assert not small.differentiable


def test_grey_is_not_colourful_and_the_gradient_is_finite_everywhere() -> None:
    grey = torch.zeros(1, 3, 8, 8, requires_grad=True)
    assert rewards.colourfulness(grey)[0] < 0.01
    assert torch.isfinite(torch.autograd.grad(rewards.colourfulness(grey).sum(), grey)[0]).all()
    half = torch.cat([torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 4),
                      torch.tensor([-1.0, -1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 4)], 3)  # fmt: skip
    rg, yb = 127.5, 191.25  # red over blue: rg is 255 or 0, yb is 127.5 or -255
    expected = (rg**2 + yb**2) ** 0.5 + 0.3 * (127.5**2 + 63.75**2) ** 0.5
    assert float(rewards.colourfulness(half)[0]) == pytest.approx(expected, rel=1e-5)


def test_combinators_stand_in_recipes() -> None:
    inner = {"kind": "image.colourfulness"}
    nested = {"kind": "ensemble", "rule": "min", "of": [inner, {"kind": "hinge", "target": 0.5, "of": inner}]}
    found, cond = build(**nested).piece("rewards.train.0"), {"prompt": [""] * 3}
    plain = rewards.colourfulness(PICTURES) / 100
    assert torch.allclose(found(PICTURES, cond), torch.minimum(plain, -(0.5 - plain).relu())) and found.differentiable
    with pytest.raises(BadInput, match=r"rewards\.train\.0\.of.*compressability"):
        build(kind="cached", of={"kind": "image.compressability"})
    text = recipes.dump(build(**nested).recipe)
    assert "kind: hinge" in text and "target: 0.5" in text


def test_a_reward_behind_the_server_is_the_same(python: Any) -> None:
    order = ["-m", "limbeck", "reward-server", "image.compressibility", "--port", "0", "--set", "quality=50"]
    server = python.start(order)
    try:
        address = server.line().split()[-1]
        cond = {"prompt": ["a", "b", "c"]}
        assert torch.equal(remote(address)(PICTURES, cond), -rewards.payload(PICTURES, 50))
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
