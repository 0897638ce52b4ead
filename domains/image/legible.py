"""The reward `image.legible_text`: what a text recogniser reads in a picture against what its prompt quotes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.pictures import to_pictures
from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean
from limbeck.domains.image.config import LegibleText
from limbeck.domains.image.reward_models import prompts

# An apostrophe inside a word is no quotation mark.
QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|‘([^’]+)’|(?<!\w)'([^']+)'(?!\w)")
CONFIDENT = 0.5  # lines that the recogniser itself doubts are not read


def legible_text(config: LegibleText, build: Build) -> Reward:
    """1 - edit distance / length of the longer text, between cond["text"] (or the prompt's quotes) and what is read.

    Flow-GRPO's reward for text (Liu et al. 2025) with two deviations: text beside the wanted one counts against a
    picture, and the recogniser is RapidOCR. Case and spaces do not count: the recogniser drops spaces.
    """
    read = reader()

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        found = [likeness(read(picture), text) for picture, text in zip(to_pictures(x), texts(cond), strict=True)]
        return torch.tensor(found, device=x.device)

    return Reward(score, "legible_text", "pixels")


def reader() -> Any:
    """Picture -> the text in it, lines from top to bottom."""
    try:
        from rapidocr_onnxruntime import RapidOCR  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise BadInput("image.legible_text needs a text recogniser: run `pip install 'limbeck[ocr]'`") from None
    engine = RapidOCR()

    def read(picture: Any) -> str:
        lines, _ = engine(np.asarray(picture)[:, :, ::-1])  # it wants blue first
        return " ".join(text for _, text, confidence in lines or [] if float(confidence) >= CONFIDENT)

    return read


def texts(cond: Condition) -> list[str]:
    """The text that each picture should show."""
    if "text" in cond:
        return list(cond["text"])
    return [quoted(prompt) for prompt in prompts(cond)]


def quoted(prompt: str) -> str:
    """The quoted parts of a prompt."""
    parts = ["".join(groups) for groups in QUOTED.findall(prompt)]
    if not parts:
        raise BadInput(f'image.legible_text: no text is quoted in the prompt {clean(prompt, 80)}; write: a sign "OPEN"')
    return " ".join(parts)


def likeness(read: str, wanted: str) -> float:
    """1 for the same letters, 0 for none in common; case and spaces do not count."""
    a, b = ("".join(text.casefold().split()) for text in (read, wanted))
    return 1 - edits(a, b) / max(len(a), len(b), 1)


def edits(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (left != right))
    return row[-1]
