"""Masked and uniform processes on tokens: states 0..V-1, the mask is V.

A state is ids [B,L] or soft rows [B,L,V+1] that sum to 1; both are legal everywhere (straight-through and Gumbel-soft
trajectories need the rows). Probabilities and draws are float64; a token is untouched at t with chance alpha(t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.diffusion.cached import RowCache
from limbeck.core.diffusion.denoiser import Call, Denoiser, Encoded, Features, Network, Output, Prediction, plain_call
from limbeck.core.diffusion.draws import Generator
from limbeck.core.diffusion.draws import uniform as uniform_draws
from limbeck.core.diffusion.process import Process, expand, working_dtype

NEVER = -1e6  # a log-probability that stays finite under products with zero


def soft_rows(x: Tensor, vocab: int) -> Tensor:
    """Ids [B,L] as one-hot rows [B,L,V+1] float64; rows as they are, in float64."""
    return x.double() if x.is_floating_point() else F.one_hot(x, vocab + 1).double()


def _where(gone: Tensor, ids: Tensor, x0: Tensor, vocab: int) -> Tensor:
    """The tokens `ids` [B,L] where gone, x0 elsewhere, in the form of x0 (ids or soft rows)."""
    if not x0.is_floating_point():
        return torch.where(gone, ids, x0)
    return torch.where(gone[..., None], soft_rows(ids, vocab).to(x0.dtype), x0)


def categorical(probs: Tensor, gen: Generator) -> Tensor:
    """Exact draws by inverse CDF in float64 from unnormalised probs [..., V]; a zero is never drawn.

    Gumbel-max in float32 cannot reach rare tokens: its largest Gumbel is 16.6 (tests/core/test_discrete.py).
    """
    cdf = probs.detach().double().cumsum(-1)
    u = uniform_draws(cdf.shape[:-1], gen).to(cdf.device)
    total = cdf[..., -1:]
    point = torch.minimum(u[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf.contiguous(), point, right=True)[..., 0]


@dataclass(frozen=True)
class MaskProcess(Process):
    """Absorbing process: a token is masked at t with chance sigma(t).

    "linear" is t (MDLM's log-linear); "cosine" is 1 - cos(pi t/2) (MaskGIT, MDLM's cosine without its small offset).
    """

    vocab: int
    schedule: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"the schedule of masks is {self.schedule!r}; use linear or cosine")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double() if self.schedule == "linear" else torch.cos(t.double() * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        if self.schedule == "linear":
            return t.double()
        return 2 * torch.sin(t.double() * (math.pi / 4)).square()  # 1 - cos, exact near 0

    def d_alpha(self, t: Tensor) -> Tensor:
        if self.schedule == "linear":
            return -torch.ones_like(t, dtype=torch.float64)
        return -math.pi / 2 * torch.sin(t.double() * (math.pi / 2))

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.d_alpha(t)

    def t_of_ratio(self, r: Tensor) -> Tensor:
        return self.t_of_sigma(1 / (1 + 1 / r.double()))

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time at which a token is masked with chance sigma, float64."""
        return sigma.double() if self.schedule == "linear" else 4 / math.pi * torch.asin((sigma.double() / 2).sqrt())

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of x0, ids [B,L] or soft rows [B,L,V+1] (with their gradient); eps [B,L] is uniform in [0,1)."""
        gone = eps < expand(self.sigma(t), eps)
        return _where(gone, torch.full(eps.shape, self.vocab, device=eps.device), x0, self.vocab)

    def initial(self, batch: int, length: int, gen: torch.Generator | None = None) -> Tensor:
        """The state at t = 1: all masks [B,L]."""
        return torch.full((batch, length), self.vocab)

    def start(self, z: Tensor, t: Tensor) -> Tensor:
        """All masks [B,L] for pure noise z [B,L]; ids as they are."""
        return torch.full(z.shape, self.vocab, device=z.device) if z.is_floating_point() else z

    def likelihood(self, x: Tensor, t: Tensor) -> Tensor:
        """q(x_t | x0 = v) [B,L,V] up to a factor per position (which cancels); free of t."""
        rows = soft_rows(x, self.vocab)
        return rows[..., :-1] + rows[..., -1:]

    def known(self, x: Tensor) -> Tensor | None:
        """Ids [B,L] where x0 is known for certain, -1 where it is masked (by argmax on soft rows)."""
        ids = x.argmax(-1) if x.is_floating_point() else x
        return torch.where(ids == self.vocab, -1, ids)

    def move(self, probs: Tensor, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(mass that may move [B,L,1], its transition [B,L,V+1]): x_s = x with 1 - mass, else a draw of the row."""
        stay = expand(self.sigma(s) / self.sigma(t), probs)
        row = torch.cat([probs * (1 - stay), stay.expand(*probs.shape[:-1], 1)], -1)
        return soft_rows(x, self.vocab)[..., -1:], row

    def divergence(self, logp_a: Tensor, logp_b: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """KL of the transitions [B,L]: mask mass * (1 - sigma_s/sigma_t) * sum_v [p log(p/q) - p + q] (DRAKES)."""
        p, q = logp_a.exp(), logp_b.exp()
        rate = 1 - expand(self.sigma(s) / self.sigma(t), p)[..., 0]
        return soft_rows(x, self.vocab)[..., -1] * rate * (p * (logp_a - logp_b) - p + q).sum(-1)


@dataclass(frozen=True)
class UniformProcess(Process):
    """Uniform process (D3PM, UDLM): with chance t a token is replaced by one drawn from all V."""

    vocab: int

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def t_of_ratio(self, r: Tensor) -> Tensor:
        return 1 / (1 + 1 / r.double())

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of x0, ids [B,L] or rows; one uniform eps [B,L] decides whether (eps < t) and by what (its place)."""
        level = expand(t.double(), eps)
        other = (eps.double() / level * self.vocab).floor().clamp(max=self.vocab - 1).long()
        return _where(eps < level, other, x0, self.vocab)

    def initial(self, batch: int, length: int, gen: torch.Generator | None = None) -> Tensor:
        """The state at t = 1: uniform tokens [B,L]."""
        if gen is None:
            raise ValueError("the uniform process starts from random tokens; give a generator")
        return torch.randint(self.vocab, (batch, length), generator=gen, device=gen.device)

    def start(self, z: Tensor, t: Tensor) -> Tensor:
        """Even tokens [B,L] for standard normal noise z [B,L]; ids as they are."""
        if not z.is_floating_point():
            return z
        return (torch.special.ndtr(z.double()) * self.vocab).long().clamp(max=self.vocab - 1)

    def likelihood(self, x: Tensor, t: Tensor) -> Tensor:
        """q(x_t | x0 = v) [B,L,V]."""
        rows = soft_rows(x, self.vocab)[..., :-1]
        alpha = expand(self.alpha(t), rows)
        return alpha * rows + (1 - alpha) / self.vocab

    def known(self, x: Tensor) -> Tensor | None:
        return None

    def move(self, probs: Tensor, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """sum_v p_v q(x_s | x_t, x0 = v), exact for ids; soft rows are normalised."""
        rows = soft_rows(x, self.vocab)[..., :-1]
        a_s, a_t = expand(self.alpha(s), rows), expand(self.alpha(t), rows)
        back = probs / self.likelihood(x, t)
        step = a_t / a_s * rows + (1 - a_t / a_s) / self.vocab
        row = step * (a_s * back + (1 - a_s) / self.vocab * back.sum(-1, keepdim=True))
        row = F.pad(row / row.sum(-1, keepdim=True), (0, 1))
        return torch.ones_like(row[..., :1]), row

    def divergence(self, logp_a: Tensor, logp_b: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """KL of the transitions [B,L]."""
        a, b = self.move(logp_a.exp(), x, t, s)[1], self.move(logp_b.exp(), x, t, s)[1]
        return (a * (_log(a) - _log(b))).sum(-1)


TokenProcess = MaskProcess | UniformProcess


def posterior(process: TokenProcess, probs: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """q(x_s | x_t) as rows [B,L,V+1], for p(x0 | x_t) = probs [B,L,V]."""
    mass, row = process.move(probs, x, t, s)
    return (1 - mass) * soft_rows(x, process.vocab) + mass * row


def _log(p: Tensor) -> Tensor:
    return torch.where(p > 0, p.clamp_min(1e-300).log(), NEVER)


class DiscretePrediction(Prediction):
    """Reads logits [B,L,V] (a mask column is dropped) as log p(x0 | x_t)."""

    @property
    def logp_x0(self) -> Tensor:
        """log p(x0 | x_t) [B,L,V], float32 at least; a token that is not masked is known (SUBS of MDLM)."""
        if "logp" not in self._cache:
            process = cast(TokenProcess, self.process)
            logits = self.raw[..., : process.vocab].to(working_dtype(self.raw))
            logp, known = torch.log_softmax(logits, -1), process.known(self.x_t)
            self._cache["logp"] = logp if known is None else _carry_over(logp, known)
        return self._cache["logp"]


def _carry_over(logp: Tensor, known: Tensor) -> Tensor:
    """Where known >= 0, all mass on that token."""
    sure = torch.full_like(logp, NEVER).scatter(-1, known.clamp(min=0)[..., None], 0.0)
    return torch.where(known[..., None] >= 0, sure, logp)


class TokenNetwork(Denoiser):
    """A net call(net, x, time, cond) -> logits [B,L,V] or [B,L,V+1] behind the discrete seam; x is ids or rows.

    A net that is not `timed` reads no time: its walks keep what it said of rows that did not change.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        process: TokenProcess,
        call: Call = plain_call,
        time_scale: float = 1.0,
        timed: bool = True,
    ) -> None:
        super().__init__(process, "logp")
        self.network, self.timed = Network(net, process, "logp", call, time_scale), timed

    def begin(self, times: Tensor) -> Denoiser:
        return self if self.timed else RowCache(self)

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        return self.network.call(self.network.net, x_t, t * float(self.network.time_scale), cond)

    def wrap(self, raw: Tensor, x_t: Tensor, t: Tensor, features: Features | None = None) -> Prediction:
        return DiscretePrediction(raw, x_t, t, self.process, self.kind, features)


