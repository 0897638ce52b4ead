"""Classifier guidance on tokens: exact where the first order is, and refused without a gradient."""

import pytest
import torch

from limbeck.core.diffusion.mixture import GaussianMixture
from limbeck.core.diffusion.process import VP
from limbeck.core.steering.checks import Pairs, cg_tilt
from limbeck.core.steering.gradient import GradientGuided

PAIRS = Pairs.of()


def test_the_checks_pass() -> None:
    assert [check.name for check in cg_tilt() if not check.passed] == []


def test_the_wrong_sign_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    slope = GradientGuided.slope
    monkeypatch.setattr(GradientGuided, "slope", lambda self, logp: -slope(self, logp))
    assert [check.name for check in cg_tilt() if not check.passed] == ["scale 2: from the tilt", "one letter a step"]


def test_known_letters_stay() -> None:
    guided = GradientGuided(PAIRS.teacher, PAIRS.linear, 50.0)
    pred = guided.predict(torch.tensor([[2, 3]]), torch.tensor([0.5]), {})
    assert pred.logp_x0[0, 0].argmax() == 2 and float(pred.logp_x0[0, 0].exp().max()) == pytest.approx(1.0)


def test_continuous_models_are_refused() -> None:
    hills = GaussianMixture(torch.zeros(1, 2), 1.0, VP())
    with pytest.raises(ValueError, match="for tokens"):
        GradientGuided(hills, PAIRS.linear, 1.0).predict(torch.zeros(1, 2), torch.tensor([0.5]), {})
