"""Muon: torch's own on matrices, AdamW on the rest, exact state."""

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.run.config import OptimConfig
from limbeck.core.run.muon import Muon, is_matrix, orthogonal
from limbeck.core.run.players import Player

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def updates(p: nn.Parameter, optim: torch.optim.Optimizer, steps: int = 4) -> Tensor:
    for step in range(steps):
        p.grad = draw(*p.shape, seed=step)
        optim.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_matrices_move_as_with_torchs_muon(shape: tuple[int, int]) -> None:
    mine, theirs = (nn.Parameter(draw(*shape, seed=9)) for _ in range(2))
    torchs = torch.optim.Muon([theirs], ns_steps=3, momentum=0.95, adjust_lr_fn="match_rms_adamw", **SETTINGS)
    ours = Muon([mine], betas=(0.95, 0.99), eps=1e-8, **SETTINGS)
    moved = updates(theirs, torchs) - draw(*shape, seed=9)
    assert (updates(mine, ours) - theirs.detach()).norm() < 0.02 * moved.norm()  # bfloat16 rounds apart


def test_a_convolution_is_the_matrix_of_its_outputs() -> None:
    conv, flat = nn.Parameter(draw(32, 8, 3, 3)), nn.Parameter(draw(32, 8, 3, 3).flatten(1))
    kinds = [Muon([p], betas=(0.95, 0.99), eps=1e-8, **SETTINGS) for p in (conv, flat)]
    for step in range(2):
        conv.grad = draw(32, 8, 3, 3, seed=step)
        flat.grad = conv.grad.flatten(1)
        for optim in kinds:
            optim.step()
    assert torch.equal(conv.flatten(1), flat)


def test_matrices_of_one_shape_go_together_as_they_go_alone() -> None:
    def pair() -> list[nn.Parameter]:
        return [nn.Parameter(draw(40, 36, seed=k)) for k in range(2)]

    together, alone = pair(), pair()
    kinds = [Muon(together, betas=(0.95, 0.99), eps=1e-8, **SETTINGS)]
    kinds += [Muon([p], betas=(0.95, 0.99), eps=1e-8, **SETTINGS) for p in alone]
    for p, q, seed in zip(together, alone, (3, 4), strict=True):
        p.grad, q.grad = draw(40, 36, seed=seed), draw(40, 36, seed=seed)
    for optim in kinds:
        optim.step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))


@pytest.mark.parametrize("shape", [(64,), (3, 64), (64, 3)])
def test_the_rest_moves_as_with_adamw(shape: tuple[int, ...]) -> None:
    mine, theirs = (nn.Parameter(draw(*shape)) for _ in range(2))
    assert not is_matrix(mine)
    adamw = torch.optim.AdamW([theirs], betas=(0.9, 0.99), eps=1e-8, **SETTINGS)
    ours = updates(mine, Muon([mine], betas=(0.9, 0.99), eps=1e-8, **SETTINGS))
    torch.testing.assert_close(ours, updates(theirs, adamw))


@pytest.mark.parametrize("shape", [(32, 288), (288, 32), (64, 100)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(draw(1, *shape)))
    assert values.max() < 1.3 and values.min() > 0.5


def test_state_comes_back_bit_for_bit() -> None:
    def make() -> Player:
        net = nn.Linear(40, 36)
        net.load_state_dict({"weight": draw(36, 40), "bias": draw(36)})
        return Player("p", net, OptimConfig(kind="muon", lr=0.01, weight_decay=0.1), 10)

    def train(player: Player, steps: range) -> None:
        for step in steps:
            for p in player.tensors:
                p.grad = draw(*p.shape, seed=step)
            player.step(step)

    whole, first, second = make(), make(), make()
    train(whole, range(4))
    train(first, range(2))
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    train(second, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, second.tensors, strict=True))
