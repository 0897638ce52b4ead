"""Alphabets, codes, templates and positions."""

import pytest
import torch

from limbeck.core.run.errors import BadInput
from limbeck.domains.sequence import tokens
from limbeck.domains.sequence.text import DNA, PROTEIN, RNA, Alphabet, complement, positions


def test_cleaning_is_what_the_docs_say() -> None:
    assert DNA.clean("ac gu\r\nn", "x") == "ACGTN" and RNA.clean("acgt", "x") == "ACGU"
    assert PROTEIN.clean("mkvx", "x") == "MKVX"


@pytest.mark.parametrize(
    ("alphabet", "text", "words"),
    [
        (DNA, "ACGF", "F at position 4 is no letter of DNA (this looks like protein)"),
        (DNA, "AC-G", "position 3 is no residue; remove gaps"),
        (PROTEIN, "MK*", "position 3 is no residue"),
        (PROTEIN, "MK1", "1 at position 3 is no letter of a protein"),
    ],
)
def test_a_wrong_letter_is_named_with_its_place(alphabet: Alphabet, text: str, words: str) -> None:
    with pytest.raises(BadInput, match="record 7") as caught:
        alphabet.clean(text, "record 7")
    assert words in str(caught.value)


def test_the_complement_turns_codes_too() -> None:
    assert complement("AACGR", DNA) == "YCGTT" and complement("AACGN", RNA) == "NCGUU"
    assert complement(complement("ACGTRYSWKMBDHVN", DNA), DNA) == "ACGTRYSWKMBDHVN"
    with pytest.raises(BadInput):
        complement("MKV", PROTEIN)


def test_positions() -> None:
    assert positions("10-12, 35,11") == [10, 11, 12, 35] and positions("") == []
    for wrong in ("12-10", "a", "1..3"):
        with pytest.raises(BadInput):
            positions(wrong)


def test_tokens_there_and_back() -> None:
    ids = tokens.encode(["ACGT", "NNAA"], DNA)
    assert ids.tolist() == [[0, 1, 2, 3], [4, 4, 0, 0]] and tokens.decode(ids, DNA) == ["ACGT", "__AA"]
    assert tokens.allowed("AR", DNA).tolist() == [[True, False, False, False], [True, False, True, False]]
    with pytest.raises(BadInput):
        tokens.encode(["A", "AC"], DNA)


def test_rewards_see_ids_or_rows_with_their_gradient() -> None:
    codec, ids = tokens.Letters(DNA), torch.tensor([[0, 3]])
    assert torch.equal(codec.read(ids, "onehot")[0], torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]))
    soft = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.0]]], requires_grad=True)
    assert codec.read(soft, "tokens").tolist() == [[3]] and codec.read(soft, "onehot").requires_grad
    assert codec.read(tokens.encode(["N"], DNA), "onehot").sum() == 0  # a mask is no letter
