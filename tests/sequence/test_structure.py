"""Structures: what is read of PDB and mmCIF files, what is refused, and designs threaded on a backbone."""

import dataclasses
import gzip
from pathlib import Path

import pytest
import torch

from limbeck.core.run.errors import BadInput
from limbeck.domains.sequence import structure

NATIVE = "MDIRQGPKEPFRDYVDRFYKTLRAEQASQEVKNWMTETLLVQNANPDCKTILKALGPGATLEEMMTACQG"  # 1A8O


def atom(number, name, residue, place, chain="A", record="ATOM  ", alt=" ", share=1.0, at=(0.0, 0.0, 0.0)):
    """One line of a PDB file."""
    x, y, z = at
    return (
        f"{record}{number:5d}  {name:<3}{alt}{residue:>3} {chain}{place:>5}   {x:8.3f}{y:8.3f}{z:8.3f}{share:6.2f}"
        f"{10:6.2f}          {name[0]:>2}\n"
    )


def glycine(place, chain="A", residue="GLY", record="ATOM  ", alt=" ", share=1.0, shift=0.0):
    """A residue's backbone; places one apart are 3.8 A apart and bound to each other."""
    start = 3.8 * int(place[:-1]) if isinstance(place, str) else 3.8 * place
    place = f"{place:>5}" if isinstance(place, str) else f"{place:4d} "
    spots = {
        "N": (0.0, shift, 0.0),
        "CA": (1.2, shift + 0.8, 0.0),
        "C": (2.4, shift, 0.0),
        "O": (2.4, shift - 1.2, 0.0),
    }
    return "".join(
        atom(i, name, residue, place, chain, record, alt, share, (start + x, y, z))
        for i, (name, (x, y, z)) in enumerate(spots.items())
    )


def read(folder: Path, text: str, chain: str | None = None, name: str = "x.pdb") -> structure.Structure:
    (folder / name).write_text(text)
    return structure.read(folder / name, chain)


def backbone_lines(found: structure.Structure, folder: Path) -> list[str]:
    return (
        structure.thread(found, found.native, [1.0] * found.designed, folder / "all.pdb").read_text().splitlines(True)
    )


def test_selenomethionine_is_methionine_and_waters_are_none() -> None:
    found = structure.load("1a8o")
    assert found.native == NATIVE and found.designed == 70 and set(found.chains) == {"A"}
    assert found.numbers == list(range(151, 221)) and found.atoms.shape == (70, 4, 3)


def test_inserted_residues_move_the_places_along_the_chain() -> None:
    found = structure.load("1QNJ_A")
    twice = [i for i in range(1, 240) if found.numbers[i] == found.numbers[i - 1]]
    assert len(found.native) == 240 and twice and all(found.insertions[i] for i in twice)
    assert all(b > a for a, b in zip(found.index, found.index[1:], strict=False))
    assert found.index[-1] - found.index[0] == found.numbers[-1] - found.numbers[0] + len(twice)


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
@pytest.mark.parametrize("name", ["1A8O", "1QNJ_A"])
def test_a_threaded_design_reads_back(name: str, suffix: str, tmp_path: Path) -> None:
    whole = structure.load(name)
    text = whole.native[::-1]
    sure = torch.linspace(0, 1, len(text)).tolist()
    path = structure.thread(whole, text, sure, tmp_path / f"design{suffix}")
    back = structure.read(path)
    assert back.native == text and back.numbers == whole.numbers and back.insertions == whole.insertions
    assert torch.allclose(back.atoms, whole.atoms, atol=1e-3)
    from Bio import PDB

    parser = PDB.MMCIFParser(QUIET=True) if suffix == ".cif" else PDB.PDBParser(QUIET=True)
    residues = list(parser.get_structure("x", str(path)).get_residues())
    assert {atom.get_name() for one in residues for atom in one} == {"N", "CA", "C", "O"}
    assert [one["CA"].get_bfactor() for one in residues] == pytest.approx([100 * x for x in sure], abs=6e-3)


def test_gzip_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    text = "".join(glycine(i) for i in range(1, 6))
    plain = read(tmp_path, text)
    (tmp_path / "y.pdb.gz").write_bytes(gzip.compress(text.replace("\n", "\r\n").encode()))
    assert structure.read(tmp_path / "y.pdb.gz").atoms.equal(plain.atoms) and plain.native == "GGGGG"


def test_the_first_model_is_read(tmp_path: Path) -> None:
    first, second = ("".join(glycine(i, residue=name) for i in range(1, 4)) for name in ("ALA", "GLY"))
    assert read(tmp_path, f"MODEL        1\n{first}ENDMDL\nMODEL        2\n{second}ENDMDL\n").native == "AAA"


