"""A masked model small enough for any test: random weights, no time input."""

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Model
from limbeck.core.diffusion.discrete import MaskProcess, TokenNetwork
from limbeck.domains.sequence import models, tokens
from limbeck.domains.sequence.text import DNA, Alphabet


class Net(nn.Module):
    """Two convolutions: logits [B,L,V] of ids [B,L] or rows [B,L,V+1]."""

    def __init__(self, size: int, width: int = 16) -> None:
        super().__init__()
        self.size = size
        self.first, self.second = nn.Conv1d(size + 1, width, 5, padding=2), nn.Conv1d(width, size, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        rows = tokens.rows(x, self.size).to(self.first.weight.dtype)
        return self.second(torch.tanh(self.first(rows.transpose(1, 2)))).transpose(1, 2)


def tiny_model(alphabet: Alphabet = DNA, length: int = 12, seed: int = 0) -> Model:
    """The same weights for the same seed; a prompt is a template of `length` letters, or empty."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(alphabet.size)
    denoiser = TokenNetwork(net, MaskProcess(alphabet.size), models.call)
    encode = models.Templates(alphabet, length, torch.device("cpu"))
    return Model(denoiser, (length,), tokens.Letters(alphabet), encode, "tiny", place=encode.place)
