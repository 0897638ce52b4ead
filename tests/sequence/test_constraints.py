"""Hard constraints: no design breaks a rule, lax rules change nothing, conflicts are named before the first step."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Model
from limbeck.core.diffusion.discrete import DiscretePrediction, MaskProcess, TokenKernel
from limbeck.core.diffusion.sampling import trajectory
from limbeck.core.run.errors import BadInput, LimbeckError
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import constraints, tokens
from limbeck.domains.sequence.config import Design
from limbeck.domains.sequence.models import Templates
from limbeck.domains.sequence.text import DNA, PROTEIN, RNA, Alphabet


class Flat(Denoiser):
    """Every letter is as likely as any other."""

    def __init__(self, size: int) -> None:
        super().__init__(MaskProcess(size), "logp")

    def forward(self, x_t, t, cond, features=False):
        assert "allowed" not in cond  # a net's own conditions alone reach it
        return torch.zeros(*x_t.shape[:2], self.process.vocab + 1)

    def wrap(self, raw, x_t, t, features=None):
        return DiscretePrediction(raw, x_t, t, self.process, self.kind, features)


def plain(length: int, alphabet: Alphabet = DNA) -> Model:
    encode = Templates(alphabet, length, torch.device("cpu"))
    return Model(Flat(alphabet.size), (length,), tokens.Letters(alphabet), encode, "flat", place=encode.place)


def designed(length: int, alphabet: Alphabet = DNA, **rules) -> Model:
    return constraints.constrained_model(plain(length, alphabet), Design(**rules), alphabet)


def walk(model: Model, count: int, kernel=None, steps: int = 8, prompt: str = "", seed: int = 0) -> list[str]:
    grid, cond = model.grid(steps), model.encode([prompt] * count)
    if kernel is not None:
        grid = torch.linspace(1, 0, steps + 1)
    x = model.begin(torch.randn(count, *model.shape, generator=generator(seed, "t", 0)), grid[0].expand(count), cond)
    with torch.no_grad():
        for step in trajectory(model.denoiser, kernel or model.kernel, x, grid, cond, generator(seed, "w", 0)):
            x = step.x_next
    return tokens.decode(x, model.codec.alphabet)


STRICT = {"avoid": "GAATTC, GGTCTC,TATAWR", "gc": "0.45-0.5", "homopolymer": 2}


def test_designs_under_strict_rules_break_none() -> None:
    model = designed(60, template="ATG" + "N" * 54 + "TRA", **STRICT)
    texts = walk(model, 256)
    assert constraints.violations(texts, model.denoiser.rules) == []
    assert all(text[:3] == "ATG" and text[57:] in ("TAA", "TGA") for text in texts) and len(set(texts)) == 256


def test_the_check_sees_what_free_designs_break() -> None:
    texts, rules = walk(designed(60), 256), designed(60, **STRICT).denoiser.rules
    found = "\n".join(constraints.violations(texts, rules))
    assert "forbidden TATAWR" in found and "in a row" in found and "are G or C" in found


def test_letters_revealed_together_break_rules_and_are_seen() -> None:
    """The planted fault: MDLM's parallel step draws places independently, so that masking alone is no guarantee."""
    model = designed(60, **STRICT)
    assert constraints.violations(walk(model, 64, TokenKernel(), steps=1), model.denoiser.rules)
    with pytest.raises(LimbeckError, match="reveal one letter a step"):
        walk(model, 64, TokenKernel(), steps=6)


def brute(rules: constraints.Rules, admitted: Tensor) -> Tensor:
    """open() by trying every sequence [L,V]."""
    out = torch.zeros_like(admitted)
    free = constraints.replace(rules, template=rules.alphabet.any * rules.length, omit="")
    for row in itertools.product(*(r.nonzero()[:, 0].tolist() for r in admitted)):
        if not constraints.violations(["".join(rules.alphabet.letters[i] for i in row)], free):
            out[torch.arange(len(row)), torch.tensor(row)] = True
    return out


@pytest.mark.parametrize("seed", range(12))
def test_open_letters_are_those_of_all_sequences_that_keep_the_rules(seed: int) -> None:
    gen = generator(seed, "brute", 0)
    pick = lambda n: int(torch.randint(n, (1,), generator=gen))  # noqa: E731
    codes = "ACGTACGTRYSWN"
    words = ",".join("".join(codes[pick(13)] for _ in range(2 + pick(3))) + "ACGT"[pick(4)] for _ in range(1 + pick(3)))
    gc = [None, (2, 4), (3, 3)][seed % 3]
    rules = constraints.Rules(DNA, 6, "N" * 6, constraints.words_of(words, DNA), [None, 1, 2, 3][seed % 4], gc)
    ids = torch.randint(9, (6,), generator=gen).clamp(max=4)
    admitted = torch.where((ids == 4)[:, None], torch.rand(6, 4, generator=gen) < 0.8, tokens.onehot(ids, 4).bool())
    assert torch.equal(rules.open(admitted[None])[0], brute(rules, admitted)), (words, gc, ids)


class Shortsighted(constraints.Rules):
    """Planted: each place looks at its known neighbours alone, not at what the places after it will need."""

    def open(self, admitted: Tensor) -> Tensor:
        pairs = {tuple(self.alphabet.letters.index(letter) for letter in word) for word in self.forbidden}
        out, known = admitted.clone(), admitted.sum(-1) == 1
        for b, i in (~known).nonzero().tolist():
            for v in range(self.alphabet.size):
                left = i > 0 and bool(known[b, i - 1]) and (int(admitted[b, i - 1].int().argmax()), v) in pairs
                right = i + 1 < self.length and bool(known[b, i + 1])
                right = right and (v, int(admitted[b, i + 1].int().argmax())) in pairs
                out[b, i, v] &= not (left or right)
        return out


