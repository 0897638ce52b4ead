"""Designs as files that biologists' tools read. Legend: B sequences, L length, V letters."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Model
from limbeck.core.diffusion.discrete import MaskProcess
from limbeck.core.rewards.base import sum_of
from limbeck.core.rewards.panel import Panel, Split
from limbeck.core.run import outside
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.scheduled import at
from limbeck.domains.sequence import fasta, logo, tokens
from limbeck.domains.sequence.text import Alphabet

TOTALS: dict[Split, str] = {"train": "reward", "held_out": "held_out"}  # columns of weighted sums
EVERY = 8  # places of which one is hidden when a model is asked what belongs there
Site = tuple[int, int, int, str]  # first place (from 0), last + 1, strand (1, -1; 0: none), name


Records = Callable[[str, str], list[fasta.Record]]  # a design's name and letters -> what FASTA files hold of it


class Finds(Protocol):
    """A reward's `score` with this method marks what it looks for in GenBank files."""

    def sites(self, text: str) -> list[Site]:
        """Where it lies in a sequence."""


@dataclass(frozen=True)
class Designs:
    """Sequences with what they were made from and what the recipe's rewards say of each."""

    ids: Tensor  # [B,L]
    prompts: list[str]
    scores: dict[str, list[float]]  # `reward` and `held_out`: weighted sums; every reward by its name besides
    alphabet: Alphabet
    records: Records

    @property
    def texts(self) -> list[str]:
        """The sequences."""
        return tokens.decode(self.ids, self.alphabet)

    @property
    def names(self) -> list[str]:
        """design-0001 and so on."""
        return fasta.names(len(self.ids))

    @property
    def totals(self) -> dict[str, list[float]]:
        """The weighted sums alone."""
        return {key: self.scores[key] for key in TOTALS.values() if key in self.scores}


def judged(build: Build, ids: Tensor, prompts: list[str]) -> Designs:
    """Designs with their scores; without, where a reward's program or server is not named on this command line."""
    model: Model = build.piece("teacher")
    scores = scored(build, ids, prompts) if answerable(build) else {}
    columns = {name: values.tolist() for name, values in scores.items()}
    return designs(model, ids.cpu(), prompts, columns)


def designs(model: Model, ids: Tensor, prompts: list[str], scores: dict[str, list[float]]) -> Designs:
    """Designs [B,L] of a model, whose codec says how they are written."""
    codec: Any = model.codec
    return Designs(ids, prompts, scores, codec.alphabet, codec.records)


def letters(model: Model) -> Alphabet:
    """The alphabet of a sequence model, which its codec keeps."""
    codec: Any = model.codec
    found: Alphabet = codec.alphabet
    return found


def answerable(build: Build) -> bool:
    """Whether the recipe has rewards and everything that they need is at hand."""
    if build.recipe.rewards is None:
        return False
    known: dict[str, Any] = {"program": outside.programs(), "address": outside.addresses()}
    return all(name in known[kind] for kind, name in outside.wanted(build.recipe.rewards.model_dump(mode="json")))


@torch.no_grad()
def scored(
    build: Build, ids: Tensor, prompts: list[str], splits: tuple[Split, ...] = ("train", "held_out"), chunk: int = 256
) -> dict[str, Tensor]:
    """Column -> values [B] of ids [B,L]: `reward`, `held_out`, then each reward as `train: NAME`, `held_out: NAME`."""
    sums: dict[str, Tensor] = {}
    each: dict[str, Tensor] = {}
    for split in splits:
        panel, parts = Panel.of(build, split), []
        for start in range(0, len(ids), chunk):
            cond = {"prompt": prompts[start : start + chunk]}
            parts.append(torch.stack(panel.each(ids[start : start + chunk].to(build.device), cond)).cpu())
        values = torch.cat(parts, 1)
        sums[TOTALS[split]] = sum_of(values.unbind(), [at(weight, build.step) for _, weight in panel.parts])
        for name, row in zip(names(build, panel, split), values, strict=True):
            each[unused(f"{split}: {name}", each)] = row
    return sums | each


def names(build: Build, panel: Panel, split: Split) -> list[str]:
    """What the rewards of a panel call themselves (`oracle fly-a`), else their kinds."""
    pieces = [build.piece(f"rewards.{split}.{i}") for i in range(len(panel.parts))]
    return [getattr(one, "name", reward.name) for one, (reward, _) in zip(pieces, panel.parts, strict=True)]


def unused(name: str, taken: dict[str, Tensor]) -> str:
    """The name, numbered where it is taken."""
    number = 2
    fresh = name
    while fresh in taken:
        fresh, number = f"{name} {number}", number + 1
    return fresh


def as_fasta(found: Designs, folder: Path, name: str = "designs") -> Path:
    """One FASTA file, the weighted rewards in its headers; of several chains a record each."""
    path = folder / f"{name}.fasta"
    records = [found.records(one, text) for one, text in zip(found.names, found.texts, strict=True)]
    totals = {
        key: [value for value, chains in zip(values, records, strict=True) for _ in chains]
        for key, values in found.totals.items()
    }
    fasta.write(path, [record for chains in records for record in chains], totals)
    return path


def columns(found: Designs) -> dict[str, list[Any]]:
    """What tables hold: id, prompt, sequence and every score."""
    return {"id": found.names, "prompt": found.prompts, "sequence": found.texts, **found.scores}


