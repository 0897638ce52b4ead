"""Two small worlds whose tilted laws are known exactly: words of four letters, and a line of Gaussians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Features, Model, Output, Prediction
from limbeck.core.diffusion.discrete import MaskProcess, soft_rows
from limbeck.core.diffusion.mixture import TokenTable
from limbeck.core.diffusion.process import VP, expand
from limbeck.core.diffusion.sampling import mask, sample
from limbeck.core.rewards import config as settings
from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.rng import generator

LENGTH, VOCAB, MASK = 4, 3, 3


@dataclass(frozen=True)
class Words:
    """All 81 words of 4 letters from 3 with a fixed law p and reward r; the optimum of E r - beta KL is p e^{r/beta}.

    E_p r = -.130, E_p* r = 1.392, KL(p* | p) = 1.404, total variation .680; the optimum's value is .690.
    """

    beta: float = 0.5
    table: Tensor = field(init=False)
    reward: Tensor = field(init=False)
    states: Tensor = field(init=False)
    parts: tuple[Tensor, Tensor, Tensor] = field(init=False)  # letters' weights [4,3]; mean and deviation of their sum

    def __post_init__(self) -> None:
        gen = torch.Generator().manual_seed(0)
        logits = 1.2 * torch.randn(VOCAB**LENGTH, generator=gen)
        letters = torch.randn(LENGTH, VOCAB, generator=gen)
        states = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)
        raw = letters[torch.arange(LENGTH), states].sum(1) + 0.8 * (states[:, 0] == states[:, 3])
        for name, value in (
            ("table", torch.softmax(logits.double(), 0)),
            ("reward", ((raw - raw.mean()) / raw.std()).double()),
            ("states", states),
            ("parts", (letters, raw.mean(), raw.std())),
        ):
            object.__setattr__(self, name, value)

    def teacher(self) -> TokenTable:
        """The exact masked denoiser of p."""
        return TokenTable(self.table.view(*[VOCAB] * LENGTH), MaskProcess(VOCAB))

    def tilt(self, beta: float | None = None) -> Tensor:
        """p* over the 81 words."""
        raw = self.table * torch.exp(self.reward / (beta or self.beta))
        return raw / raw.sum()

    def index(self, x: Tensor) -> Tensor:
        """The number of each word x [B,4] among the 81."""
        place = VOCAB ** torch.arange(LENGTH - 1, -1, -1, device=x.device)
        return (x * place).sum(1)

    def score(self, x: Tensor) -> Tensor:
        """r(x) [B] of whole words."""
        return self.reward[self.index(x)]

    def extended(self, x: Tensor) -> Tensor:
        """r [B] of words [B,4] or soft rows [B,4,3] (or with a mask's column): linear in each letter's row."""
        rows = soft_rows(x, VOCAB)[..., :VOCAB]
        letters, centre, scale = (part.to(rows) for part in self.parts)
        raw = (rows * letters).sum((1, 2)) + 0.8 * (rows[:, 0] * rows[:, 3]).sum(1)
        return (raw - centre) / scale

    def law(self, x: Tensor) -> Tensor:
        """The empirical law of words x [B,4], over the 81."""
        return torch.bincount(self.index(x), minlength=len(self.table)).double() / len(x)

    def value(self, teacher: TokenTable, x: Tensor) -> Tensor:
        """The exact soft value beta log E_p[e^{r/beta} | x_t] [B] of words x [B,4] with masks."""
        post = teacher.posterior(x, torch.full((len(x),), 0.5), {})
        return self.beta * torch.log(post @ torch.exp(self.reward / self.beta))

    def objective(self, law: Tensor) -> float:
        """E r - beta KL(law | p)."""
        kl = (law * (law.clamp_min(1e-300) / self.table).log()).sum()
        return float((law * self.reward).sum() - self.beta * kl)


def variation(a: Tensor, b: Tensor) -> float:
    """Total variation distance of two laws."""
    return float((a - b).abs().sum() / 2)


class Writer(Denoiser):
    """A policy over words: the exact teacher's log-probabilities plus a small net's, which starts at zero."""

    def __init__(self, words: Words, width: int = 128) -> None:
        super().__init__(words.teacher().process, "logp")
        self.teacher = words.teacher()
        out = nn.Linear(width, LENGTH * VOCAB, dtype=torch.float64)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        first, second = (nn.Linear(n, width, dtype=torch.float64) for n in (LENGTH * (VOCAB + 1), width))
        self.net = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), out)

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        base = self.teacher(x_t, t, cond)
        assert isinstance(base, Tensor)
        return base + self.net(soft_rows(x_t, VOCAB)).view_as(base)

    def wrap(self, raw: Tensor, x_t: Tensor, t: Tensor, features: Features | None = None) -> Prediction:
        return self.teacher.wrap(raw, x_t, t)


class Shifted(Denoiser):
    """The exact denoiser of N(theta, 1), with theta to be tuned."""

    def __init__(self, theta: float = 0.0) -> None:
        super().__init__(VP("cosine"), "eps")
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        alpha, sigma = (expand(level, x_t) for level in self.process.levels(t))
        return sigma * (x_t - alpha * self.theta) / (alpha**2 + sigma**2)


def teacher(config: None, build: Build) -> Model:
    """Factory of the words' exact denoiser; prompts mean nothing to it."""
    return Model(Words().teacher().to(build.device), (LENGTH,), Identity(), lambda prompts: {}, "words")


class Scribe(nn.Module):
    """The student of the toy words: its denoiser is a Writer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.denoiser = Writer(Words(), width)


def student(config: settings.Writer, build: Build) -> Scribe:
    """Factory of the writer."""
    return Scribe(config.width).to(build.device)


def letters(config: None, build: Build) -> Reward:
    """Factory of the words' reward: black box, on whole words [B,4]."""
    words = Words()

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return words.score(x.cpu()).to(x.device)

    return Reward(score, "letters", "tokens")


def letters_soft(config: None, build: Build) -> Reward:
    """Factory of the words' reward with its gradient."""
    return soft_letters()


def soft_letters() -> Reward:
    """The words' reward on words [B,4] or soft rows [B,4,3], with its gradient."""
    words = Words()

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return words.extended(x)

    return Reward(score, "letters", "onehot", differentiable=True, accepts_soft=True)


def metric(config: settings.Tilt, build: Build) -> Callable[[], list[dict[str, float | str]]]:
    """Factory of the metric: student, teacher and the exact tilt, a row each."""
    words = Words(config.beta)

    @torch.no_grad()
    def drawn(denoiser: Denoiser) -> Tensor:
        start = torch.full((config.count, LENGTH), MASK, device=build.device)
        times = torch.linspace(1, 0, config.steps + 1)
        return words.law(sample(denoiser, start, times, mask(), generator(build.seed, "tilt", 0)).cpu())

    def rows() -> list[dict[str, float | str]]:
        laws = {"student": drawn(build.piece("student").denoiser), "teacher": drawn(build.piece("teacher").denoiser)}
        return [
            {
                "words": name,
                "reward": float((law * words.reward).sum()),
                "reward - beta KL": words.objective(law),
                "variation from the tilt": variation(law, words.tilt()),
            }
            for name, law in (laws | {"exact tilt": words.tilt()}).items()
        ]

    return rows
