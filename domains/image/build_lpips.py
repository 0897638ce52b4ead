"""Builds LPIPS's heads (domains/image/assets/lpips) from one pinned PyPI wheel.

Maintainers run it; users never do, since its output is committed: safetensors, LICENSES.md, SHA256SUMS. The file in the
wheel is a pickle, which is never opened: the five tensors are read from where they lie in it.
"""

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from limbeck.core.run.errors import LimbeckError
from limbeck.core.run.packages import Package, checked, fetched, write_sums
from limbeck.domains.image.hed import CHANNELS
from limbeck.domains.image.perceptual import ASSET, FILE

WHEEL = Package(
    "lpips",
    "0.1.4",
    "fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e",
    "Copyright (c) 2018, Richard Zhang, Phillip Isola, Alexei A. Efros, Eli Shechtman, Oliver Wang",
)
MEMBER = "lpips/weights/v0.1/vgg.pth"
BEGIN = (6001, 5481, 6265, 3425, 1369)  # bytes before each head; eight more before it say how many numbers follow
NOTICE = f"""# Licence of the embedded LPIPS heads

`{FILE}`: one weight for each channel of the ends of VGG16's five blocks (Zhang et al. 2018), float32.

## {WHEEL.name}=={WHEEL.version} (PyPI)

BSD 2-Clause License. {WHEEL.copyright}. All rights reserved.

Wheel SHA-256: `{WHEEL.sha256}`; file `{MEMBER}`.

Changes: tensors renamed and flattened; nothing else.

## The BSD 2-Clause License

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:

* Redistributions of source code must retain the above copyright notice, this
  list of conditions and the following disclaimer.

* Redistributions in binary form must reproduce the above copyright notice,
  this list of conditions and the following disclaimer in the documentation
  and/or other materials provided with the distribution.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"
AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE
FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL
DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER
CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY,
OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE
OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""


def convert(data: bytes) -> dict[str, Tensor]:
    """The five heads in the bytes of the wheel's file."""
    out = {}
    for block, (begin, width) in enumerate(zip(BEGIN, CHANNELS, strict=True)):
        values = np.frombuffer(data, "<f4", width, begin)
        if int.from_bytes(data[begin - 8 : begin], "little") != width or not (values >= 0).all():
            raise LimbeckError(f"head {block} does not lie where it is looked for: pin the wheel that it is read from")
        out[f"block{block}"] = torch.from_numpy(values.copy())
    return out


def write(wheel: Path, folder: Path = ASSET) -> None:
    """Writes the heads of a wheel with licence and sums."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(checked(WHEEL, wheel)) as archive:
        save_file(convert(archive.read(MEMBER)), folder / FILE)
    (folder / "LICENSES.md").write_text(NOTICE, encoding="utf-8")
    write_sums(folder)


def build() -> None:
    """`limbeck assets build lpips`: the committed set."""
    with tempfile.TemporaryDirectory() as folder:
        write(fetched(WHEEL, Path(folder)))
