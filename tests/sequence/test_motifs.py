"""JASPAR motifs: the file, both strands, exact thresholds, occupancy and its gradient, hits, names."""

import itertools

import pytest
import torch

from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import config, motifs, tokens
from limbeck.domains.sequence.text import DNA, complement


def best(found: motifs.Motif) -> str:
    return "".join("ACGT"[i] for i in found.counts.argmax(1).tolist())


def test_the_file_holds_what_jaspar_says() -> None:
    known = motifs.library()
    ctcf = known["MA0139.1"]
    assert len(known) == 1964 and ctcf.name == "CTCF" and ctcf.group == "vertebrates" and ctcf.counts.shape == (19, 4)
    assert "CCACCAGGGGGC" in best(ctcf) and ctcf.counts[0].tolist() == [87.0, 291.0, 76.0, 459.0]


def test_names_ids_and_versions() -> None:
    assert motifs.motif("ma0139.1").id == motifs.motif("MA0139").id == "MA0139.1"
    with pytest.raises(BadInput, match='did you mean "MA0139.1"'):
        motifs.motif("MA01391")
    with pytest.raises(BadInput, match=r"several motifs; give an id: .*MA0139.1 \(vertebrates\)"):
        motifs.motif("CTCF")
    versions = sorted(id for id in motifs.library() if id.startswith("MA0018."))
    assert motifs.motif("MA0018").id == versions[-1] and len(versions) > 1


def test_the_second_strand_is_the_reverse_complement() -> None:
    found = motifs.motif("MA0139.1")
    text = "ACGTTGCAAT" + best(found) + "GGATCA"
    one, two = (tokens.onehot(tokens.encode([t], DNA), 4) for t in (text, complement(text, DNA)))
    a, b = motifs.scan(one, found.scores()), motifs.scan(two, found.scores())
    assert torch.allclose(a[0, 0], b[0, 1].flip(0), atol=1e-4) and int(a[0, 0].argmax()) == 10
    hit = motifs.hits([complement(text, DNA)], found)[0]
    assert [(h.start, h.end, h.strand) for h in hit] == [(6, 25, "-")]
    assert motifs.hits([complement(text, DNA)], found, strands="given") == [[]]
    assert motifs.hits([text.replace(best(found), "N" + best(found)[1:])], found) == [[]]


@pytest.mark.parametrize("gc", [0.5, 0.3])
def test_thresholds_are_exact(gc: float) -> None:
    found = motifs.Motif(
        "x", "x", "", torch.tensor([[9.0, 1, 0, 2], [0, 8, 3, 1], [5, 5, 1, 1], [0, 0, 12, 0], [1, 2, 3, 6]])
    )
    words = torch.tensor(list(itertools.product(range(4), repeat=5)))
    score = found.scores(gc)[torch.arange(5), words].sum(1)
    chance = motifs.background(gc)[words].prod(1)
    for pvalue in (0.2, 0.02, 0.005):
        limit = found.threshold(pvalue, gc) - motifs.BIN / 2
        below = score[score < limit].max()
        assert float(chance[score > limit].sum()) <= pvalue < float(chance[score > below - motifs.BIN / 2].sum())
    assert found.threshold(1e-9) == pytest.approx(float(found.scores().amax(1).sum()), abs=1e-4)


def test_occupancy_is_that_of_independent_windows_and_pulls_a_site_up() -> None:
    found = torch.randn(3, 2, 7, generator=generator(0, "t", 0))
    expected = 1 - (1 - torch.sigmoid(found - 1.0)).flatten(1).prod(1)
    assert torch.allclose(motifs.occupancy(found, 1.0), expected, atol=1e-6)
    for reduce in ("occupancy", "odds", "best"):
        reward = motifs.build(config.Motif(id="MA0139.1", reduce=reduce), None)
        gen = generator(1, "t", 0)
        x = torch.softmax(torch.randn(4, 60, 4, generator=gen), -1).requires_grad_(True)
        reward(x, {}).sum().backward()
        assert float(x.grad.abs().sum()) > 0
        site = best(motifs.motif("MA0139.1"))
        rows = [tokens.onehot(tokens.encode([text], DNA), 4) for text in ("A" * 20 + site + "A" * 21, "A" * 60)]
        values = [float(reward(row, {})) for row in rows]
        assert values[0] > values[1] and (reduce != "occupancy" or (values[0] > 0.99 and values[1] < 0.01))


def test_a_motif_longer_than_the_sequence_is_refused() -> None:
    with pytest.raises(BadInput, match="19 bases cannot be sought in 10 letters"):
        motifs.build(config.Motif(id="MA0139.1"), None)(torch.zeros(1, 10, 4), {})