def _logp(pred: Prediction) -> Tensor:
    if not isinstance(pred, DiscretePrediction):
        raise ValueError("token kernels need a discrete prediction; the denoiser is continuous: use ddim or renoise")
    return pred.logp_x0.double()


def reduce_tokens(value: Tensor, reduce: str) -> Tensor:
    """[B,L] to [B] by "sum" or "mean"."""
    if reduce not in ("sum", "mean"):
        raise ValueError(f'reduce is {reduce!r}; use "sum" or "mean"')
    return value.sum(1) if reduce == "sum" else value.mean(1)


@dataclass(frozen=True)
class TokenKernel:
    """One reverse step, positions independent given x_t: MDLM's sampler for masks, UDLM's for uniform noise.

    With `tau` the draw is Gumbel-soft: softmax((log q + G)/tau), which keeps the mass that does not move (DRAKES).
    """

    tau: float | None = None

    def propose(self, pred: Prediction, x: Tensor, t: Tensor, s: Tensor, gen: Generator | None) -> Tensor:
        """x_s: ids [B,L], or soft rows [B,L,V+1] when relaxed."""
        process, logp = cast(TokenProcess, pred.process), _logp(pred)
        gen = _needed(gen)
        if self.tau is None:
            return categorical(posterior(process, logp.exp(), x, t, s), gen)
        mass, row = process.move(logp.exp(), x, t, s)
        soft = torch.softmax((_log(row) + gumbel(row, gen)) / self.tau, -1)
        return ((1 - mass) * soft_rows(x, process.vocab) + mass * soft).to(pred.logp_x0.dtype)  # type: ignore[attr-defined]

    def log_prob(self, pred: Prediction, x: Tensor, x_s: Tensor, t: Tensor, s: Tensor, reduce: str = "sum") -> Tensor:
        """log q(x_s | x_t) [B]; tokens already known add 0. Soft x_s gives the expectation under its rows."""
        process = cast(TokenProcess, pred.process)
        rows = _log(posterior(process, _logp(pred).exp(), x, t, s))
        return reduce_tokens((soft_rows(x_s, process.vocab) * rows).sum(-1), reduce)

    def kl(
        self, pred_a: Prediction, pred_b: Prediction, x: Tensor, t: Tensor, s: Tensor, reduce: str = "sum"
    ) -> Tensor:
        """KL of the step under a from the step under b, [B]."""
        process = cast(TokenProcess, pred_a.process)
        return reduce_tokens(process.divergence(_logp(pred_a), _logp(pred_b), x, t, s), reduce)

    def relax(self, tau: float) -> TokenKernel:
        """The Gumbel-soft step at temperature tau."""
        return TokenKernel(tau)

    def is_deterministic(self, t: Tensor, s: Tensor) -> Tensor:
        return s >= t


