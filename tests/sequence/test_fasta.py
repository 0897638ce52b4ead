"""Files of sequences: whatever users bring is either normalised as documented or one clear error."""

import gzip
import time
from pathlib import Path

import pytest
from Bio import SeqIO

from limbeck.core.run.errors import BadInput
from limbeck.domains.sequence import fasta
from limbeck.domains.sequence.text import DNA, PROTEIN, RNA, Alphabet


def made(tmp_path: Path, data: str | bytes, name: str = "own.fa") -> Path:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    ("data", "alphabet", "want"),
    [
        (">a b c\r\nacg\r\nUN\r\n", DNA, [("a", "ACGTN")]),
        (">a\racg\rUN\r", DNA, [("a", "ACGTN")]),
        (">a\nACGT\n\n>b\nAC GT\n", RNA, [("a", "ACGU"), ("b", "ACGU")]),
        ("\ufeff\n>a\nmkv\n", PROTEIN, [("a", "MKV")]),
        (gzip.compress(b">a\nACGT\n"), DNA, [("a", "ACGT")]),
    ],
    ids=["crlf, lower, U", "cr", "blank line, T in RNA", "bom", "gz without suffix"],
)
def test_what_is_normalised(data: str | bytes, alphabet: Alphabet, want: list[tuple[str, str]], tmp_path: Path) -> None:
    assert [(r.id, r.text) for r in fasta.read(made(tmp_path, data), alphabet)] == want


@pytest.mark.parametrize(
    ("data", "alphabet", "said"),
    [
        ("", DNA, "is empty"),
        ("\n \n", DNA, "is empty"),
        ("ACGT\n", DNA, "is no FASTA, it begins with ACGT"),
        ("; old comment\n>a\nACGT\n", DNA, "is no FASTA"),
        (">a\nACGT\n>b\n", DNA, r"record 2 \(b\): has no letters"),
        (">a\nACGT\n>a again\nTTTT\n", DNA, "record 2: a second a"),
        (">\nACGT\n", DNA, "record 1: has no name"),
        (">a\nAC-GT\n", DNA, "- at position 3 is no residue; remove gaps"),
        (">a\nMKVLE\n", DNA, r"record 1 \(a\): L at position 4 is no letter of DNA \(this looks like protein\)"),
        (">a\nMKVAHSRYKW\n", DNA, "most letters are IUPAC codes"),
        (">a\n" + "ACGT" * 6 + "\n", PROTEIN, "letters of DNA alone"),
        (">a\nAC;GT\n", DNA, "; at position 3"),
        (b"\x7fELF\0\0\xff\xfe", DNA, "is no text"),
        (">a\nACGT\n".encode("utf-16"), DNA, "is no text"),
        (gzip.compress(b">a\nACGT\n" * 100)[:-9], DNA, "cut off or damaged"),
        (b"\x1f\x8bnot gzip at all", DNA, "cut off or damaged"),
    ],
)
def test_what_is_refused(data: str | bytes, alphabet: Alphabet, said: str, tmp_path: Path) -> None:
    path = made(tmp_path, data)
    with pytest.raises(BadInput, match=said) as found:
        fasta.read(path, alphabet)
    assert "\n" not in str(found.value) and str(path)[:60] in str(found.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.fa", tmp_path):
        with pytest.raises(BadInput, match="cannot be read"):
            fasta.read(path, DNA)


def test_more_text_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "LIMIT", 1000)
    with pytest.raises(BadInput, match="more than 1 GiB"):
        fasta.read(made(tmp_path, gzip.compress(b">a\n" + b"A" * 2000)), DNA)


def test_a_line_of_ten_megabytes_is_read_whole(tmp_path: Path) -> None:
    path, start = made(tmp_path, ">long\n" + "ACGTN" * 2_000_000 + "\n"), time.perf_counter()
    (record,) = fasta.read(path, DNA)
    assert len(record.text) == 10_000_000 and record.text.endswith("ACGTN")
    assert time.perf_counter() - start < 20


def test_what_is_written_is_read_by_biopython(tmp_path: Path) -> None:
    texts = ["ACGT" * 40, "TTTT"]
    records = [fasta.Record(name, text) for name, text in zip(fasta.names(2), texts, strict=True)]
    fasta.write(tmp_path / "d.fasta", records, {"reward": [0.93, -1], "held out": [0.71, 2e-9]})
    found = list(SeqIO.parse(tmp_path / "d.fasta", "fasta"))
    assert [str(r.seq) for r in found] == texts
    assert found[0].description == "design-0001 reward=0.93 held_out=0.71"
    assert found[1].description == "design-0002 reward=-1 held_out=2e-09"
    assert fasta.read(tmp_path / "d.fasta", DNA) == records


def test_a_table_is_read(tmp_path: Path) -> None:
    text = '\ufeffname,Value,sequence\r\nx,1.5,acgu\r\n\r\ny,-2e3,"AC GT"\r\n'
    assert fasta.read_table(made(tmp_path, text), DNA) == (["ACGT", "ACGT"], [1.5, -2000.0])
    assert fasta.read_table(made(tmp_path, gzip.compress(text.encode())), DNA)[1] == [1.5, -2000.0]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("", ":1: the header must name the columns"),
        ("ACGT,1\nACGA,2\n", ":1: the header must name the columns"),
        ("sequence;value\nACGT;1\n", "it has sequence;value"),
        ("sequence,value,value\nACGT,1,2\n", "once each"),
        ("sequence,value\n", "no rows below its header"),
        ("sequence,value\nACGT,1\nACGT\n", ":3: 1 cells under a header of 2"),
        ("sequence,value\nACGT,1,5\n", ":2: 3 cells"),
        ("sequence,value\nACGT,high\n", ":2: the value high is no number"),
        ("sequence,value\nACGT,\n", ":2: the value is missing"),
        ("sequence,value\nACGT,1_0\n", ":2: the value 1_0 is no number"),
        ("sequence,value\nACGT,nan\n", ":2: the value nan is not finite"),
        ("sequence,value\nACGT,-inf\n", "is not finite"),
        ("sequence,value\n,1\n", ":2: has no sequence"),
        ("sequence,value\nACGT,1\nAC-T,1\n", ":3: - at position 3 is no residue"),
        ('sequence,value\n"ACGT,1\n', "write plain comma-separated values"),
    ],
)
def test_a_table_is_refused_with_its_line(data: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        fasta.read_table(made(tmp_path, data, "own.csv"), DNA)
