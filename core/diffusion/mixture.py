"""Closed-form teachers: Gaussian mixtures, finite data sets and small token tables, with exact posteriors and draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Features, Output, Prediction
from limbeck.core.diffusion.discrete import NEVER, DiscretePrediction, TokenProcess, categorical
from limbeck.core.diffusion.process import Process, working_dtype


class GaussianMixture(Denoiser):
    """The exact denoiser of sum_k w_k N(m_k, s_k^2 I), in any dimension; posteriors in float64.

    `classes` gives each component a label: cond {"label": [B]} keeps the components of that label, -1 keeps all.
    """

    def __init__(
        self,
        means: Tensor,
        std: float | Tensor,
        process: Process,
        weights: Tensor | Sequence[float] | None = None,
        classes: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__(process, "x0")
        count = len(means)
        weights = torch.ones(count) if weights is None else torch.as_tensor(weights)
        classes = torch.zeros(count) if classes is None else torch.as_tensor(classes)
        self.shape = tuple(means.shape[1:])
        self.register_buffer("means", means.double())
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float64).expand(count).clone())
        self.register_buffer("weights", weights.double() / weights.double().sum())
        self.register_buffer("classes", classes.long())

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        """x0_hat = sum_k r_k (m_k sigma^2/v_k + x alpha s_k^2/v_k), v_k = alpha^2 s_k^2 + sigma^2."""
        alpha, sigma = self._levels(x_t, t)
        logits, variance = self._terms(x_t, alpha, sigma, cond)
        r = torch.softmax(logits, 1) / variance
        flat = x_t.flatten(1).double()
        x0 = (r * sigma**2) @ self._flat() + (r * alpha * self.get_buffer("std") ** 2).sum(1, keepdim=True) * flat
        return x0.reshape(x_t.shape).to(working_dtype(x_t))

    def log_prob(self, x_t: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        """log p_t(x_t) [B], float64; with a label, log p_t(x_t | label)."""
        alpha, sigma = self._levels(x_t, t)
        logits = self._terms(x_t, alpha, sigma, cond)[0]
        dims = self._flat().shape[1]
        prior = torch.logsumexp(self._log_weights(len(x_t), cond), 1)
        return torch.logsumexp(logits, 1) - prior - 0.5 * dims * math.log(2 * math.pi)

    def sample(self, n: int, gen: torch.Generator, cond: Encoded | None = None) -> Tensor:
        """n exact samples x0 [n,*S], float32, on the teacher's device."""
        k = categorical(self._log_weights(n, cond or {}).exp(), gen)
        noise = torch.randn(n, *self.shape, generator=gen, device=gen.device, dtype=torch.float64)
        std = self.get_buffer("std").double()[k].reshape(n, *[1] * len(self.shape))
        return (self.get_buffer("means").double()[k] + std * noise.to(std.device)).float()

    def _levels(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma as [B,1] float64."""
        if t.numel() not in (1, len(x_t)):
            raise ValueError(f"closed-form teachers take one t per sample; got shape {tuple(t.shape)}")
        t = t.reshape(-1, 1).to(x_t.device)
        return self.process.alpha(t), self.process.sigma(t)

    def _flat(self) -> Tensor:
        """Means as [K,D] float64."""
        return self.get_buffer("means").flatten(1).double()

    def _terms(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, cond: Encoded) -> tuple[Tensor, Tensor]:
        """Joint log densities [B,K] (without the 2 pi) and variances v_k [B,K]."""
        x, means = x_t.flatten(1).double(), self._flat()
        variance = (alpha * self.get_buffer("std")) ** 2 + sigma**2
        square = (x**2).sum(1, keepdim=True) - 2 * alpha * (x @ means.T) + alpha**2 * (means**2).sum(1)
        logits = self._log_weights(len(x), cond) - square / (2 * variance) - means.shape[1] / 2 * variance.log()
        return logits, variance

    def _log_weights(self, n: int, cond: Encoded) -> Tensor:
        """log w_k [B,K], -inf where the label excludes the component."""
        log_weights = self.get_buffer("weights").double().log().expand(n, -1)
        if "label" not in cond:
            return log_weights
        label = cond["label"].expand(n)[:, None].to(log_weights.device)
        allowed = (label < 0) | (label == self.get_buffer("classes"))
        if not bool(allowed.any(1).all()):
            raise ValueError("a label names no component of this closed-form teacher; use -1 for all of them")
        return torch.where(allowed, log_weights, -math.inf)


class DataSet(Denoiser):
    """The exact denoiser of a finite set of points [N,*S], each blurred by `bandwidth`; `labels` choose subsets."""

    def __init__(
        self, points: Tensor, process: Process, bandwidth: float = 0.0, labels: Tensor | Sequence[int] | None = None
    ) -> None:
        super().__init__(process, "x0")
        self.mixture = GaussianMixture(points, bandwidth, process, classes=labels)

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        return self.mixture(x_t, t, cond)

    def sample(self, n: int, gen: torch.Generator, cond: Encoded | None = None) -> Tensor:
        """n draws with replacement, blurred, [n,*S] float32."""
        return self.mixture.sample(n, gen, cond)

    def log_prob(self, x_t: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        """log p_t(x_t) [B], float64."""
        return self.mixture.log_prob(x_t, t, cond)


class TokenTable(Denoiser):
    """Exact p(x0_i | x_t) of a joint table over all V^L sequences: [V,…,V], or [C,V,…,V] with cond {"label": [B]}."""

    def __init__(self, table: Tensor, process: TokenProcess, conditional: bool = False) -> None:
        super().__init__(process, "logp")
        table = table.double() if conditional else table.double()[None]
        self.length, self.vocab, self.conditional = table.ndim - 1, process.vocab, conditional
        if any(size != self.vocab for size in table.shape[1:]):
            raise ValueError(f"a table of {tuple(table.shape)} does not fit a vocabulary of {self.vocab}")
        flat = table.flatten(1)
        states = torch.tensor(list(itertools.product(range(self.vocab), repeat=self.length)))
        self.register_buffer("table", flat / flat.sum(1, keepdim=True))
        self.register_buffer("states", states)

    def prior(self, n: int, cond: Encoded) -> Tensor:
        """p(x0) over all sequences, [B,V^L]; label -1 (or none) is the even mixture of the labels."""
        table = self.get_buffer("table")
        marginal = table.mean(0, keepdim=True).expand(n, -1)
        if not self.conditional or "label" not in cond:
            return marginal
        label = cond["label"].expand(n).to(table.device)
        return torch.where(label[:, None] < 0, marginal, table[label.clamp(min=0)])

    def posterior(self, x_t: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        """p(x0 | x_t) over all sequences, [B,V^L]; linear in soft rows of x_t before it is normalised."""
        process, states = cast(TokenProcess, self.process), self.get_buffer("states")
        likelihood = process.likelihood(x_t, t.to(x_t.device))
        joint = self.prior(len(x_t), cond)
        for i in range(self.length):
            joint = joint * likelihood[:, i, states[:, i]]
        return joint / joint.sum(1, keepdim=True)

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        """log p(x0_i = v | x_t) [B,L,V], float64."""
        post, states = self.posterior(x_t, t, cond), self.get_buffer("states")
        one_hot = torch.nn.functional.one_hot(states, self.vocab).double()
        p = torch.einsum("bm,mlv->blv", post, one_hot)
        return torch.where(p > 0, p.clamp_min(1e-300).log(), NEVER)

    def wrap(self, raw: Tensor, x_t: Tensor, t: Tensor, features: Features | None = None) -> Prediction:
        return DiscretePrediction(raw, x_t, t, self.process, self.kind, features)

    def sample(self, n: int, gen: torch.Generator, cond: Encoded | None = None) -> Tensor:
        """n exact sequences [n,L]."""
        return self.get_buffer("states")[categorical(self.prior(n, cond or {}), gen)]


def cdf(mixture: GaussianMixture, x: Tensor, t: Tensor) -> Tensor:
    """F_t(x) of a one-dimensional mixture, x and t of any same shape, float64."""
    alpha, sigma = mixture.process.alpha(t)[..., None], mixture.process.sigma(t)[..., None]
    std = torch.sqrt((alpha * mixture.get_buffer("std")) ** 2 + sigma**2)
    z = (x.double()[..., None] - alpha * mixture.get_buffer("means").flatten()) / std
    return (mixture.get_buffer("weights") * torch.special.ndtr(z)).sum(-1)


def cdf_map(mixture: GaussianMixture, x: Tensor, t: Tensor, s: Tensor, bound: float = 8.0) -> Tensor:
    """The exact probability-flow map in one dimension, F_s^-1(F_t(x)), by 80 bisections on [-bound, bound]."""
    target = cdf(mixture, x, t)
    low, high = torch.full_like(target, -bound), torch.full_like(target, bound)
    for _ in range(80):
        middle = (low + high) / 2
        below = cdf(mixture, middle, s) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
