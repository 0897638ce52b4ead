"""Numbers on sets of sequences against what can be counted by hand."""

import itertools

import pytest
import torch

from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import statistics, tokens
from limbeck.domains.sequence.text import DNA, PROTEIN, RNA


def ids(*texts: str) -> torch.Tensor:
    return torch.cat([tokens.encode([text], DNA) for text in texts])


def random(n: int, length: int, size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(size, (n, length), generator=generator(seed, "t", 0))


def test_kmers_are_those_counted_in_the_text_and_masks_break_them() -> None:
    x = random(7, 15)
    x[2, 5], x[4, 0] = 4, 4
    found = statistics.kmers(x, 3, 4)
    texts = tokens.decode(x, DNA)
    for i, word in enumerate(itertools.product("ACGT", repeat=3)):
        want = sum(text[s : s + 3] == "".join(word) for text in texts for s in range(13))
        assert int(found[i]) == want, word
    with pytest.raises(BadInput, match="too many to count"):
        statistics.kmers(random(2, 9, 20), 6, 20)
    with pytest.raises(BadInput, match="no k-mer of 6"):
        statistics.kmers(random(2, 5), 6, 4)


def test_kmer_correlation_is_one_for_a_set_in_another_order_and_none_for_a_constant() -> None:
    x = random(50, 100)
    assert statistics.kmer_pearson(x, x.flip(0), 3) == pytest.approx(1)
    assert abs(statistics.kmer_pearson(x, random(50, 100, seed=1), 6)) < 0.1
    assert statistics.pearson(torch.ones(5), torch.arange(5)) == 0


def test_identity_is_the_mean_over_all_pairs() -> None:
    x = random(9, 20)
    x[3, 4] = 4
    pairs = [float(((a == b) & (a < 4)).double().mean()) for a, b in itertools.combinations(x, 2)]
    assert statistics.identity(x, 4) == pytest.approx(sum(pairs) / len(pairs))
    assert statistics.diversity(x[:1].expand(5, -1), 4) == pytest.approx(1 / 20 if 4 in x[:1] else 0)
    assert statistics.identity(x[:1], 4) == 1


def test_novelty_sees_a_copy_that_has_moved() -> None:
    natural = random(300, 40)
    moved = torch.cat([random(1, 2, seed=5)[0], natural[7, :-2]])[None]
    far = torch.cat([random(1, 9, seed=5)[0], natural[7, :-9]])[None]
    assert float(statistics.novelty(natural[7:8], natural, 4)) == 0
    assert float(statistics.novelty(moved, natural, 4, shifts=2)) == pytest.approx(2 / 40)
    assert float(statistics.novelty(moved.flip(1), natural.flip(1), 4, shifts=2)) == pytest.approx(2 / 40)
    assert float(statistics.novelty(moved, natural, 4, shifts=1)) > 0.3
    assert float(statistics.novelty(far, natural, 4)) > 0.3
    assert torch.equal(statistics.nearest(moved, natural, 4, chunk=7), statistics.nearest(moved, natural, 4))
    with pytest.raises(BadInput, match="one length"):
        statistics.novelty(random(1, 8), natural, 4)


def test_gc_of_dna_and_rna() -> None:
    x = torch.tensor([[0, 1, 2, 3], [1, 1, 4, 2]])
    assert statistics.gc(x, DNA).tolist() == [0.5, 1.0] and statistics.gc(x, RNA).tolist() == [0.5, 1.0]
    assert statistics.gc(tokens.encode(["CGAA"], PROTEIN), PROTEIN).tolist() == [0.5]


def test_nulls_keep_what_they_should_and_lose_the_rest() -> None:
    gen = generator(0, "null", 0)
    words = ids("ACGTAC", "GGATCC", "TTAACG")[torch.randint(3, (200, 20), generator=gen)].flatten(1)
    mixed = statistics.shuffled(words, gen)
    assert torch.equal(mixed.sort(1).values, words.sort(1).values) and not torch.equal(mixed, words)
    chain = statistics.markov(words, 400, 4, gen)
    two = [statistics.kmer_pearson(words, x, 2) for x in (mixed, chain)]
    four = [statistics.kmer_pearson(words, x, 4) for x in (chain, statistics.markov(mixed, 400, 4, gen))]
    assert two[1] > 0.995 > two[0] and four[1] < four[0] < 0.9


def test_a_chain_goes_on_after_a_letter_that_has_no_step() -> None:
    chain = statistics.markov(ids("AAAC", "AAAC"), 300, 4, generator(0, "t", 0))
    after = chain[:, 1:][chain[:, :-1] == 1]
    assert set(chain.unique().tolist()) == {0, 1} and len(after) > 20
    assert abs(float((after == 1).double().mean()) - 0.25) < 0.15
