"""Builds the embedded splice-site nets (domains/sequence/assets/mmsplice) from one pinned PyPI wheel.

Maintainers run it; users never do, since its output is committed: float32 safetensors, LICENSES.md, SHA256SUMS. The
weights are HDF5, which only this module opens (`pip install h5py`).
"""

import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from limbeck.core.run.errors import LimbeckError
from limbeck.core.run.packages import MIT, Package, checked, fetched, write_sums
from limbeck.domains.sequence.splice import ASSET

WHEEL = Package("mmsplice", "2.4.0", "d70a3a281b9433b89e6a8612cc2ca2611f54c35b90f46e16772b2868ec94b60a")
LAYERS = {
    "donor": {"first": "dense1", "second": "dense2", "head": "dense_1"},
    "acceptor": {"first": "convSpliceSite", "second": "conv1by1", "head": "denseSS"},
}
NORMS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
NOTICE = f"""# Licence of the embedded splice-site nets

`donor.safetensors`, `acceptor.safetensors`: the donor net (18 bases) and the acceptor net (53 bases) of MMSplice
(Cheng et al. 2019), in float32.

## {WHEEL.name}=={WHEEL.version} (PyPI)

MIT License. Copyright (c) 2018, Jun Cheng

Wheel SHA-256: `{WHEEL.sha256}`; files `mmsplice/models/Donor.h5` and `mmsplice/models/Acceptor.h5`.

Changes: kernels transposed for torch; nothing else.

## The MIT License

{MIT}
"""


def convert(file: Any, site: str) -> dict[str, Tensor]:
    """Keras' layers of one net as torch's: dense [in,out], convolutions [W,in,out]."""
    found = leaves(file["model_weights"])
    out = {}
    for ours, theirs in LAYERS[site].items():
        kernel = found[theirs, "kernel"]
        out[f"{ours}.weight"] = kernel.permute(*reversed(range(kernel.ndim))).contiguous()
        out[f"{ours}.bias"] = found[theirs, "bias"]
    for i in (1, 2):
        out |= {f"norm{i}.{ours}": found[f"batch_normalization_{i}", name] for ours, name in NORMS.items()}
        out[f"norm{i}.num_batches_tracked"] = torch.tensor(0)
    return out


def leaves(group: Any) -> dict[tuple[str, str], Tensor]:
    """Arrays by (layer, name), whatever Keras put between the two."""
    found: dict[tuple[str, str], Tensor] = {}

    def visit(path: str, item: Any) -> None:
        if hasattr(item, "shape"):
            found[path.split("/")[0], path.rsplit("/", 1)[1].split(":")[0]] = torch.from_numpy(item[()])

    group.visititems(visit)
    return found


def write(wheel: Path, folder: Path = ASSET) -> None:
    """Writes both nets of a wheel with licence and sums."""
    try:
        import h5py  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise LimbeckError("the weights of mmsplice are HDF5: run `pip install h5py` to build them") from None
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(checked(WHEEL, wheel)) as archive:
        for site in LAYERS:
            with h5py.File(io.BytesIO(archive.read(f"mmsplice/models/{site.title()}.h5"))) as file:
                save_file(convert(file, site), folder / f"{site}.safetensors")
    (folder / "LICENSES.md").write_text(NOTICE, encoding="utf-8")
    write_sums(folder)


def build() -> None:
    """`limbeck assets build mmsplice`: the committed set."""
    with tempfile.TemporaryDirectory() as folder:
        write(fetched(WHEEL, Path(folder)))
