"""LPIPS's heads on the edge detector's VGG16: the formula, the order of distances, the reward."""

import torch
from torch.nn import functional as F

from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.domains.image.data import FluentData
from limbeck.domains.image.perceptual import Heads

torch.set_num_threads(1)
PICTURES = FluentData().batch(torch.tensor([3, 400, 900]), torch.Generator().manual_seed(0), "name")[0]


def test_distances_are_the_formula_and_in_order() -> None:
    net = Heads()
    noise = torch.randn(PICTURES.shape, generator=torch.Generator().manual_seed(0))
    soft = F.avg_pool2d(F.pad(PICTURES, (1, 1, 1, 1), mode="replicate"), 3, 1)
    assert net(PICTURES, PICTURES).abs().max() == 0
    one, two, other = net(PICTURES, PICTURES + 0.05 * noise), net(PICTURES, PICTURES + 0.2 * noise), PICTURES.roll(1, 0)
    far = net(PICTURES, other)
    assert (one < two).all() and (net(PICTURES, soft) < far).all() and (one < far).all()
    torch.testing.assert_close(far, net(other, PICTURES))
    total = torch.zeros(3)
    for a, b, w in zip(net.net.taps(PICTURES), net.net.taps(other), net.weights, strict=True):
        gap = a / a.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10)
        gap = gap - b / b.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10)
        total += (gap.square() * w[None, :, None, None]).sum(1).mean((1, 2))
    torch.testing.assert_close(far, total)
    assert [len(w) for w in net.weights] == [64, 128, 256, 512, 512] and all((w >= 0).all() for w in net.weights)


def test_the_reward_pulls_a_picture_to_that_of_its_condition() -> None:
    both = {split: [{"kind": "image.perceptual", "least": 32}] for split in ("train", "held_out")}
    recipe = recipes.of({"name": "r", "job": "sample", "steps": 1, "batch": 1, "rewards": both})
    reward = Build(recipe).piece("rewards.train.0")
    x = (PICTURES[:1] + 0.2).clamp(-1, 1).requires_grad_()
    start = reward(x, {"image": PICTURES[1:2]})
    (slope,) = torch.autograd.grad(start.sum(), x)
    moved = (x + 0.02 * slope / slope.abs().max()).detach()
    assert reward(moved, {"image": PICTURES[1:2]}) > start and (reward(PICTURES, {"image": PICTURES}) == 0).all()
