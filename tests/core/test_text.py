"""The embedded text encoder against transformers' and sentence-transformers' own recipe."""

import importlib.util

import pytest
import torch

from limbeck.core import text
from limbeck.core.run.errors import LimbeckError

PROMPTS = ["", "dog", "grinning face with big eyes", "a very long caption " * 12]


@pytest.fixture(scope="module")
def encoder() -> text.MiniLMEncoder:
    torch.set_num_threads(1)
    return text.MiniLMEncoder()


def test_shapes_and_mask(encoder: text.MiniLMEncoder) -> None:
    states, mask = encoder.encode(PROMPTS)
    assert states.shape == (4, 16, 384) and states.dtype == torch.float32
    assert mask.shape == (4, 16) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [2, 3, 7, 16]  # [CLS] and [SEP] included; the long one is cut
    assert (states[~mask] == 0).all()
    assert mask.int().diff(dim=1).max() <= 0, "padding must follow the tokens"


def test_states_do_not_depend_on_padding_or_company(encoder: text.MiniLMEncoder) -> None:
    together, _ = encoder.encode(PROMPTS)
    alone, _ = encoder.encode(["dog"])
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=1e-5)
    tokens = encoder.tokenizer(["dog"], return_tensors="pt")
    with torch.no_grad():
        bare = encoder.model(**tokens).last_hidden_state[0]
    torch.testing.assert_close(alone[0, :3], bare, atol=1e-5, rtol=1e-5)


def test_sentence_is_the_pooled_normalised_reference(encoder: text.MiniLMEncoder) -> None:
    prompts = PROMPTS[1:3]
    tokens = encoder.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder.model(**tokens).last_hidden_state
    weight = tokens["attention_mask"][..., None].float()
    mean = (hidden * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(encoder.sentence(prompts), mean / mean.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)


def test_sentence_knows_meaning(encoder: text.MiniLMEncoder) -> None:
    dog, puppy, truck = encoder.sentence(["dog", "puppy", "delivery truck"])
    assert dog @ puppy > 0.6 > 0.4 > dog @ truck


def test_frozen_and_never_in_training_mode(encoder: text.MiniLMEncoder) -> None:
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training and not encoder.model.training
    one, two = encoder.encode(["dog"])[0], encoder.encode(["dog"])[0]
    assert torch.equal(one, two)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LimbeckError, match=r"limbeck\[embedded\]"):
        text.MiniLMEncoder()
