"""Builds the embedded fly regions (domains/sequence/assets/fly-upstream) from one pinned Debian package.

Maintainers run it; users never do, since its output is committed: packed bases, coordinates, LICENSES.md, SHA256SUMS.
"""

import gzip
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from limbeck.core.run.packages import Package, debian, write_sums
from limbeck.domains.sequence import fly
from limbeck.domains.sequence.text import DNA

PACKAGE = Package(
    "r-bioc-biostrings",
    "2.66.0-1",
    "94ba289411284aaf42501357cac6f50b559d23d5f9c1300fa1e4f2e91cd4fa12",
    joint="=",
)
MEMBER = "usr/lib/R/site-library/Biostrings/extdata/dm3_upstream2000.fa.gz"
HEADER = re.compile(r">\S+_up_2000_\S+_\d+_([fr]) (chr\w+):(\d+)-(\d+)")
NOTICE = f"""# Licence of the embedded fly regions

`{fly.FILE}`: regions of 2000 bases upstream of transcription starts of Drosophila melanogaster (assembly dm3, RefSeq
transcripts), from `{MEMBER.rsplit("/", 1)[1]}` of Bioconductor's Biostrings {PACKAGE.version} (Debian package
{PACKAGE.name}, SHA-256 `{PACKAGE.sha256}`).
Biostrings is under the Artistic License 2.0; its authors are H. Pages, P. Aboyoun, R. Gentleman and S. DebRoy. The
genome assembly is by the Berkeley Drosophila Genome Project and was served by UCSC without restriction.

`model.safetensors`, `limbeck.json`: made from them by limbeck's own recipe `sequence/fly-upstream`; Apache-2.0, as
limbeck itself.

Changes: transcripts that share a region are one row; regions with an unknown base and those outside the five large
chromosome arms are left out; two bits a base; names of transcripts are left out.
"""


def build() -> None:
    """`limbeck assets build fly-upstream`: writes the asset's folder."""
    with tempfile.TemporaryDirectory() as name:
        package = debian(PACKAGE, Path(name))
        subprocess.run(["dpkg-deb", "-x", str(package), name], check=True)
        write(Path(name) / MEMBER)


def write(fasta: Path, folder: Path = fly.ASSET) -> None:
    """Packs the regions of a gzipped FASTA file."""
    rows = sorted(set(regions(fasta)))
    bases = torch.tensor([[DNA.letters.index(base) for base in text] for *_, text in rows], dtype=torch.uint8)
    columns = {"arm": [r[0] for r in rows], "start": [r[1] for r in rows], "reverse": [r[2] for r in rows]}
    tensors = {"bases": pack(bases)} | {k: torch.tensor(v, dtype=torch.int32) for k, v in columns.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / fly.FILE)
    (folder / "LICENSES.md").write_text(NOTICE)
    write_sums(folder)


def regions(fasta: Path) -> Iterator[tuple[int, int, int, str]]:
    """(arm, first base, whether on the reverse strand, bases) of every usable region."""
    with gzip.open(fasta, "rt") as file:
        records = file.read().split(">")[1:]
    for record in records:
        header, *lines = record.splitlines()
        found, text = HEADER.match(">" + header), "".join(lines).upper()
        if found and found[2] in fly.ARMS and len(text) == fly.LENGTH and not set(text) - set(DNA.letters):
            yield fly.ARMS.index(found[2]), int(found[3]), int(found[1] == "r"), text


def pack(bases: Tensor) -> Tensor:
    """Four bases [N,L] of two bits to a byte [N,L/4]."""
    four = bases.view(len(bases), -1, 4)
    return four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6
