"""Sequences in files: FASTA (plain or gzipped), and tables of sequences with values."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.run.errors import BadInput, clean
from limbeck.domains.sequence.text import Alphabet

LIMIT = 2**30  # bytes of text, unpacked
GZIP = b"\x1f\x8b"
SHORT = 20  # letters: a shorter peptide of A, C, G and T alone may be one
COLUMNS = ("sequence", "value")


@dataclass(frozen=True)
class Record:
    """One sequence: the first word of its header, and its clean letters."""

    id: str
    text: str


def biopython(name: str) -> Any:
    """A module of Biopython; BadInput where the package is missing."""
    import importlib

    try:
        return importlib.import_module(f"Bio.{name}")
    except ImportError:
        raise BadInput("sequence files are read by Biopython: run `pip install 'limbeck[sequence]'`") from None


def text_of(path: str | Path, wanted: str = "FASTA or CSV") -> str:
    """A text file, gzipped or not, with any line ends as \\n; BadInput, which says what is wanted, where it is none."""
    where = clean(path)
    try:
        with open(Path(path).expanduser(), "rb") as file:
            packed = file.read(2) == GZIP
            file.seek(0)
            with gzip.open(file) if packed else file as stream:
                data = stream.read(LIMIT + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise BadInput(f"{where}: the gzip file is cut off or damaged; copy it again") from None
    except OSError as error:
        raise BadInput(f"{where}: cannot be read ({error.strerror}); check the path") from None
    if len(data) > LIMIT:
        raise BadInput(f"{where}: holds more than 1 GiB of text; give a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadInput(f"{where}: is no text (a binary file?); give {wanted}, plain or gzipped")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read(path: str | Path, alphabet: Alphabet) -> list[Record]:
    """The records of a FASTA file, at least one, all with letters and with names of their own; BadInput otherwise.

    Letters become upper case and U or T the alphabet's own; blanks are dropped; codes of several letters are kept.
    """
    parser, where = biopython("SeqIO.FastaIO").SimpleFastaParser, clean(path)
    text = text_of(path)
    first = next((line for line in text.split("\n", 100) if line.strip()), "")
    if not first:
        raise BadInput(f"{where}: is empty; give a FASTA file with at least one sequence")
    if not first.startswith(">"):
        raise BadInput(f"{where}: is no FASTA, it begins with {clean(first, 20)}; a record begins with >name")
    found: dict[str, Record] = {}
    for number, (title, letters) in enumerate(parser(io.StringIO(text)), 1):
        record = _record(title, letters, f"{where}, record {number}", alphabet)
        if record.id in found:
            raise BadInput(f"{where}, record {number}: a second {clean(record.id, 60)}; give every record its own name")
        found[record.id] = record
    return list(found.values())


def _record(title: str, letters: str, where: str, alphabet: Alphabet) -> Record:
    name = (title.split() or [""])[0]
    if not name:
        raise BadInput(f"{where}: has no name; write >name above the sequence")
    where = f"{where} ({clean(name, 60)})"
    text = alphabet.clean(letters, where)
    if not text:
        raise BadInput(f"{where}: has no letters; add its sequence or remove the record")
    return Record(name, plausible(text, where, alphabet))


def plausible(text: str, where: str, alphabet: Alphabet) -> str:
    """The clean text, unless its letters are all legal and yet clearly those of another kind of molecule."""
    count = {letter: text.count(letter) for letter in set(text)}
    if alphabet.name == "protein":
        if len(text) >= SHORT and set(count) <= set("ACGTN"):
            raise BadInput(f"{where}: has the letters of DNA alone; set alphabet: dna, or translate it")
        return text
    sure = sum(count.get(letter, 0) for letter in alphabet.letters + alphabet.any)
    if 2 * sure < len(text):
        raise BadInput(f"{where}: most letters are IUPAC codes of several bases (protein?); check the alphabet")
    return text


def read_table(path: str | Path, alphabet: Alphabet) -> tuple[list[str], list[float]]:
    """Sequences and values of a CSV file whose header names the columns sequence and value; others are passed over."""
    reader = csv.reader(io.StringIO(text_of(path)), strict=True)
    where, texts, values = clean(path), [], []
    rows = _rows(reader, where)
    header = [name.strip().lower() for name in next(rows, (0, [""]))[1]]
    if any(header.count(name) != 1 for name in COLUMNS):
        names = clean(", ".join(header), 80) or "nothing"
        raise BadInput(f"{where}:1: the header must name the columns sequence and value, once each; it has {names}")
    for line, row in rows:
        if len(row) != len(header):
            raise BadInput(f"{where}:{line}: {len(row)} cells under a header of {len(header)}; check the commas")
        letters, number = (row[header.index(name)] for name in COLUMNS)
        text = alphabet.clean(letters, f"{where}:{line}")
        if not text:
            raise BadInput(f"{where}:{line}: has no sequence; fill it in or remove the line")
        texts.append(plausible(text, f"{where}:{line}", alphabet))
        values.append(_number(number, f"{where}:{line}"))
    if not texts:
        raise BadInput(f"{where}: has no rows below its header; give at least one sequence with its value")
    return texts, values


def _rows(reader: Any, where: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that hold anything, with the line each ends on."""
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise BadInput(f"{where}:{reader.line_num}: {error}; write plain comma-separated values") from None
        if row is None:
            return
        if any(cell.strip() for cell in row):
            yield reader.line_num, row


def _number(text: str, where: str) -> float:
    try:
        value = float("x" if "_" in text else text)
    except ValueError:
        raise BadInput(f"{where}: the value {clean(text, 40) or 'is missing and'} is no number; write 1.5") from None
    if not math.isfinite(value):
        raise BadInput(f"{where}: the value {clean(text, 40)} is not finite; remove the line or measure it again")
    return value


def names(count: int) -> list[str]:
    """Names of designs, design-0001 and so on."""
    return [f"design-{i:04d}" for i in range(1, count + 1)]


def write(path: str | Path, records: Iterable[Record], scores: Mapping[str, Sequence[float]] | None = None) -> None:
    """FASTA with one header a record, such as `>design-0001 reward=0.93 held_out=0.71`; spaces in names become _."""
    lines = []
    for i, record in enumerate(records):
        told = [f" {key.replace(' ', '_')}={column[i]:.6g}" for key, column in (scores or {}).items()]
        rows = [record.text[start : start + 60] for start in range(0, len(record.text), 60)]
        lines += [f">{record.id}{''.join(told)}", *rows]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
