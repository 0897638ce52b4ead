"""Backbones in PDB and mmCIF files, read and written with Biopython. Legend: L residues.

What is read, whatever a file holds besides: the first model; of alternate places of an atom, and of alternate residues,
the one with the highest occupancy; chains by the authors' names; modified residues as what they derive from
(selenomethionine is methionine), X where nobody knows; no ligands, waters and nucleic acids. Residues that were not
seen are not invented: the numbers jump there.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.domains.sequence import fasta
from limbeck.domains.sequence.text import PROTEIN, positions

ASSET = Path(__file__).parent / "assets" / "structures"
BACKBONE = ("N", "CA", "C", "O")
BOND = 2.0  # Angstrom: no peptide bond is longer
# Names that simulation programs give to protonated and bridged residues.
PROTONATED = {
    "HSD": "H", "HSE": "H", "HSP": "H", "HID": "H", "HIE": "H", "HIP": "H", "CYX": "C", "CYM": "C", "ASH": "D",
    "GLH": "E", "LYN": "K",
}  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """The backbone of one designed chain, then of those tied to it, then of partners whose sequence is kept.

    Tied chains are copies of the designed one: as many residues, with the same numbers, and always the same letters.
    """

    name: str
    text: str  # the native sequence of all chains, X where unknown
    atoms: Tensor  # N, CA, C, O in Angstrom, float32 [L,4,3]
    numbers: list[int]  # as the file counts
    insertions: list[str]  # the letter after a number, or ""
    chains: list[str]  # of each residue
    designed: int  # residues of the designed chain: the first ones
    copies: int = 1  # chains that have the designed letters: the designed one and those tied to it

    @property
    def native(self) -> str:
        """The designed chain's own sequence."""
        return self.text[: self.designed]

    @property
    def partners(self) -> str:
        """The sequence of the partner chains."""
        return self.text[self.copies * self.designed :]

    def by_chain(self, text: str) -> dict[str, str]:
        """Every chain's sequence for a designed one [L], in the order of the chains."""
        found: dict[str, str] = {}
        for chain, one in zip(self.chains, text * self.copies + self.partners, strict=True):
            found[chain] = found.get(chain, "") + one
        return found

    @property
    def chain_numbers(self) -> list[int]:
        """Each residue's chain as a number, from 0."""
        order = list(dict.fromkeys(self.chains))
        return [order.index(chain) for chain in self.chains]

    @property
    def index(self) -> list[int]:
        """Places along the chain: the file's numbers, moved up by the residues inserted before (as the authors do)."""
        found: list[int] = []
        moved = 0
        for i, (chain, number) in enumerate(zip(self.chains, self.numbers, strict=True)):
            if i == 0 or chain != self.chains[i - 1]:
                moved = 0
            elif number == self.numbers[i - 1]:
                moved += 1
            found.append(number + moved)
        return found

    def places(self, text: str, where: str) -> list[int]:
        """Where the residues with the numbers of `10-20,35` lie in the designed chain.

        Residues that a file inserts (52A) go with their number. A range may run over residues that were not seen.
        """
        own, found = self.numbers[: self.designed], set[int]()
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            wanted = set(positions(part, where))
            hit = {i for i, number in enumerate(own) if number in wanted}
            if not hit:
                span = f"chain {self.chains[0]} of {self.name} has the residues {min(own)} to {max(own)}"
                raise BadInput(f"{where}: {clean(part, 40)} names no residue; {span}")
            found |= hit
        return sorted(found)


def names() -> list[str]:
    """The structures that come with limbeck."""
    return sorted(path.name.split(".")[0] for path in ASSET.glob("*.gz"))


def load(name: str, chain: str | None = None, tied: str = "") -> Structure:
    """An embedded structure or a file (PDB or mmCIF, plain or gzipped); see `read`."""
    embedded = {path.name.split(".")[0]: path for path in ASSET.glob("*.gz")}
    path = embedded.get(name.upper(), Path(name).expanduser())
    if not path.is_file():
        hint = did_you_mean(name, embedded) or f"; embedded ones: {', '.join(names())}"
        raise BadInput(f"there is no structure {clean(name, 80)}{hint}")
    return read(path, chain, tied)


