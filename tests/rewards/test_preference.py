"""Preference files: what is written is read back; every fault names its line."""

from pathlib import Path

import pytest

from limbeck.core.rewards import preference
from limbeck.core.rewards.preference import Preference
from limbeck.core.run.errors import BadInput

PAIRS = [
    Preference("a.png", "b.png", "ein Äpfel", "user-1", 0.75, False, "beauty", "online"),
    Preference("ACGT", "TTTT", tie=True),
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_written_is_read_back(suffix: str, tmp_path: Path) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"pairs.{suffix}"
    preference.write(path, PAIRS)
    assert preference.read(path) == PAIRS
    assert PAIRS[0].swapped().winner == "b.png" and PAIRS[0].swapped().swapped() == PAIRS[0]


GOOD = '{"winner": "a", "loser": "b"}\n'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "must be an object"),
        ("{", "not valid JSON"),
        ('{"winner": "a"}', "loser is missing"),
        ('{"winner": "a", "loser": ""}', "loser is missing"),
        ('{"winner": "a", "loser": "b", "strenght": 1}', "did you mean"),
        ('{"winner": "a", "loser": "b", "strength": "high"}', "wrong type"),
        ('{"winner": "a", "loser": "b", "strength": true}', "wrong type"),
        ('{"winner": "a", "loser": "b", "strength": 0}', "above 0"),
        ('{"winner": "a", "loser": "b", "strength": NaN}', "above 0"),
        ('{"winner": "a", "loser": "b", "source": "elsewhere"}', "offline or online"),
        ('{"winner": 3, "loser": "b"}', "wrong type"),
        ("x" * (2**20 + 5), "more than 1048576 bytes"),
    ],
)
def test_a_fault_names_its_line(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(GOOD + "\n" + line + "\n")
    with pytest.raises(BadInput, match=words) as fault:
        preference.read(path)
    assert f"{path}:3" in str(fault.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, words in (("pairs.csv", ".jsonl or .parquet"), ("none.jsonl", "cannot be read")):
        with pytest.raises(BadInput, match=words):
            preference.read(tmp_path / name)
    with pytest.raises(BadInput, match=".jsonl or .parquet"):
        preference.write(tmp_path / "pairs.csv", PAIRS)


def test_files_must_lie_beside_the_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.png", "b.png", "../c.png"):
        (tmp_path / "data" / name).write_bytes(b"x")
    winner, loser = preference.media(Preference("a.png", "b.png"), tmp_path / "data")
    assert winner.name == "a.png" and loser.name == "b.png"
    with pytest.raises(BadInput, match="outside"):
        preference.media(Preference("a.png", "../c.png"), tmp_path / "data")
    with pytest.raises(BadInput, match="no file"):
        preference.media(Preference("a.png", "d.png"), tmp_path / "data")
