"""Masked sequence models on disk and in memory: a folder with limbeck.json and model.safetensors, or ESM's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Encoded, Model
from limbeck.core.diffusion.discrete import MaskProcess, TokenNetwork
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.domains.sequence import tokens
from limbeck.domains.sequence.nets import DilatedCNN
from limbeck.domains.sequence.text import ALPHABETS, Alphabet

ASSETS = Path(__file__).parent / "assets"
MARK, WEIGHTS = "limbeck.json", "model.safetensors"
Meta = dict[str, Any]  # alphabet, length, schedule, net: {kind, …}


def call(net: nn.Module, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """Masked nets need no time: the number of masks says it."""
    logits: Tensor = net(x)
    return logits


def network(meta: Meta) -> nn.Module:
    """A fresh net as the meta data describes it; it keeps the description."""
    net, size = meta["net"], ALPHABETS[meta["alphabet"]].size
    made: Any
    if net["kind"] == "cnn":
        made = DilatedCNN(size, net["width"], net["kernel"], net["dilations"], net.get("places", 0))
    elif net["kind"] == "esm" and meta["alphabet"] == "protein":
        from limbeck.domains.sequence import esm  # transformers takes seconds to import

        made = esm.fresh(net)
    else:
        text = f"{clean(net['kind'], 40)} of {meta['alphabet']}"
        raise BadInput(f"there is no net {text}; take cnn (any alphabet) or esm (protein)")
    made.meta = {"alphabet": meta["alphabet"], "net": net, "schedule": meta.get("schedule", "linear")}
    return made  # type: ignore[no-any-return]


def model(net: nn.Module, meta: Meta, length: int | None, name: str) -> Model:
    """A net with everything around it; a prompt is a template of the model's length, or empty."""
    alphabet = ALPHABETS[meta["alphabet"]]
    denoiser = TokenNetwork(net, MaskProcess(alphabet.size, meta.get("schedule", "linear")), call, timed=False)
    length = length or meta["length"]
    encode = Templates(alphabet, length, next(net.parameters()).device)
    return Model(denoiser, (length,), tokens.Letters(alphabet), encode, name, place=encode.place)


class Templates:
    """Prompts as conditions: `fixed` [B,L] has the letters that a template is sure of, and masks elsewhere."""

    def __init__(self, alphabet: Alphabet, length: int, device: torch.device) -> None:
        self.alphabet, self.length, self.device = alphabet, length, device

    def __call__(self, prompts: list[str]) -> Encoded:
        free = self.alphabet.any * self.length
        texts = [self.text(prompt) or free for prompt in prompts]
        return {"fixed": tokens.encode(texts, self.alphabet).to(self.device)}

    def place(self, x: Tensor, cond: Encoded) -> Tensor:
        """A first state x [B,L] with the letters that the condition is sure of."""
        return torch.where(cond["fixed"] == self.alphabet.size, x, cond["fixed"])

    def text(self, prompt: str) -> str:
        """One template, clean and of the right length; empty for an empty prompt."""
        found = self.alphabet.clean(prompt, "template")
        if found and len(found) != self.length:
            raise BadInput(f"a template of {len(found)} letters does not fit the model's length of {self.length}")
        return found


def save(net: nn.Module, folder: Path, meta: Meta) -> list[Path]:
    """Writes the weights (bf16) and the meta data."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().to(torch.bfloat16).contiguous() for k, v in net.state_dict().items()}, folder / WEIGHTS)
    (folder / MARK).write_text(json.dumps(meta, indent=1) + "\n")
    return [folder / WEIGHTS, folder / MARK]


def load(name: str) -> tuple[nn.Module, Meta]:
    """The net and meta data of an embedded name or a folder, in float32 and evaluation mode."""
    folder = ASSETS / name if name in names() else Path(name).expanduser()
    if (folder / "config.json").is_file():
        from limbeck.domains.sequence import esm

        found = esm.load(folder).eval()
        return found, {**found.meta, "length": 100}
    if not (folder / MARK).is_file():
        hint = did_you_mean(name, names()) or f"; embedded models: {', '.join(names()) or 'none'}"
        raise BadInput(f"there is no sequence model {clean(name, 80)}{hint}")
    meta: Meta = json.loads((folder / MARK).read_text())
    net = network(meta)
    net.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
    return net.eval(), meta


def names() -> list[str]:
    """The models that come with limbeck."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{MARK}"))