def read(path: Path, chain: str | None = None, tied: str = "") -> Structure:
    """The chain of a file, by default the first protein; of `A,B` the first is designed, the others are partners.

    Chains that are tied to the designed one are designed with it, letter by letter the same (homo-oligomers).
    """
    where = clean(path.name, 80)
    model = parsed(fasta.text_of(path, "PDB or mmCIF"), where)
    found = {one.id: residues for one in model if (residues := list(protein(one)))}
    if not found:
        raise BadInput(f"{where}: has no protein chain (nucleic acids only, or no atoms?); give a protein's structure")
    named, same = (listed(text, found, where) for text in (chain or "", tied))
    own, copies = order(named or same[:1] or [next(iter(found))], same, where)
    labels = {one: [label(residue) for residue in found[one]] for one in own[:copies]}
    for one in own[1:copies]:
        paired(own[0], one, labels, where)
    rows = [(one, residue) for one in own for residue in found[one]]
    return Structure(
        name=path.name.split(".")[0],
        text="".join(letter(residue) for _, residue in rows),
        atoms=torch.stack([backbone(found[one], residue, where) for one, residue in rows]),
        numbers=[residue.id[1] for _, residue in rows],
        insertions=[residue.id[2].strip() for _, residue in rows],
        chains=[one for one, _ in rows],
        designed=len(found[own[0]]),
        copies=copies,
    )


def listed(text: str, found: Iterable[str], where: str) -> list[str]:
    """The chains of `A,B`; BadInput for what is no protein chain of the file, or named twice."""
    wanted = [part.strip() for part in text.split(",")] if text else []
    for one in wanted:
        if one not in found:
            raise BadInput(f"{where}: has no protein chain {clean(one, 20)}; it has {', '.join(found)}")
    if len(set(wanted)) < len(wanted):
        raise BadInput(f"{where}: the chain {clean(text, 40)} is named twice; name each chain once")
    return wanted


def order(named: list[str], tied: list[str], where: str) -> tuple[list[str], int]:
    """The designed chain, those tied to it and the partners; and how many have the designed letters."""
    if len(tied) == 1:
        raise BadInput(f"{where}: tied names the chain {clean(tied[0], 20)} alone; name two or more, such as A,B")
    if tied and named[0] not in tied:
        raise BadInput(f"{where}: the designed chain {clean(named[0], 20)} is not among the tied ones; name it there")
    same = [named[0], *(one for one in tied if one != named[0])]
    return [*same, *(one for one in named if one not in same)], len(same)


def paired(a: str, b: str, labels: dict[str, list[str]], where: str) -> None:
    """BadInput unless two chains that are to be tied have the same residues, by the file's numbers."""
    ours, theirs = labels[a], labels[b]
    if ours == theirs:
        return
    missing = [(one, b) for one in ours if one not in theirs] + [(one, a) for one in theirs if one not in ours]
    what = f"{missing[0][1]} has no residue {missing[0][0]}" if missing else "their residues come in another order"
    more = f" ({len(missing)} such residues)" if len(missing) > 1 else ""
    raise BadInput(
        f"{where}: the chains {clean(a, 20)} and {clean(b, 20)} cannot be tied: {what}{more}; "
        "model it, remove it from both, or number them alike"
    )


def label(residue: Any) -> str:
    """A residue's number with its insertion letter, as the file has them: 52A."""
    return f"{residue.id[1]}{residue.id[2].strip()}"


def parsed(text: str, where: str) -> Any:
    """The first model of a PDB or mmCIF text, as Biopython's."""
    pdb = fasta.biopython("PDB")
    is_cif = "_atom_site." in text
    if not is_cif and not any(line.startswith(("ATOM  ", "HETATM")) for line in text.splitlines()):
        raise BadInput(f"{where}: holds no atoms; give a PDB or mmCIF file, plain or gzipped")
    parser = pdb.MMCIFParser(QUIET=True) if is_cif else pdb.PDBParser(QUIET=True)
    try:
        return next(iter(parser.get_structure("x", io.StringIO(text))))
    except Exception as error:  # Biopython's parsers fail in many ways on damaged files
        kind = "mmCIF" if is_cif else "PDB"
        raise BadInput(f"{where}: is no {kind} file that Biopython reads ({clean(error, 80)}); repair it") from None


def letter(residue: Any) -> str:
    """One letter of a residue, X where its name is not known as one of a protein."""
    known = fasta.biopython("Data.PDBData").protein_letters_3to1_extended
    name = residue.resname.strip()
    found = str(known.get(name) or PROTONATED.get(name, "X"))
    return found if found in PROTEIN.letters else "X"


