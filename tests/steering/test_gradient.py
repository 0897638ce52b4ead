"""Classifier guidance on tokens: exact where the first order is, and refused without a gradient."""

import pytest
import torch
from torch import Tensor

from limbeck.core.diffusion.discrete import FirstHitting, MaskProcess
from limbeck.core.diffusion.mixture import GaussianMixture, TokenTable
from limbeck.core.diffusion.process import VP
from limbeck.core.diffusion.sampling import mask, times, trajectory
from limbeck.core.steering.gradient import GradientGuided

LETTERS = torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.7, -0.6]], dtype=torch.float64)
SINGLE = torch.softmax(torch.tensor([[0.3, 0.1, -0.5], [0.0, 1.0, 0.2]], dtype=torch.float64), 1)
TEACHER = TokenTable(SINGLE[0][:, None] * SINGLE[1], MaskProcess(3))


def linear(rows: Tensor) -> Tensor:
    return (rows.double() * LETTERS).sum((1, 2))


def law(scale: float, kernel: object) -> Tensor:
    gen, x = torch.Generator().manual_seed(0), torch.full((40000, 2), 3)
    guided = GradientGuided(TEACHER, linear, scale)
    for step in trajectory(guided, kernel, x, times(8, MaskProcess(3)), gen=gen):
        x = step.x_next
    return torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9).double() / len(x)


@pytest.mark.parametrize("kernel", [mask(), FirstHitting()], ids=["mask", "first_hitting"])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_a_linear_reward_on_independent_letters_is_tilted_exactly(scale: float, kernel: object) -> None:
    tilted = [SINGLE[i] * torch.exp(scale * LETTERS[i]) for i in range(2)]
    want = (tilted[0] / tilted[0].sum())[:, None] * (tilted[1] / tilted[1].sum())
    found = law(scale, kernel)
    assert float((found - want.flatten()).abs().sum() / 2) < 0.01
    other = (SINGLE[0][:, None] * SINGLE[1]).flatten()
    assert scale == 0 or float((found - other).abs().sum() / 2) > 0.2  # the wrong sign, or none, would be seen


def test_known_letters_stay() -> None:
    guided = GradientGuided(TEACHER, linear, 50.0)
    pred = guided.predict(torch.tensor([[2, 3]]), torch.tensor([0.5]), {})
    assert pred.logp_x0[0, 0].argmax() == 2 and float(pred.logp_x0[0, 0].exp().max()) == pytest.approx(1.0)


def test_continuous_models_are_refused() -> None:
    hills = GaussianMixture(torch.zeros(1, 2), 1.0, VP())
    with pytest.raises(ValueError, match="for tokens"):
        GradientGuided(hills, linear, 1.0).predict(torch.zeros(1, 2), torch.tensor([0.5]), {})