def test_looking_one_word_ahead_alone_gets_stuck() -> None:
    """Runs of one and a forbidden pair on both strands leave dead ends that only the look to the end avoids."""
    model = designed(24, template="N" * 24, avoid="AC,GT,TA,CG", homopolymer=1)
    assert constraints.violations(walk(model, 64), model.denoiser.rules) == []
    rules = model.denoiser.rules
    model.denoiser.rules = Shortsighted(**{f.name: getattr(rules, f.name) for f in dataclasses.fields(rules)})
    with pytest.raises(LimbeckError, match="no sequence keeps all rules"):
        walk(model, 64)


def test_lax_rules_leave_the_law_alone() -> None:
    """GC of a flat model within wide bounds is binomial, cut at the bounds: chi-squared against it."""
    n, length, low, high = 4096, 20, 6, 14
    texts = walk(designed(length, gc="0.3-0.7"), n, seed=3)
    counts = torch.bincount(torch.tensor([sum(c in "GC" for c in text) for text in texts]), minlength=length + 1)
    assert int(counts[:low].sum() + counts[high + 1 :].sum()) == 0
    share = counts.double() / n
    k = torch.arange(length + 1).double()
    law = (
        torch.lgamma(torch.tensor(length + 1.0)) - torch.lgamma(k + 1) - torch.lgamma(length - k + 1)
    ).exp() / 2**length
    inner = slice(low + 1, high)  # at the bounds themselves the walk puts some of what it cuts off
    assert float((share[inner] - law[inner]).abs().max()) < 4 * (0.18 / n) ** 0.5
    free = walk(designed(length), 64, seed=3)
    assert free == walk(designed(length, gc="0.0-1.0", homopolymer=20), 64, seed=3)  # rules that forbid nothing


def test_bias_and_omissions_of_proteins() -> None:
    texts = walk(designed(30, PROTEIN, omit="C,M", bias={"A": 2.0}, homopolymer=3), 128)
    share = sum(text.count("A") for text in texts) / (30 * 128)
    expected = torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 17)
    assert not set("CM") & set("".join(texts)) and abs(share - float(expected)) < 0.05
    assert not any("AAAA" in text for text in texts)


def test_a_prompt_joins_the_design() -> None:
    model = designed(12, template="ATG" + "N" * 9, avoid="GAATTC")
    texts = walk(model, 32, prompt="NNNGAAYYCNNN")
    assert all(text.startswith("ATGGAA") for text in texts) and not any("GAATTC" in text for text in texts)
    with pytest.raises(BadInput, match="asks for C at position 1"):
        model.encode(["CNNNNNNNNNNN"])
    with pytest.raises(BadInput, match="in conflict: avoid"):
        model.encode(["NNNGAATTCNNN"])


@pytest.mark.parametrize(
    ("alphabet", "rules", "message"),
    [
        (DNA, {"gc": "0.6-0.4"}, "runs backwards; write 0.4-0.6"),
        (DNA, {"gc": "40-60"}, "no range of shares"),
        (DNA, {"gc": "half"}, "no range of shares"),
        (DNA, {"gc": "0.51-0.54"}, "no number of G and C in 12 letters"),
        (PROTEIN, {"gc": "0.4-0.6"}, "a protein has no G and C"),
        (DNA, {"template": "NNN"}, "has 3 letters and the model 12"),
        (DNA, {"template": "NNNGAATTCNNN", "avoid": "GAATTC"}, "forbidden GAATTC at position 4"),
        (DNA, {"template": "NNNGAGACCNNN", "avoid": "GGTCTC"}, "forbidden GAGACC at position 4"),
        (DNA, {"template": "NAAAANNNNNNN", "homopolymer": 3}, "4 A in a row at position 2"),
        (DNA, {"template": "WWWWWWWWWWWN", "gc": "0.5-0.6"}, "in conflict: gc, template"),
        (DNA, {"avoid": "N"}, "in conflict: avoid"),
        (DNA, {"avoid": "GATTACX"}, "X at position 7"),
        (DNA, {"omit": "GC", "gc": "0.4-0.6"}, "in conflict: gc, template or omit"),
        (DNA, {"omit": "AG", "template": "NNRNNNNNNNNN"}, "no letter for R at position 3"),
        (PROTEIN, {"bias": {"B": 1.0}}, "is not one of ACDEF"),
        (DNA, {"bias": {"U": 1.0}}, "is not one of ACGT"),
    ],
)
def test_errors_name_what_to_change(alphabet: Alphabet, rules: dict, message: str) -> None:
    with pytest.raises(BadInput) as error:
        designed(12, alphabet, **rules)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rna_has_one_strand_and_dna_two() -> None:
    assert constraints.words_of("GGTCTC", DNA) == ("GGTCTC", "GAGACC")
    assert constraints.words_of("GGTCTC", RNA) == ("GGUCUC",) and constraints.words_of("GAATTC", DNA) == ("GAATTC",)


def test_the_rules_follow_rows_and_soft_states() -> None:
    model = designed(12, avoid="GAATTC")
    x = tokens.encode(["NNNGAANTCNNN", "N" * 12], DNA)
    open_ = model.denoiser.open(x, model.encode(["", ""]))
    assert open_[0, 6].tolist() == [True, True, True, False] and bool(open_[1].all())
    assert torch.equal(model.denoiser.open(tokens.rows(x, 4), {}), open_)
    assert torch.equal(model.denoiser.open(x[[1, 0]], {}), open_[[1, 0]])
