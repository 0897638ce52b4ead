"""What is learned from: the fly's regions, own FASTA windows, near-duplicates on one side."""

import itertools

import torch

from limbeck.core.run.build import Build
from limbeck.core.run.recipe import load
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import alike, data, fly, oracle


def test_no_arm_teaches_both_oracles_and_none_saw_the_test() -> None:
    learned = [set(fly.SPLIT[role]) for role in ("oracle-a", "oracle-b")]
    assert not learned[0] & learned[1] and not set(fly.SPLIT["test"]) & set().union(
        *map(set, (fly.SPLIT["generator"], *learned))
    )


def test_regions_are_unpacked_as_they_were_packed() -> None:
    from limbeck.domains.sequence.build_fly import pack

    bases = torch.randint(4, (3, 8), generator=generator(0, "t", 0)).to(torch.uint8)
    packed = pack(bases)
    assert torch.equal(torch.stack([packed >> s & 3 for s in (0, 2, 4, 6)], -1).flatten(1), bases)
    found = fly.regions()
    assert found.bases.shape == (17036, 2000) and int(found.bases.max()) == 3
    gc = ((found.bases == 1) | (found.bases == 2)).double().mean()
    assert abs(float(gc) - 0.426) < 0.002


def test_distal_windows_that_are_anothers_proximal_ones_are_left_out() -> None:
    start = torch.tensor([0, -1700, 5000], dtype=torch.int32)
    made = fly.Regions(torch.zeros(3, 2000), torch.zeros(3), start, torch.zeros(3, dtype=torch.int32))
    # the second region's last 200 bases are at 100:300, inside the first one's distal window 200:400
    assert fly.overlapping(made).tolist() == [True, False, False]
    turned = fly.Regions(made.bases, made.arm, start, torch.tensor([1, 0, 0], dtype=torch.int32))
    assert fly.interval(turned, 1800, 2000)[0].tolist() == [0, 200] and fly.overlapping(turned).tolist() == [False] * 3


def test_near_duplicates_are_one_group_and_strangers_are_not() -> None:
    gen = generator(0, "t", 0)
    x = torch.randint(4, (60, 200), generator=gen)
    twin = x[:20].clone()
    twin[torch.arange(20), torch.randint(200, (20,), generator=gen)] = 0  # one letter changed: Jaccard above .9
    group = alike.groups(torch.cat([x, twin]), 8, 4)
    assert torch.equal(group[:20], group[60:]) and len(group.unique()) == 60


def test_a_split_keeps_groups_whole() -> None:
    group = torch.arange(30).repeat_interleave(3)
    held = data.split(group, 0.2)
    assert held.view(30, 3).all(1).sum() == held.view(30, 3).any(1).sum() == 6


def test_cuts_cover_a_sequence() -> None:
    assert data.cuts("abcdefg", 3) == ["abc", "def", "efg"] and data.cuts("abcdef", 3) == ["abc", "def"]
    assert data.cuts("abc", 3) == ["abc"] and data.cuts("ab", 3) == []


def test_kmers_are_numbered_in_order() -> None:
    found = alike.words(torch.tensor([[0, 1, 2, 3]]), 2, 4)
    assert found.tolist() == [[1, 6, 11]]
    assert len({int(alike.words(torch.tensor([word]), 2, 4)) for word in itertools.product(range(4), repeat=2)}) == 16


def test_only_the_high_scorers_of_the_oracle_are_learned_from() -> None:
    build = Build(load("sequence/drakes-dna", ["data.among=200", "data.best=0.05"]))
    pool = build.piece("data")
    assert len(pool.best) == 10 and len(pool.train) == len(fly.windows("generator"))  # novelty is against them all
    batch = pool.batch(32, generator(0, "t", 0), slice(None))
    assert {tuple(row) for row in batch.x.tolist()} <= {tuple(row) for row in pool.best.tolist()}
    model = oracle.opened("fly-a", build.device)
    score = lambda ids: oracle.answers(model, ids, 4, build.device).mean(0)  # noqa: E731
    assert float(score(pool.best).min()) > float(score(pool.train[:200]).quantile(0.8))


def test_tuning_starts_from_the_template() -> None:
    recipe = load("sequence/drakes-splice", ["data.regions=16", "data.least=0.5"])
    pool = Build(recipe).piece("data")
    text = recipe.sample.prompts[0]
    assert pool.prompts(3, generator(0, "t", 0)) == [text] * 3 and pool.best is None
    assert (len(text), text[60:62], text[138:140]) == (200, "GT", "AG")
