"""The space of designs: files that Biopython, pyarrow and safetensors read back, pictures, preferences, programs."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from Bio import SeqIO
from PIL import Image
from safetensors import safe_open

from limbeck.core.rewards.base import Reward
from limbeck.core.rewards.program import judged
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.sequence import export, fasta, space, tokens
from limbeck.domains.sequence.text import ALPHABETS, DNA

LENGTH = 24


class Words:
    """A reward that counts ACG and knows where they lie."""

    def __call__(self, x: torch.Tensor, cond: Any, *, t: Any, gen: Any) -> torch.Tensor:
        return torch.tensor([float(len(self.sites(text))) for text in tokens.decode(x, DNA)])

    def sites(self, text: str) -> list[export.Site]:
        return [(i, i + 3, 1, "ACG") for i in range(len(text) - 2) if text[i : i + 3] == "ACG"]


def strong(x: torch.Tensor, cond: Any, *, t: Any, gen: Any) -> torch.Tensor:
    """The share of G and C, of rows [B,L,V]."""
    return x[..., 1:3].sum((1, 2)) / x.shape[1]


@pytest.fixture
def built(tiny: Any, tmp_path: Path) -> Callable[..., Build]:
    """A design recipe around the tiny model, with rewards that need no file."""

    def make(alphabet: str = "dna", rewards: bool = True, **changes: Any) -> Build:
        oracle = {"kind": "sequence.oracle", "model": "unused"}
        data = {
            "name": "designs", "job": "sample", "steps": 1, "batch": 1, "sample": {"count": 6},
            "teacher": {"kind": "sequence.fresh", "alphabet": alphabet, "length": LENGTH},
            "student": {"kind": "sequence.tuned", "steps": 5}, "space": {"kind": "sequence.designs", "steps": 5},
            "rewards": {"train": [oracle, oracle], "held_out": [oracle]} if rewards else None,
        }  # fmt: skip
        build = Build(recipes.of({**data, **changes.pop("also", {}), **changes}), folder=tmp_path)
        build._pieces["teacher"] = tiny.tiny_model(ALPHABETS[alphabet], LENGTH)
        build._pieces["rewards.train.0"] = Reward(Words(), "words", "tokens")
        build._pieces["rewards.train.1"] = build._pieces["rewards.held_out.0"] = Reward(strong, "strong", "onehot")
        return build

    return make


def test_samples_are_files_with_scores_and_the_same_seed_is_the_same_file(
    built: Callable[..., Build], tmp_path: Path
) -> None:
    build = built(space={"kind": "sequence.designs", "steps": 5, "n": 3})
    here: space.DesignSpace = build.piece("space")
    template = "ACGTA" + "N" * (LENGTH - 5)
    paths = here.sample(build, [template, ""], 7, tmp_path / "a")
    assert [path.name for path in paths] == ["samples.fasta", "samples.csv", "samples.png"]
    found = list(SeqIO.parse(paths[0], "fasta"))
    assert len(found) == 6 and all(str(r.seq).startswith("ACGTA") for r in found[:3])
    assert len({str(r.seq) for r in found}) == 6 and not all(str(r.seq).startswith("ACGTA") for r in found[3:])
    told = dict(item.split("=") for item in found[0].description.split()[1:])
    words, share = float(str(found[0].seq).count("ACG")), sum(map(str(found[0].seq).count, "GC")) / LENGTH
    assert float(told["reward"]) == pytest.approx(words + share, rel=1e-5)
    assert float(told["held_out"]) == pytest.approx(share, rel=1e-5)
    again = here.sample(build, [template, ""], 7, tmp_path / "b")
    assert again[0].read_text() == paths[0].read_text() and again[2].read_bytes() == paths[2].read_bytes()
    assert here.sample(build, [template, ""], 8, tmp_path / "c")[0].read_text() != paths[0].read_text()


def test_teacher_and_untrained_student_draw_the_same_from_the_same_noise(built: Callable[..., Build]) -> None:
    build = built()
    here: space.DesignSpace = build.piece("space")
    one, two = (here.drawn(build, which, [""] * 70, 0) for which in ("teacher", "student"))
    assert torch.equal(one, two) and one.shape == (70, LENGTH) and int(one.max()) < 4
    assert not torch.equal(one, here.drawn(build, "student", [""] * 70, 0, steps=2))


def test_kept_designs_have_every_reward_by_name(built: Callable[..., Build], tmp_path: Path) -> None:
    build = built()
    x = torch.randint(4, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    names = [path.name for path in build.piece("space").keep(build, x, [""] * 5, 0, tmp_path / "k")]
    assert names == ["designs.fasta", "designs.csv", "logo.png"]
    rows = list(csv.DictReader((tmp_path / "k" / "designs.csv").open(newline="")))
    scores = ["reward", "held_out", "train: words", "train: strong", "held_out: strong"]
    assert list(rows[0]) == ["id", "prompt", "sequence", *scores]
    for row in rows:
        assert float(row["train: words"]) == row["sequence"].count("ACG")
        assert float(row["reward"]) == pytest.approx(float(row["train: words"]) + float(row["held_out: strong"]))
    assert [row["sequence"] for row in rows] == tokens.decode(x, DNA)


def test_a_sheet_has_the_student_above_the_teacher(built: Callable[..., Build], tmp_path: Path) -> None:
    build = built()
    here: space.DesignSpace = build.piece("space")
    (path,) = here.show(build, 12, tmp_path)
    assert path.name == "step-00000012.png"
    before = Image.open(path).tobytes()
    for value in build.piece("student").parameters():
        value.data.mul_(3)
    here.show(build, 12, tmp_path)
    page = Image.open(path)
    half = (0, page.height // 2 + 30, *page.size)
    assert page.crop(half).tobytes() == Image.frombytes("RGB", page.size, before).crop(half).tobytes()
    assert page.tobytes() != before


def test_every_format_is_read_back(built: Callable[..., Build], tmp_path: Path) -> None:
    build = built()
    here: space.DesignSpace = build.piece("space")
    written = {form: here.export(build, tmp_path / form, form)[0] for form in here.formats}
    texts = [str(r.seq) for r in SeqIO.parse(written["fasta"], "fasta")]
    assert len(texts) == 6
    table = pq.read_table(written["parquet"]).to_pylist()
    lines = list(csv.DictReader(written["csv"].open(newline="")))
    assert [row["sequence"] for row in table] == texts == [row["sequence"] for row in lines]
    assert isinstance(table[0]["reward"], float) and table[0]["train: words"] == float(lines[0]["train: words"])
    assert Image.open(written["png"]).width > 900


def test_genbank_marks_what_rewards_look_for(built: Callable[..., Build], tmp_path: Path) -> None:
    build = built()
    here: space.DesignSpace = build.piece("space")
    (path,) = here.export(build, tmp_path / "gb", "genbank")
    records = list(SeqIO.parse(path, "genbank"))
    marks = 0
    for record in records:
        assert record.annotations["molecule_type"] == "DNA" and len(record.seq) == LENGTH
        source, *rest = record.features
        assert source.type == "source" and len(source.location) == LENGTH
        assert [str(mark.extract(record.seq)) for mark in rest] == ["ACG"] * str(record.seq).count("ACG")
        assert all(mark.qualifiers["label"] == ["ACG"] and mark.qualifiers["note"] == ["words"] for mark in rest)
        marks += len(rest)
    assert marks > 0
    rna = built("rna", rewards=False)
    (path,) = rna.piece("space").export(rna, tmp_path / "rna", "genbank")
    record = next(SeqIO.parse(path, "genbank"))
    assert record.annotations["molecule_type"] == "RNA" and "U" in record.seq and "T" not in record.seq
    protein = built("protein", rewards=False)
    with pytest.raises(BadInput, match="export fasta or csv"):
        protein.piece("space").export(protein, tmp_path / "protein", "genbank")


def test_probabilities_are_what_the_model_expects_of_hidden_places(built: Callable[..., Build], tmp_path: Path) -> None:
    build = built()
    (path,) = build.piece("space").export(build, tmp_path / "p", "probabilities")
    with safe_open(path, "pt") as file:
        ids, share, belief = (file.get_tensor(name) for name in ("ids", "frequency", "conditional"))
        assert file.metadata() == {"letters": "ACGT", "alphabet": "dna"}
    assert torch.allclose(share.sum(1), torch.ones(LENGTH)) and torch.allclose(belief.sum(2), torch.ones(6, LENGTH))
    assert torch.equal(share, torch.nn.functional.one_hot(ids, 4).float().mean(0))
    hidden = ids.clone()
    hidden[:, 3::8] = 4
    pred: Any = build.piece("student").denoiser.predict(hidden, torch.tensor(0.1), {})
    assert torch.allclose(belief[:, 11], pred.logp_x0.exp()[:, 11], atol=1e-6)


def test_parquet_without_its_package_names_it(
    built: Callable[..., Build], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = built(rewards=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match="pip install pyarrow"):
        build.piece("space").export(build, tmp_path / "x", "parquet")
    monkeypatch.setitem(sys.modules, "Bio", None)
    monkeypatch.setitem(sys.modules, "Bio.SeqIO", None)
    with pytest.raises(BadInput, match=r"limbeck\[sequence\]"):
        build.piece("space").export(build, tmp_path / "x", "genbank")


def test_a_program_gets_one_fasta_file_in_the_order_of_the_rows(built: Callable[..., Build], tmp_path: Path) -> None:
    from limbeck.core.rewards.config import Program

    build = built()
    code = (
        "import sys, pathlib; t = pathlib.Path(sys.argv[1], 'samples.fasta').read_text();"
        "print('\\n'.join(str(r.count('A')) for r in t.split('>')[1:]))"
    )
    x = torch.randint(4, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    want = [text.count("A") for text in tokens.decode(x, DNA)]
    for given in (x, tokens.onehot(x, 4)):
        found = judged(
            [sys.executable, "-c", code], given, {"prompt": [""] * 5}, build.piece("space"), Program(name="a")
        )
        assert found == want


def test_what_a_reward_elsewhere_would_say_is_left_out_of_samples(built: Callable[..., Build], tmp_path: Path) -> None:
    both = {split: [{"kind": "program", "name": "mine"}] for split in ("train", "held_out")}
    build = built(also={"rewards": both})
    path = build.piece("space").sample(build, [""], 0, tmp_path)[0]
    assert next(SeqIO.parse(path, "fasta")).description == "design-0001"


def test_preferences_name_sequences(built: Callable[..., Build], tmp_path: Path) -> None:
    here: space.DesignSpace = built().piece("space")
    fasta.write(tmp_path / "two.fa", [fasta.Record("a", "ACGU"), fasta.Record("b", "TTTT")])
    fasta.write(tmp_path / "one.fa", [fasta.Record("a", "ACGT")])
    want = tokens.encode(["ACGT"], DNA)[0]
    for name in ("acgu", "two.fa#a", "one.fa"):
        assert torch.equal(here.read(name, tmp_path), want), name
    wrong = {"two.fa": "2 records", "two.fa#c": "no record c", "no.fa": "no file", "../x.fa": "outside",
             "ACN": "N at position 3", "ACJ": "J at position 3", "": "has no letters"}  # fmt: skip
    for name, said in wrong.items():
        with pytest.raises(BadInput, match=said):
            here.read(name, tmp_path)


def test_the_samples_of_several_samplers_are_one_picture(built: Callable[..., Build], tmp_path: Path) -> None:
    build = built()
    x = torch.randint(4, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    one = build.piece("space").grid(build, {"a": x}, [""] * 5, tmp_path / "deep" / "one.png")
    two = build.piece("space").grid(build, {"a": x, "b": x}, [""] * 5, tmp_path / "two.png")
    assert Image.open(two).height == 2 * Image.open(one).height


def test_a_recipe_with_a_sampler_exports_what_it_draws(built: Callable[..., Build], tmp_path: Path) -> None:
    build = built(sampler={"kind": "best_of", "n": 16, "walk": {"steps": 5}})
    plain = built()
    best, usual = (
        [float(row["reward"]) for row in csv.DictReader(b.piece("space").export(b, tmp_path / n, "csv")[0].open())]
        for n, b in (("best", build), ("plain", plain))
    )
    assert len(best) == 6 and sum(best) > sum(usual)
    (picture,) = build.piece("space").export(build, tmp_path / "png", "png")
    (alone,) = plain.piece("space").export(plain, tmp_path / "alone", "png")
    assert picture.name == "designs.png" and Image.open(picture).height * 2 == Image.open(alone).height
