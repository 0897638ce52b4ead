"""Ehrlich functions (optimum, bans, steps) and the simple rewards."""

import importlib
import types

import pytest
import torch

from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import config, ehrlich, simple, tokens
from limbeck.domains.sequence.text import DNA, RNA

SHAPES = [(4, 2, 4, 60, 4), (4, 3, 3, 12, 3), (20, 4, 4, 32, 2), (20, 8, 4, 200, 4), (4, 1, 1, 5, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_the_constructed_optimum_is_one_and_a_banned_pair_makes_it_zero(shape: tuple[int, ...], seed: int) -> None:
    f = ehrlich.make(*shape, seed)
    best = f.optimum()
    assert best.shape == (f.length,) and float(f(best[None])) == 1.0
    a, b = f.banned.nonzero()[0].tolist()
    broken = best.clone()
    broken[-2:] = torch.tensor([a, b])
    assert float(f(broken[None])) == 0.0
    assert f.banned.any(1).all() and not f.banned.diagonal().any()
    assert all(len(set(motif)) == len(motif) for motif in f.motifs.tolist())


def test_every_letter_can_be_reached_from_every_other() -> None:
    for seed in range(20):
        reach = (~ehrlich.make(4, 2, 4, 60, 4, seed).banned).double()
        assert bool((torch.linalg.matrix_power(reach, 4) > 0).all())


def test_presence_falls_by_exact_steps() -> None:
    f = ehrlich.Ehrlich(torch.zeros(4, 4).bool(), torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 2, 3, 7]]), 4, 12)
    x = torch.full((12,), 1)
    values = []
    for letter, place in ((0, 1), (2, 4), (3, 8)):
        values.append(float(f(x[None])))
        x[place] = letter
    assert [*values, float(f(x[None]))] == [0.25, 0.5, 0.75, 1.0]
    coarse = ehrlich.Ehrlich(f.banned, f.motifs, f.offsets, 2, 12)
    x[8] = 1
    assert float(coarse(x[None])) == 0.5  # three of four letters are floor(2 * 3/4)/2


def test_random_search_stays_far_below() -> None:
    f = ehrlich.make(20, 4, 4, 64, 4, 0)
    x = torch.randint(20, (20_000, 64), generator=generator(0, "t", 0))
    assert float(f(x).max()) < 0.3 and float(f.feasible(x).double().mean()) < 0.01


def test_numbers_that_do_not_go_together_are_refused() -> None:
    for shape, text in (
        ((4, 2, 5, 60, 4), "as many"),
        ((4, 4, 4, 12, 4), "do not fit"),
        ((4, 2, 3, 60, 4), "quantise 4"),
    ):
        with pytest.raises(BadInput, match=text):
            ehrlich.make(*shape, 0)
    reward = ehrlich.ehrlich(config.Ehrlich(length=30, motif=3), None)
    assert float(reward(ehrlich.make(4, 2, 3, 30, 3, 0).optimum()[None], {})) == 1.0
    with pytest.raises(BadInput, match="length is 30"):
        reward(torch.zeros(1, 29, dtype=torch.int64), {})


def test_gc_is_nothing_inside_and_the_distance_outside() -> None:
    reward = simple.gc(config.Gc(low=0.4, high=0.6), None)
    x = tokens.onehot(tokens.encode(["GCGCGAAAAA", "GCGCGCGCAA", "GAAAAAAAAA"], DNA), 4).requires_grad_(True)
    found = reward(x, {})
    assert found.tolist() == pytest.approx([0.0, -0.2, -0.3], abs=1e-6)
    found.sum().backward()
    assert float(x.grad[0].abs().sum()) == 0 and bool((x.grad[1, :, 1:3] < 0).all() and (x.grad[2, :, 1:3] > 0).all())
    with pytest.raises(BadInput, match="exchange them"):
        simple.gc(config.Gc(low=0.6, high=0.4), None)


def test_longest_run() -> None:
    x = tokens.encode(["ACGTACGT", "AAAAACGT", "ACGTTTTT", "ACCCCCCG"], DNA)
    assert simple.longest_run(x).tolist() == [1, 5, 5, 6]
    assert simple.homopolymer(config.Homopolymer(longest=4), None)(x, {}).tolist() == [0, -1, -1, -2]


def test_folding_needs_its_package_and_names_the_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "RNA", None)
    with pytest.raises(BadInput, match="pip install ViennaRNA.*own licence"):
        simple.fold(config.Fold(), None)


def test_folding_is_energy_a_base(monkeypatch: pytest.MonkeyPatch) -> None:
    said = types.SimpleNamespace(fold=lambda text: ("." * len(text), -1.5 if text == "GCGCAAAAGCGC" else 0.0))
    monkeypatch.setitem(importlib.import_module("sys").modules, "RNA", said)
    x = tokens.encode(["GCGCAAAAGCGC", "AAAAAAAAAAAU"], RNA)
    assert simple.fold(config.Fold(), None)(x, {}).tolist() == pytest.approx([0.125, 0])
    assert simple.fold(config.Fold(goal="open"), None)(x, {}).tolist() == pytest.approx([-0.125, 0])
