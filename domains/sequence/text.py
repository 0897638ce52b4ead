"""Sequences as text: alphabets, IUPAC codes, templates and positions (imports no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from limbeck.core.run.errors import BadInput, clean

NUCLEOTIDES = {
    "A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"  # ProteinMPNN's order
AMBIGUOUS = {"B": "DN", "Z": "EQ", "J": "IL", "X": RESIDUES}


@dataclass(frozen=True)
class Alphabet:
    """Letters by their token number (the mask comes after the last), and the codes that stand for several of them."""

    name: str
    letters: str
    codes: dict[str, str]

    @property
    def size(self) -> int:
        """V."""
        return len(self.letters)

    @property
    def any(self) -> str:
        """The code that stands for every letter."""
        return "X" if self.name == "protein" else "N"

    def clean(self, text: str, where: str) -> str:
        """Upper case without blanks and with this alphabet's own letter for T or U; BadInput for another letter.

        Codes of several letters are kept; gaps are refused, since a gap has no place in a sequence to be modelled.
        """
        found = re.sub(r"\s", "", text).upper()
        if self.name != "protein":
            found = found.replace(*("TU" if self.name == "rna" else "UT"))
        wrong = next((i for i, letter in enumerate(found) if letter not in self.codes), None)
        if wrong is not None:
            raise BadInput(
                f"{clean(where)}: {clean(found[wrong], 4)} at position {wrong + 1} {self._why(found[wrong])}"
            )
        return found

    def _why(self, letter: str) -> str:
        if letter in "-.*":
            return "is no residue; remove gaps and stop signs (align again afterwards)"
        hint = " (this looks like protein)" if self.name != "protein" and letter in RESIDUES else ""
        return f"is no letter of {self.name.upper() if self.name != 'protein' else 'a protein'}{hint}"


DNA = Alphabet("dna", "ACGT", NUCLEOTIDES)
RNA = Alphabet("rna", "ACGU", {k.replace("T", "U"): v.replace("T", "U") for k, v in NUCLEOTIDES.items()})
PROTEIN = Alphabet("protein", RESIDUES, {letter: letter for letter in RESIDUES} | AMBIGUOUS)
ALPHABETS = {alphabet.name: alphabet for alphabet in (DNA, RNA, PROTEIN)}
PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A", "U": "A"}


def complement(text: str, alphabet: Alphabet) -> str:
    """The reverse complement; codes of several letters are turned too."""
    if alphabet.name == "protein":
        raise BadInput("a protein has no reverse complement")
    uracil = alphabet.name == "rna"
    by_set = {frozenset(letters): code for code, letters in NUCLEOTIDES.items()}
    turn = {code: by_set[frozenset(PAIRS[letter] for letter in letters)] for code, letters in NUCLEOTIDES.items()}
    plain = text.replace("U", "T")
    found = "".join(turn[letter] for letter in reversed(plain))
    return found.replace("T", "U") if uracil else found


def positions(text: str, where: str = "positions") -> list[int]:
    """`10-20,35` as numbers in order; BadInput otherwise."""
    found: list[int] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = re.fullmatch(r"(-?\d+)(?:-(\d+))?", part)
        if not match:
            raise BadInput(f"{where}: {clean(part, 40)} is no position; write them as 10-20,35")
        low = int(match[1])
        high = int(match[2]) if match[2] else low
        if high < low:
            raise BadInput(f"{where}: {clean(part, 40)} runs backwards")
        found += range(low, high + 1)
    return sorted(set(found))