@dataclass(frozen=True)
class FirstHitting:
    """Unmask exactly one masked position, chosen uniformly: no factorisation error (first-hitting sampler of MDMs).

    A row without masks stays. The times that belong to it are drawn by `hitting_time`; s is not used.
    """

    def propose(self, pred: Prediction, x: Tensor, t: Tensor, s: Tensor, gen: Generator | None) -> Tensor:
        gen, masked = _needed(gen), self._masked(pred, x)
        token = categorical(_logp(pred).exp(), gen)
        where = categorical(torch.where(masked.any(1, keepdim=True), masked, True).double(), gen)
        chosen = F.one_hot(where, x.shape[1]).bool() & masked
        return torch.where(chosen, token, x)

    def log_prob(self, pred: Prediction, x: Tensor, x_s: Tensor, t: Tensor, s: Tensor, reduce: str = "sum") -> Tensor:
        """log p(token) - log(number of masks) for the one new token, [B]; "mean" divides by L."""
        masked = self._masked(pred, x)
        token = _logp(pred).gather(-1, x_s.clamp(max=cast(TokenProcess, pred.process).vocab - 1)[..., None])[..., 0]
        total = torch.where(masked & (x_s != x), token, 0.0).sum(1) - masked.sum(1).clamp(min=1).double().log()
        return total if reduce == "sum" else total / x.shape[1]

    def kl(
        self, pred_a: Prediction, pred_b: Prediction, x: Tensor, t: Tensor, s: Tensor, reduce: str = "sum"
    ) -> Tensor:
        """The mean over masked positions of KL(p_a || p_b), [B]; "mean" divides by L."""
        masked, a, b = self._masked(pred_a, x), _logp(pred_a), _logp(pred_b)
        each = (a.exp() * (a - b)).sum(-1)
        total = torch.where(masked, each, 0.0).sum(1) / masked.sum(1).clamp(min=1)
        return total if reduce == "sum" else total / x.shape[1]

    def relax(self, tau: float) -> FirstHitting:
        """Refused: the choice of the position has no relaxed form."""
        raise ValueError("first_hitting has no relaxed form; use the mask kernel and relax(tau)")

    def is_deterministic(self, t: Tensor, s: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.bool)

    def _masked(self, pred: Prediction, x: Tensor) -> Tensor:
        if x.is_floating_point():
            raise ValueError("first_hitting needs token ids, not soft rows; use the mask kernel")
        return x == cast(TokenProcess, pred.process).vocab


