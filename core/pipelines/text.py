"""Text by a pipeline's own encoders; each prompt is read once, by whatever run (see core/stored_states.py)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.pipelines.family import Family, Options, Pipe
from limbeck.core.run.errors import clean
from limbeck.core.stored_states import StoredText, fingerprint

PARTS = ("text_encoder", "tokenizer")  # how the components begin that read text


def reader(pipe: Pipe, family: Family, options: Options) -> Callable[[list[str]], Encoded]:
    """What encodes prompts, one row each."""

    @torch.no_grad()
    def encode(prompts: list[str]) -> Encoded:
        with quiet():
            return family.encode(pipe, prompts, options)

    def maker() -> str:
        parts = {name: part for name, part in pipe.components.items() if name.startswith(PARTS)}
        told = {key: f"{value}" for key, value in pipe.config.items() if not key.startswith("_")}
        return fingerprint(family.encode, options, parts, told)

    states = StoredText(encode, maker, pipe.device)

    def read(prompts: list[str]) -> Encoded:
        if family.net == "unet":  # CLIP alone; where T5 reads along, nothing is lost
            tell_cut(pipe, prompts)
        return states(prompts)

    return read


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' own warnings, which would come at every prompt."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def tell_cut(pipe: Pipe, prompts: list[str]) -> None:
    """Say once for a pipeline that it reads only the beginning of a long prompt."""
    limit = pipe.tokenizer.model_max_length
    if getattr(pipe, "told_cut", False):
        return
    for prompt, ids in zip(prompts, pipe.tokenizer(list(prompts), verbose=False).input_ids, strict=True):
        if len(ids) > limit:
            pipe.told_cut = True
            print(
                f'warning: only {limit} tokens of a prompt are read; the end of "{clean(prompt, 60)}" is ignored',
                file=sys.stderr,
            )
            return
