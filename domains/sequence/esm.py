"""ESM protein language models (Lin et al. 2023) as masked denoisers, through the classes of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EsmConfig, EsmForMaskedLM

from limbeck.core.run.errors import BadInput
from limbeck.domains.sequence.text import PROTEIN
from limbeck.domains.sequence.tokens import rows

VOCABULARY = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
TRAINED = 0.15 * 0.8  # the share of masks that ESM-2 saw; its embeddings are scaled as if there were as many


class Esm(nn.Module):
    """Logits [B,L,20] of ids [B,L] or soft rows [B,L,21] (the last column is the mask); any length."""

    meta: dict[str, Any]
    place: Tensor
    esm: Any

    def __init__(self, esm: EsmForMaskedLM) -> None:
        super().__init__()
        self.esm = esm
        wanted = [*PROTEIN.letters, "<mask>", "<cls>", "<eos>"]
        self.register_buffer("place", torch.tensor([VOCABULARY.index(name) for name in wanted]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        embeddings = self.esm.esm.embeddings.word_embeddings.weight
        table, r = embeddings[self.place], rows(x, PROTEIN.size).to(embeddings.dtype)
        inner = r[..., :-1] @ table[:20]
        if self.esm.config.token_dropout:
            masks = r[..., -1].sum(1) / (x.shape[1] + 2)
            scale = ((1 - TRAINED) / (1 - masks))[:, None, None]
        else:
            inner, scale = inner + r[..., -1:] * table[20], torch.ones((), device=inner.device)
        ends = table[21:].expand(len(x), 2, -1)
        whole = torch.cat([ends[:, :1], inner, ends[:, 1:]], 1) * scale
        present = torch.ones(whole.shape[:2], device=whole.device)
        logits = self.esm(inputs_embeds=whole, attention_mask=present).logits
        found: Tensor = logits[:, 1:-1, self.place[:20]]
        return found


def fresh(net: dict[str, Any]) -> Esm:
    """Random weights: `width`, `layers` and `heads` as ESM-2 has them."""
    config = EsmConfig(
        vocab_size=len(VOCABULARY), mask_token_id=VOCABULARY.index("<mask>"), pad_token_id=1,
        hidden_size=net["width"], num_hidden_layers=net["layers"], num_attention_heads=net["heads"],
        intermediate_size=4 * net["width"], max_position_embeddings=1026, position_embedding_type="rotary",
        emb_layer_norm_before=False, token_dropout=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Esm(EsmForMaskedLM(config))


def load(folder: Path) -> Esm:
    """A checkpoint of ESM in its own format (config.json, model.safetensors, vocab.txt); BadInput for another one."""
    config = EsmConfig.from_pretrained(folder)
    if config.model_type != "esm" or config.position_embedding_type != "rotary":
        raise BadInput(f"{folder}: this {config.model_type} is no ESM-2 (rotary positions); give a folder of ESM-2")
    names = folder / "vocab.txt"
    if names.is_file() and tuple(names.read_text().split()) != VOCABULARY:
        raise BadInput(f"{names}: the tokens are not those of ESM-2; give a folder of ESM-2")
    made = Esm(EsmForMaskedLM.from_pretrained(folder, use_safetensors=True, local_files_only=True))
    size = {"width": config.hidden_size, "layers": config.num_hidden_layers, "heads": config.num_attention_heads}
    made.meta = {"alphabet": PROTEIN.name, "net": {"kind": "esm", **size}}
    return made
