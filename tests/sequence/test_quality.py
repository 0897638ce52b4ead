"""The quality table: every number against what it must be for sequences whose answer is known."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.rewards.base import Reward
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence import export, fasta, quality, tokens
from limbeck.domains.sequence.data import Pool
from limbeck.domains.sequence.text import DNA, PROTEIN

LENGTH = 24


def strong(x: torch.Tensor, cond: Any, *, t: Any, gen: Any) -> torch.Tensor:
    """The share of G and C, of ids [B,L]."""
    return ((x == 1) | (x == 2)).float().mean(1)


def pool() -> Pool:
    """Natural sequences of the words ACG, TTA and GGC."""
    words = tokens.encode(["ACG", "TTA", "GGC"], DNA)
    pick = torch.randint(3, (900, LENGTH // 3), generator=generator(0, "words", 0))
    found = words[pick].flatten(1)
    return Pool(found[:300], found[300:])


@pytest.fixture
def built(tiny: Any, tmp_path: Path) -> Callable[..., Build]:
    """A design recipe around the tiny model, with natural sequences and a reward that need no file."""

    def make(natural: bool = True, **changes: Any) -> Build:
        oracle = {"kind": "sequence.oracle", "model": "unused"}
        data = {
            "name": "designs", "job": "sample", "steps": 1, "batch": 1,
            "teacher": {"kind": "sequence.fresh", "length": LENGTH}, "space": {"kind": "sequence.designs"},
            "data": {"kind": "sequence.windows"} if natural else None,
            "rewards": {"train": [oracle], "held_out": [oracle]},
            "eval": [{"kind": "sequence.quality", "count": 40, "pool": 500, "steps": 6, "kmer": 3, "levels": 8}],
        }  # fmt: skip
        build = Build(recipes.of({**data, **changes}), folder=tmp_path)
        build._pieces["teacher"] = tiny.tiny_model(DNA, LENGTH)
        build._pieces["data"] = pool()
        for split in ("train", "held_out"):
            build._pieces[f"rewards.{split}.0"] = Reward(strong, "strong", "tokens")
        return build

    return make


def table(build: Build) -> dict[str, Any]:
    (build.folder / "samples").mkdir(exist_ok=True)
    return {row["generator"]: row for row in build.piece("eval.0")()}


def test_the_sampler_is_the_runs_own_row_beside_the_model_and_the_nulls(
    built: Callable[..., Build], tmp_path: Path
) -> None:
    found = table(built(sampler={"kind": "best_of", "n": 8, "walk": {"steps": 6}}))
    assert list(found) == ["pretrained", "student", "natural", "Markov", "shuffled"]
    own, before = found["student"], found["pretrained"]
    assert own["by"] == "best_of" and own["calls"] == 48 and before["calls"] == 6
    assert own["train: strong"] > before["train: strong"] and own["GC"] > before["GC"]
    assert found["natural"]["3-mer Pearson"] > 0.95 > found["Markov"]["3-mer Pearson"]
    assert found["Markov"]["3-mer Pearson"] > found["shuffled"]["3-mer Pearson"]
    assert found["shuffled"]["GC"] == pytest.approx(found["natural"]["GC"])
    assert found["natural"]["novelty"] == "" and found["shuffled"]["novelty"] > 0.1
    files = {path.name for path in (tmp_path / "samples").iterdir()}
    assert {"designs.fasta", "designs.csv", "logo.png", "kmers.png"} <= files
    assert len(fasta.read(tmp_path / "samples" / "designs.fasta", DNA)) == 40
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_high_scorers_are_those_that_the_trained_reward_likes(built: Callable[..., Build]) -> None:
    build = built()
    config = build.recipe.eval[0]
    natural = quality.naturals(config, build)
    assert natural and len(natural.other) == 25 and len(natural.reference) == 25 and len(natural.known) == 900
    best = torch.cat([natural.reference, natural.other])
    asked = build.piece("data").natural(500, generator(0, "quality.natural", 0))
    cut = strong(asked, {}, t=None, gen=None).sort(descending=True).values[49]
    assert float(strong(best, {}, t=None, gen=None).min()) == float(cut)


def test_an_unchanged_student_is_its_teacher_and_a_teacher_can_stand_alone(built: Callable[..., Build]) -> None:
    found = table(built(student={"kind": "sequence.tuned", "steps": 6}))
    same = ("train: strong", "3-mer Pearson", "log-likelihood a letter", "diversity", "novelty", "GC")
    assert [found["student"][key] for key in same] == [found["pretrained"][key] for key in same]
    alone = table(built(natural=False, rewards=None))
    assert list(alone) == ["pretrained"]
    assert not {"train: strong", "3-mer Pearson", "novelty"} & set(alone["pretrained"])


def test_the_likelihood_of_a_model_of_independent_letters_is_exact(built: Callable[..., Build]) -> None:
    build = built()
    model = build.piece("teacher")
    for value in model.denoiser.parameters():
        value.data.zero_()
    share = torch.tensor([0.4, 0.3, 0.2, 0.1])
    model.denoiser.network.net.second.bias.data.copy_(share.log())
    x = torch.randint(4, (300, LENGTH), generator=generator(0, "t", 0))
    found = quality.log_likelihood(model, x, [""] * 300, 0, levels=16)
    # each letter is hidden with chance t, and t = k/16 weighs 1/k: every time adds a sixteenth of log p;
    # the mean's own deviation is .17
    want = share.log()[x].double().sum(1)
    assert float((found - want).mean()) == pytest.approx(0, abs=0.6) and found.shape == (300,)
    assert torch.equal(found, quality.log_likelihood(model, x, [""] * 300, 0, levels=16, chunk=7))
    halved = quality.log_likelihood(model, x, [""] * 300, 0, levels=1)
    assert torch.allclose(halved, want, atol=1e-3)  # the one time is t = 1: everything is hidden


def test_medians_and_the_percentile_of_the_held_out_sum(built: Callable[..., Build]) -> None:
    build = built()
    x = torch.zeros(41, LENGTH, dtype=torch.long)
    for i in range(24):
        x[i, : i + 1] = 1
    row = quality.rewards(quality.scored(build, quality.Made("student", "x", x, [""] * 41)))
    values = sorted(strong(x, {}, t=None, gen=None).tolist())
    assert row["train: strong"] == pytest.approx(values[20])
    assert row["held_out: 95th percentile"] == pytest.approx(values[38]) and math.isclose(
        values[38], 22 / 24, abs_tol=1e-6
    )


def test_gains_are_paired_with_the_pretrained_models_samples(built: Callable[..., Build]) -> None:
    build = built()
    before = torch.randint(4, (40, LENGTH), generator=generator(0, "before", 0))
    after = torch.where(torch.rand(before.shape, generator=generator(0, "how", 0)) < 0.3, 1, before)
    values = [quality.scored(build, quality.Made("x", "x", ids, [""] * 40)) for ids in (before, after)]
    found = quality.gains(*values)
    was, now = (strong(x, {}, t=None, gen=None).double() for x in (before, after))
    change, half = now - was, 1.96 * float((now - was).std()) / 40**0.5
    for split in ("train", "held_out"):
        got = [found[f"{split}: strong: {key}"] for key in ("gain", "low", "high", "in sd")]
        want = [float(change.mean()), float(change.mean()) - half, float(change.mean()) + half]
        assert got == pytest.approx([*want, float(change.mean() / was.std())], abs=1e-6)
    assert found["train: strong: low"] > 0 and half < 1.96 * float((was.var() + now.var()).sqrt()) / 40**0.5
    rows = table(built(sampler={"kind": "best_of", "n": 4, "walk": {"steps": 6}}))
    own, plain = rows.pop("student"), rows.pop("pretrained")
    assert own["train: strong: low"] < own["train: strong: gain"] < own["train: strong: high"]
    assert "train: strong: gain" not in plain and not any("train: strong: gain" in row for row in rows.values())
    still = table(built(student={"kind": "sequence.tuned", "steps": 6}))["student"]  # the teacher, from the same noise
    assert [still[f"train: strong: {key}"] for key in ("gain", "low", "high", "in sd")] == [0.0] * 4


def test_proteins_tell_the_relative_change_of_the_likelihood() -> None:
    name = "held_out: -NLL soluble_v_48_020 (sibling model)"
    before, after = torch.tensor([-1.0, -1.4, -1.2]), torch.tensor([-1.1, -1.5, -1.36])
    found = quality.gains({name: before, "held_out": before}, {name: after, "held_out": after})
    assert found["held_out: NLL soluble_v_48_020 (sibling model): relative change"] == pytest.approx(0.1, abs=1e-6)
    assert found[f"{name}: gain"] == pytest.approx(-0.12, abs=1e-6) and len(found) == 5


def test_recovery_is_of_the_native_letters_that_were_free(built: Callable[..., Build], tiny: Any) -> None:
    model = tiny.tiny_model(PROTEIN, 4)
    made = quality.Made("x", "x", tokens.encode(["ACDE", "WCDY"], PROTEIN), ["", "XCXX"])
    assert quality.recovery(model, made) == {}  # nobody knows what is native
    model.codec.native = "ACXE"
    assert quality.recovery(model, made) == {"native recovery": pytest.approx(3 / 5)}  # A C E, and neither W nor Y
    assert quality.recovery(model, quality.Made("x", "x", made.ids, ["ACDE", "WCDY"])) == {}


def test_templates_are_what_is_designed(built: Callable[..., Build]) -> None:
    template = "GGGG" + "N" * (LENGTH - 4)
    build = built(sample={"prompts": [template, ""]})
    config = build.recipe.eval[0]
    made = list(quality.drawn(config, build))
    assert len(made) == 1 and all(text.startswith("GGGG") for text in tokens.decode(made[0].ids, DNA))


def test_natural_sequences_of_another_length_or_kind_are_refused(built: Callable[..., Build], tmp_path: Path) -> None:
    build = built()
    build._pieces["data"] = Pool(torch.zeros(20, 9, dtype=torch.long), torch.zeros(20, 9, dtype=torch.long))
    with pytest.raises(BadInput, match="have 9 letters and the model 24"):
        table(build)
    (tmp_path / "own.csv").write_text(
        "sequence,value\n" + "".join(f"{text},{i}\n" for i, text in enumerate(tokens.decode(pool().train[:60], DNA)))
    )
    asked = {"kind": "sequence.quality", "natural": {"kind": "sequence.table", "path": str(tmp_path / "own.csv")}}
    with pytest.raises(BadInput, match=r"sequence.table has no natural sequences"):
        table(built(eval=[asked]))


def test_proteins_have_words_of_three_and_no_gc(built: Callable[..., Build], tiny: Any) -> None:
    build = built(natural=False, rewards=None)
    build._pieces["teacher"] = tiny.tiny_model(PROTEIN, LENGTH)
    found = table(build)["pretrained"]
    assert "GC" not in found and quality.kmer(settings.Quality(), "protein") == 3
    assert quality.kmer(settings.Quality(), "dna") == 6 and export.letters(build.piece("teacher")) is PROTEIN
