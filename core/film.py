"""Moving pictures as files: MP4 (H.264), GIF and animated WebP, chosen by the file's ending."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from limbeck.core.pictures import to_bytes, to_pictures
from limbeck.core.run.errors import BadInput, clean

CLOCK = {".gif": 0.01, ".webp": 0.001}  # seconds: what the times of these files are multiples of
LEAST = 0.02  # seconds: browsers show a picture that asks for less time for a tenth of a second
BT709 = 1  # of H.273: the matrix, primaries and transfer of what is written; untagged files are shown in wrong colours
LIMITED = 1


def write(pictures: Tensor, path: Path, fps: float) -> Path:
    """Writes pictures [F,3,H,W] (uint8, or float in [-1,1]), `fps` a second; MP4 needs PyAV (the extra `video`)."""
    if pictures.dim() != 4 or pictures.shape[1] != 3 or not pictures.numel():
        raise BadInput(f"{clean(path)}: a film is made of pictures [F,3,H,W], not {list(pictures.shape)}")
    if not 0 < fps <= 1000:
        raise BadInput(f"{clean(path)}: {fps:g} pictures a second cannot be written; give 1000 at most")
    ending = path.suffix.lower()
    if ending not in (".mp4", *CLOCK):
        raise BadInput(f"{clean(path)}: films are written as .mp4, .gif or .webp")
    return _mp4(pictures, path, fps) if ending == ".mp4" else _animation(pictures, path, fps, CLOCK[ending])


def _mp4(pictures: Tensor, path: Path, fps: float) -> Path:
    """H.264 in yuv420p, its index first (a browser plays while it loads); odd sides repeat their last pixels."""
    try:
        import av
    except ImportError:
        hint = "run `pip install 'limbeck[video]'` or `pip install 'limbeck[threed]'`, or ask for a gif"
        raise BadInput(f"MP4 is written by PyAV: {hint}") from None
    tags = {"colorspace": BT709, "color_primaries": BT709, "color_trc": BT709, "color_range": LIMITED}
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
        stream = file.add_stream("libx264", Fraction(fps).limit_denominator(10_000), {"crf": "18", "threads": "1"})
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        even = [torch.arange(side + side % 2).clamp_max(side - 1) for side in pictures.shape[2:]]
        stream.height, stream.width = map(len, even)
        stream.pix_fmt = "yuv420p"
        for picture in to_bytes(pictures).index_select(1, even[0]).index_select(2, even[1]).numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def _animation(pictures: Tensor, path: Path, fps: float, clock: float) -> Path:
    """An endless GIF or WebP; each picture ends at the tick nearest to its time, so that roundings do not add up."""
    if 1 / fps < LEAST:
        raise BadInput(f"{clean(path)}: browsers play at most {1 / LEAST:g} pictures a second of it; write an .mp4")
    ends = [round((i + 1) / fps / clock) for i in range(len(pictures))]
    shown = [round(1000 * clock) * (end - begin) for begin, end in zip([0, *ends], ends, strict=False)]
    first, *rest = to_pictures(pictures)
    first.save(path, save_all=True, append_images=rest, duration=shown, loop=0, quality=90)
    return path