def protein(chain: Any) -> Iterator[Any]:
    """The residues of a chain's protein; what stands apart as HETATM counts where it is bound to a neighbour."""
    residues = [one for one in map(likeliest, chain) if one.id[0] != "W"]
    for i, residue in enumerate(residues):
        beside = residues[max(i - 1, 0) : i] + residues[i + 1 : i + 2]
        if residue.id[0].strip():
            if all(name in residue for name in ("N", "CA", "C")) and any(bound(residue, other) for other in beside):
                yield residue
        elif letter(residue) != "X" or all(name in residue for name in ("N", "CA", "C")):
            yield residue


def likeliest(residue: Any) -> Any:
    """Of several residues at one place (a point mutation) the one whose atoms have the highest occupancy."""
    if residue.is_disordered() != 2:
        return residue
    return max(residue.disordered_get_list(), key=lambda one: max(atom.get_occupancy() or 0 for atom in one))


def bound(a: Any, b: Any) -> bool:
    """Whether a peptide bond joins two residues, either way round."""
    return any("C" in x and "N" in y and x["C"] - y["N"] < BOND for x, y in ((a, b), (b, a)))


def backbone(residues: Sequence[Any], residue: Any, where: str) -> Tensor:
    """N, CA, C, O [4,3] of one residue; an O that is missing is built, any other atom must be there."""
    missing = [name for name in BACKBONE[:3] if name not in residue]
    if missing:
        who = f"residue {label(residue)} ({residue.resname.strip()}) of chain {residue.get_parent().id}"
        raise BadInput(f"{where}: {who} lacks {', '.join(missing)}; build it with a modelling program, or remove it")
    found = {name: torch.tensor(residue[name].coord, dtype=torch.float32) for name in BACKBONE if name in residue}
    if "O" not in found:
        others = (one["N"] for one in residues if one is not residue and "N" in one)
        after = next((torch.tensor(atom.coord) for atom in others if residue["C"] - atom < BOND), None)
        found["O"] = carbonyl(found["N"], found["CA"], found["C"], after)
    return torch.stack([found[name] for name in BACKBONE])


def carbonyl(n: Tensor, ca: Tensor, c: Tensor, after: Tensor | None) -> Tensor:
    """Where O lies [3]: 1.23 Angstrom from C, opposite to CA and the next N; at a chain's end the next N is trans."""
    back, up = unit(ca - c), n - ca
    beside = 0.87 * unit(up.dot(back) * back - up) - 0.5 * back if after is None else unit(after - c)
    return c - 1.23 * unit(back + beside)


def unit(x: Tensor) -> Tensor:
    """Of length 1."""
    found: Tensor = x / x.norm()
    return found


def thread(structure: Structure, text: str, confidence: Sequence[float], path: Path) -> Path:
    """Writes a designed sequence on its backbone: N, CA, C, O alone, B-factors 100 times the confidence in [0,1].

    PDB, or mmCIF where the path ends in .cif. Numbers and chains are the file's own; tied chains are alike in letters
    and B-factors; partners keep their sequence, with B-factors of 100.
    """
    pdb, built = fasta.biopython("PDB"), fasta.biopython("PDB.StructureBuilder").StructureBuilder()
    names = {one: three for three, one in fasta.biopython("Data.PDBData").protein_letters_3to1.items()}
    is_cif = path.name.endswith(".cif")
    long = next((chain for chain in structure.chains if len(chain) > 1), None)
    if long is not None and not is_cif:
        raise BadInput(f"a PDB file cannot name the chain {clean(long, 20)}; write mmCIF")
    built.init_structure(structure.name)
    built.init_model(0)
    shown = [*list(confidence) * structure.copies, *[1.0] * len(structure.partners)]
    for i, one in enumerate("".join(structure.by_chain(text).values())):
        if i == 0 or structure.chains[i] != structure.chains[i - 1]:
            built.init_chain(structure.chains[i])
            built.init_seg("    ")
        built.init_residue(names.get(one, "UNK").upper(), " ", structure.numbers[i], structure.insertions[i] or " ")
        for name, place in zip(BACKBONE, structure.atoms[i].numpy(), strict=True):
            built.init_atom(name, place, 100 * shown[i], 1.0, " ", f" {name:<3}", element=name[0])
    writer = pdb.MMCIFIO() if is_cif else pdb.PDBIO()
    writer.set_structure(built.get_structure())
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.save(str(path))
    return path