def test_the_likelier_of_alternate_places_and_residues_counts(tmp_path: Path) -> None:
    lines = [
        atom(1, "CA", "GLY", "   2 ", alt=alt, share=share, at=(9.0, y, 0.0))
        for alt, share, y in (("A", 0.3, 1.0), ("B", 0.7, 2.0))
    ]
    other = [line for line in glycine(2).splitlines(True) if " CA " not in line]
    found = read(tmp_path, glycine(1) + "".join(other[:1] + lines + other[1:]) + glycine(3))
    assert found.atoms[1, 1].tolist() == [9.0, 2.0, 0.0]
    for first, second in ((0.7, 0.3), (0.3, 0.7)):
        mutant = glycine(2, residue="SER", alt="A", share=first) + glycine(2, residue="LEU", alt="B", share=second)
        found = read(tmp_path, glycine(1) + mutant + glycine(3))
        assert found.native == ("GSG" if first > second else "GLG") and len(found.atoms) == 3


def test_ligands_that_look_like_residues_are_left_out(tmp_path: Path) -> None:
    chain = "".join(glycine(i) for i in range(1, 4))
    calcium = atom(99, "CA", " CA", " 300 ", record="HETATM")
    free = glycine(40, residue="GLU", record="HETATM")
    assert read(tmp_path, chain + free + calcium).native == "GGG"
    joined = chain + glycine(4, residue="SEP", record="HETATM") + glycine(5, residue="ZZZ", record="HETATM")
    assert read(tmp_path, joined).native == "GGGSX"  # phosphoserine is serine; nobody knows ZZZ


def test_a_missing_oxygen_is_built(tmp_path: Path) -> None:
    whole = structure.load("1A8O")
    lines = [line for line in backbone_lines(whole, tmp_path) if line[12:16].strip() != "O"]
    found = read(tmp_path, "".join(lines))
    off = (found.atoms - whole.atoms).norm(dim=-1)
    assert float(off[:, :3].max()) < 2e-3 and float(off[:-1, 3].max()) < 0.25
    bond, beside = found.atoms[-1, 3] - found.atoms[-1, 2], found.atoms[-1, 3] - found.atoms[-1, 1]
    assert float(bond.norm()) == pytest.approx(1.23, abs=1e-3) and 2.2 < float(beside.norm()) < 2.6


@pytest.mark.parametrize("name", ["N", "CA", "C"])
def test_any_other_missing_atom_is_named(name: str, tmp_path: Path) -> None:
    lines = [line for line in glycine(2).splitlines(True) if line[12:16].strip() != name]
    with pytest.raises(BadInput, match=rf"residue 2 \(GLY\) of chain A lacks {name};"):
        read(tmp_path, glycine(1) + "".join(lines) + glycine(3))


def test_chains(tmp_path: Path) -> None:
    a, b = ("".join(glycine(i, chain, name) for i in range(1, 4)) for chain, name in (("A", "ALA"), ("B", "TRP")))
    dna = atom(1, "P", " DA", "   1 ", chain="D")
    assert read(tmp_path, dna + a + b).native == "AAA"
    assert read(tmp_path, dna + a + b, "B").native == "WWW"
    both = read(tmp_path, dna + a + b, "B, A")
    assert (both.native, both.text, both.chain_numbers) == ("WWW", "WWWAAA", [0, 0, 0, 1, 1, 1])
    assert both.index == [1, 2, 3, 1, 2, 3]
    with pytest.raises(BadInput, match="no protein chain Z; it has A, B"):
        read(tmp_path, dna + a + b, "Z")
    with pytest.raises(BadInput, match="no protein chain D; it has A, B"):
        read(tmp_path, dna + a + b, "D")
    with pytest.raises(BadInput, match="twice"):
        read(tmp_path, a, "A,A")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no atoms"),
        ("just a note\n", "holds no atoms"),
        (atom(1, "P", " DA", "   1 "), "no protein chain"),
        (atom(1, "CA", " CA", "   1 ", record="HETATM"), "no protein chain"),
        ("data_x\nloop_\n_atom_site.id\n_atom_site.type_symbol\n1\n", "mmCIF file that Biopython reads"),
        ("ATOM      1  N   GLY A   x      nothing", "PDB file that Biopython reads"),
    ],
)
def test_hostile_files_get_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(BadInput, match="1A8O"):
        structure.load("1A80")
    with pytest.raises(BadInput, match="embedded ones: 1A7G, 1A8O, 1QNJ_A, 4CUP"):
        structure.load("nowhere.pdb")


def test_residues_are_named_by_the_numbers_of_the_file() -> None:
    found = structure.load("1A8O")
    assert found.places("151-153, 220", "fixed") == [0, 1, 2, 69] and found.places("", "fixed") == []
    with pytest.raises(BadInput, match="fixed: 10-20 names no residue; chain A of 1A8O has the residues 151 to 220"):
        found.places("151,10-20", "fixed")
    elastase = structure.load("1QNJ_A")
    twice = [n for n in elastase.numbers if elastase.numbers.count(n) > 1]
    assert len(elastase.places(str(twice[0]), "fixed")) == elastase.numbers.count(twice[0])


def test_a_pdb_file_has_chains_of_one_letter(tmp_path: Path) -> None:
    found = dataclasses.replace(structure.load("1A8O"), chains=["AA"] * 70)
    with pytest.raises(BadInput, match="write mmCIF"):
        structure.thread(found, found.native, [1.0] * 70, tmp_path / "x.pdb")
    path = structure.thread(found, found.native, [1.0] * 70, tmp_path / "x.cif")
    assert structure.read(path).chains == found.chains
