"""CLIP models of transformers as frozen judges: pictures and prompts to unit vectors, with gradient to the pixels.

Radford et al. 2021. Preprocessing is the model's own (shorter side, antialiased bicubic, centre crop, mean and
deviation) in torch, without the rounding to 8 bits.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.pipelines.loading import PICKLED
from limbeck.core.run.errors import BadInput, clean

BICUBIC = 3  # the resampling filter's number in preprocessor_config.json
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the released CLIP models
KNOWN = 8192  # prompts whose vectors are kept
BROKEN = (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, SafetensorError)


@dataclass(frozen=True)
class Look:
    """How the model wants to see a picture: shorter side and crop in pixels, mean and deviation of values in [0,1]."""

    side: int = 224
    crop: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, x: Tensor) -> Tensor:
        """[B,3,H,W] in [-1,1] -> [B,3,crop,crop]; what lies outside is cut off, as in the picture that a user sees."""
        x = x.float().clamp(-1, 1) / 2 + 0.5
        shorter = min(x.shape[-2:])
        height, width = (int(self.side * length / shorter) for length in x.shape[-2:])
        for shape in ((x.shape[-2], width), (height, width)):  # Pillow cuts off after either direction
            x = F.interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        x = x[..., top : top + self.crop, left : left + self.crop]
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


class Clip(nn.Module):
    """Both towers, frozen; vectors are float32 of length one, a prompt is read once."""

    net: Any  # a CLIPModel

    def __init__(self, net: nn.Module, tokenizer: Any, look: Look) -> None:
        super().__init__()
        self.net, self.tokenizer, self.look = net.requires_grad_(False).eval(), tokenizer, look
        self.known: OrderedDict[str, Tensor] = OrderedDict()
        self.told_cut = False

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale): what the model multiplies its cosines by, 100 for the released ones."""
        return torch.as_tensor(self.net.logit_scale).float().exp()

    @property
    def width(self) -> int:
        """D."""
        return int(self.net.config.projection_dim)

    def images(self, x: Tensor) -> Tensor:
        """[B,3,H,W] in [-1,1] -> [B,D], differentiable in x."""
        pixels = self.look(x).to(self.net.dtype)
        pooled = self.net.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.net.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """[B,D]; each prompt is read alone, so that its bits do not depend on its company."""
        each = dict.fromkeys(prompts)
        found = {prompt: self.known[prompt] if prompt in self.known else self._text(prompt) for prompt in each}
        for prompt, row in found.items():
            self.known[prompt] = row
            self.known.move_to_end(prompt)
        while len(self.known) > KNOWN:
            self.known.popitem(last=False)
        return torch.stack([found[prompt] for prompt in prompts])

    def cosine(self, x: Tensor, prompts: list[str]) -> Tensor:
        """Cosine [B] of each picture with its own prompt."""
        return (self.images(x) * self.texts(prompts)).sum(-1)

    def _text(self, prompt: str) -> Tensor:
        limit = self.net.config.text_config.max_position_embeddings
        ids = self.tokenizer([prompt], truncation=True, max_length=limit, return_tensors="pt").input_ids
        self._tell_cut(prompt, limit)
        pooled = self.net.text_model(input_ids=ids.to(self.net.device)).pooler_output
        return F.normalize(self.net.text_projection(pooled).float(), dim=-1)[0]

    def _tell_cut(self, prompt: str, limit: int) -> None:
        if not self.told_cut and len(self.tokenizer([prompt], verbose=False).input_ids[0]) > limit:
            self.told_cut = True
            text = f'the reward reads only {limit} tokens of a prompt; the end of "{clean(prompt, 60)}" is ignored'
            print(f"warning: {text}", file=sys.stderr)


def load(model: str, processor: str | None, device: str | torch.device, dtype: torch.dtype) -> Clip:
    """A CLIP model from a local folder or a hub id that the user named: safetensors only, no remote code."""
    source, local = locate(model, "model")
    beside, beside_local = locate(processor, "processor") if processor else (source, local)
    net = read_net(source, local, dtype)
    tokenizer, look = read_processor(beside, beside_local)
    if look.crop != net.config.vision_config.image_size:
        raise BadInput(
            f"processor: {clean(beside)} makes pictures of {look.crop} pixels and {clean(source)} reads "
            f"{net.config.vision_config.image_size}; name the processor that belongs to the model"
        )
    return Clip(net, tokenizer, look).to(device)


def locate(text: str, key: str) -> tuple[str, bool]:
    """(folder, True) for a local folder without pickled weights, (id, False) for what can only be a hub id."""
    path, parts = Path(text).expanduser(), text.split("/")
    if not path.is_dir():
        if path.exists() or text[:1] in "./~" or len(parts) != 2 or not all(parts):
            raise BadInput(f"{key}: there is no folder {clean(text)}; give a CLIP folder or a hub id OWNER/NAME")
        return text, False
    files = [file.name for file in path.iterdir() if file.is_file()]
    pickled = [file for file in files if file.endswith(PICKLED) and file != "training_args.bin"]
    if pickled and not any(file.endswith(".safetensors") for file in files):
        raise BadInput(f"{key}: {clean(pickled[0])} is a pickle, which is never opened; save the model as safetensors")
    return str(path), True


def read_net(source: str, local: bool, dtype: torch.dtype) -> Any:
    """The two towers; a checkpoint of another layout is refused, since what it lacks would stay random."""
    from transformers import AutoConfig, CLIPModel

    safe: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        kind = AutoConfig.from_pretrained(source, **safe).model_type
        if kind != "clip":
            raise BadInput(f"model: {clean(source)} is a {clean(kind, 40)} model; this reward needs one of type clip")
        with quiet():
            loaded: Any = CLIPModel.from_pretrained(
                source, dtype=dtype, use_safetensors=True, local_files_only=local, output_loading_info=True
            )
    except BROKEN as error:
        raise _unreadable("model", source, error) from None
    net, found = loaded
    missing = [*found["missing_keys"], *found["mismatched_keys"]]
    if missing:
        raise BadInput(f"model: {clean(source)} lacks {clean(missing[0], 80)}; give one that CLIPModel saved")
    return net


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and its table of keys: what is missing is told by our own error."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_processor(source: str, local: bool) -> tuple[Any, Look]:
    """Tokenizer and preprocessing."""
    from transformers import AutoTokenizer, ImageProcessingMixin

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        settings = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local)[0]
        if settings.get("resample", BICUBIC) != BICUBIC:
            raise BadInput(f"processor: {clean(source)} does not resize by bicubic interpolation, as CLIP does")
        side, crop = (_pixels(settings.get(key, 224)) for key in ("size", "crop_size"))
        mean, std = (tuple(settings.get(key, other)) for key, other in (("image_mean", MEAN), ("image_std", STD)))
        return tokenizer, Look(side, crop, mean, std)
    except BROKEN as error:
        raise _unreadable("processor", source, error) from None


def _pixels(value: Any) -> int:
    return int(value if isinstance(value, int) else value.get("shortest_edge") or value["height"])


def _unreadable(key: str, source: str, error: BaseException) -> BadInput:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return BadInput(f"{key}: cannot load {clean(source)}: {clean(lines[0], 160)}")