def as_csv(found: Designs, folder: Path, name: str = "designs") -> Path:
    """One line a design."""
    path, table = folder / f"{name}.csv", columns(found)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    return path


def as_parquet(found: Designs, folder: Path) -> Path:
    """The same table, typed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise BadInput("Parquet needs the package pyarrow: run `pip install pyarrow`, or export csv") from None
    path = folder / "designs.parquet"
    pq.write_table(pa.table(columns(found)), path)
    return path


def as_genbank(found: Designs, folder: Path, finders: dict[str, Finds]) -> Path:
    """One GenBank record a design; what rewards can point to is a feature each, the whole sequence is the source."""
    if found.alphabet.name == "protein":
        raise BadInput("GenBank is written of DNA and RNA; export fasta or csv of a protein")
    path = folder / "designs.gb"
    rows = zip(found.names, found.texts, strict=True)
    records = [genbank_record(found, i, name, text, finders) for i, (name, text) in enumerate(rows)]
    fasta.biopython("SeqIO").write(records, path, "genbank")
    return path


def genbank_record(found: Designs, number: int, name: str, text: str, finders: dict[str, Finds]) -> Any:
    """One design as Biopython's record."""
    seq, kind = fasta.biopython("Seq"), found.alphabet.name.upper()
    marks = [(0, len(text), 1, "source", {"mol_type": [f"other {kind}"], "organism": ["synthetic construct"]})]
    for reward, finder in finders.items():
        sites = sorted(finder.sites(text))
        marks += [(a, b, s, "misc_feature", {"label": [label], "note": [reward]}) for a, b, s, label in sites]
    record = fasta.biopython("SeqRecord").SeqRecord(seq.Seq(text), id=name, name=name)
    record.description = " ".join(["designed sequence", *(f"{k}={v[number]:.4g}" for k, v in found.totals.items())])
    record.annotations = {"molecule_type": kind, "data_file_division": "SYN", "topology": "linear"}
    record.annotations |= {"source": "synthetic construct", "organism": "synthetic construct"}
    record.features = [feature(*mark) for mark in marks]
    return record


def feature(first: int, last: int, strand: int, kind: str, notes: dict[str, list[str]]) -> Any:
    """Biopython's feature on the places first:last."""
    module = fasta.biopython("SeqFeature")
    place = module.FeatureLocation(first, last, strand=strand or None)
    return module.SeqFeature(place, type=kind, qualifiers=notes)


def finders(build: Build) -> dict[str, Finds]:
    """The recipe's rewards that can say where in a sequence what they look for lies, by name."""
    if not answerable(build):
        return {}
    found: dict[str, Any] = {}
    for split in TOTALS:
        panel = Panel.of(build, split)
        found |= {n: part.score for n, (part, _) in zip(names(build, panel, split), panel.parts, strict=True)}
    return {name: score for name, score in found.items() if hasattr(score, "sites")}


def as_probabilities(found: Designs, folder: Path, model: Model, denoiser: Denoiser) -> Path:
    """Letters' shares `frequency` [L,V], the designs `ids` [B,L], and `conditional` [B,L,V] of masked models.

    `conditional` is what the model expects at a place when it and every eighth place from it are hidden.
    """
    path, size = folder / "designs.safetensors", found.alphabet.size
    tensors = {"ids": found.ids.contiguous(), "frequency": logo.frequencies(found.ids, size).float()}
    if isinstance(denoiser.process, MaskProcess):
        tensors["conditional"] = torch.cat(list(conditional(model, denoiser, found))).contiguous()
    save_file(tensors, path, {"letters": found.alphabet.letters, "alphabet": found.alphabet.name})
    return path


@torch.no_grad()
def conditional(model: Model, denoiser: Denoiser, found: Designs, chunk: int = 64) -> Iterator[Tensor]:
    """p(letter | the letters that are not hidden) float32 [b,L,V], a chunk of designs at a time."""
    size, place = found.alphabet.size, torch.arange(found.ids.shape[1])
    for start in range(0, len(found.ids), chunk):
        part, cond = found.ids[start : start + chunk], model.encode(found.prompts[start : start + chunk])
        device = next(iter(cond.values())).device if cond else part.device
        out = torch.zeros(*part.shape, size)
        for offset in range(EVERY):
            hidden = place % EVERY == offset
            pred: Any = denoiser.predict(torch.where(hidden, size, part).to(device), torch.tensor(1 / EVERY), cond)
            out[:, hidden] = pred.logp_x0.exp().float().cpu()[:, hidden]
        yield out


def write(build: Build, found: Designs, folder: Path, format: str) -> list[Path]:
    """The designs in one format, as files in a folder."""
    model: Model = build.piece("teacher")
    denoiser = build.piece("student").denoiser if build.has("student") else model.denoiser
    writers: dict[str, Callable[[], Path]] = {
        "fasta": lambda: as_fasta(found, folder),
        "csv": lambda: as_csv(found, folder),
        "parquet": lambda: as_parquet(found, folder),
        "genbank": lambda: as_genbank(found, folder, finders(build)),
        "probabilities": lambda: as_probabilities(found, folder, model, denoiser),
    }
    return [writers[format]()]