def hitting_time(process: MaskProcess, x: Tensor, t: Tensor, gen: Generator) -> Tensor:
    """The time [B] at which the next of n masks falls (first-hitting sampler); 0 where none is left.

    sigma falls to sigma(t) u^(1/n), which is t u^(1/n) on the linear schedule.
    """
    n = (x == process.vocab).sum(1).double()
    u = uniform_draws((len(x),), gen).to(x.device)
    return torch.where(n > 0, process.t_of_sigma(process.sigma(t) * u ** (1 / n.clamp(min=1))), 0.0)


def gumbel(like: Tensor, gen: Generator) -> Tensor:
    """Standard Gumbel noise in float64."""
    u = uniform_draws(like.shape, gen).to(like.device)
    return -(-u.clamp_min(math.ulp(0.0)).log()).log()


def _needed(gen: Generator | None) -> Generator:
    if gen is None:
        raise ValueError("this kernel draws; give it a torch.Generator")
    return gen


def mask() -> TokenKernel:
    """MDLM's step for the masked process."""
    return TokenKernel()


def uniform() -> TokenKernel:
    """The posterior step of the uniform process."""
    return TokenKernel()


def first_hitting() -> FirstHitting:
    """One token a step."""
    return FirstHitting()


def argmax_rows(rows: Tensor, vocab: int) -> Tensor:
    """Straight-through rows [B,L,V]: one-hot of the largest token forward, the gradient of the soft row backward."""
    soft = rows[..., :vocab]
    return F.one_hot(soft.argmax(-1), vocab).to(soft) + (soft - soft.detach())
