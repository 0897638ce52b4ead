"""Rewards without a gradient: DDPO, REINFORCE with KL, PRDP, D3PO and reward-weighted regression on stored rollouts.

One batch of trajectories a step, then `inner` updates on it. Legend: K' steps with a density, b rows of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from limbeck.core.alignment import config as settings
from limbeck.core.alignment import losses
from limbeck.core.alignment.rollout import Rollout, roll
from limbeck.core.alignment.tuning import Tuning
from limbeck.core.diffusion.denoiser import Denoiser
from limbeck.core.distillation.denoising import Regression
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Phase
from limbeck.core.run.rng import derive

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Trajectories:
    """What a step has drawn: log-probabilities then and of the reference [K',b] (means or sums), rewards [b]."""

    rollout: Rollout
    old: Tensor
    reference: Tensor
    reward: Tensor
    prompts: list[str]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Winners and losers among neighbours, as row numbers [P]; ties are dropped."""
        a, b = torch.arange(0, len(self.reward), 2), torch.arange(1, len(self.reward), 2)
        gap = (self.reward[a] - self.reward[b]).cpu()
        first, second = gap > 0, gap < 0
        return torch.cat([a[first], b[second]]), torch.cat([b[first], a[second]])


class PromptStats:
    """DDPO's advantages: rewards standardised by the last ones of their prompt; by the batch while these are few."""

    def __init__(self, buffer: int, fewest: int) -> None:
        self.buffer, self.fewest = buffer, fewest
        self.known: dict[int, list[float]] = {}

    def advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """(r - mean)/(std + 1e-6) [B] on rewards [B] of these prompts, which are remembered first."""
        values, keys = rewards.double().cpu(), [derive(0, prompt) for prompt in prompts]
        for key, value in zip(keys, values.tolist(), strict=True):
            self.known[key] = [*self.known.get(key, []), value][-self.buffer :]
        out = torch.empty_like(values)
        for i, key in enumerate(keys):
            seen = self.known[key]
            base = values if len(seen) < self.fewest else torch.tensor(seen, dtype=torch.float64)
            out[i] = (values[i] - base.mean()) / (base.std(correction=0) + 1e-6)
        return out.to(rewards)

    def state(self) -> dict[str, Tensor]:
        """Keys [P], counts [P] and values [P,buffer]."""
        keys, counts = torch.tensor(list(self.known), dtype=torch.int64), [len(v) for v in self.known.values()]
        values = torch.zeros(len(keys), self.buffer, dtype=torch.float64)
        for i, seen in enumerate(self.known.values()):
            values[i, : len(seen)] = torch.tensor(seen, dtype=torch.float64)
        return {"stats/keys": keys, "stats/counts": torch.tensor(counts, dtype=torch.int64), "stats/values": values}

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring them back."""
        rows = zip(*(state[f"stats/{name}"].tolist() for name in ("keys", "counts", "values")), strict=True)
        self.known = {key: values[:count] for key, count, values in rows}


@dataclass
class Learning:
    """An objective on stored trajectories; `loss` gives the terms of one update."""

    tuning: Tuning
    config: settings.Policy
    loss: Callable[[Context, Trajectories], Terms]
    reduce: str = "sum"  # over dimensions, of a log-probability
    stats: PromptStats | None = None
    compares: bool = True  # whether the loss reads the reference; else it is asked for the log's KL alone
    players: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        self.players = {self.tuning.player.name: self.tuning.player}

    def phases(self, ctx: Context) -> Iterator[Phase]:
        """Updates on one set of trajectories."""
        for _ in range(self.config.inner):
            yield Phase((self.tuning.player.name,), lambda: self.loss(ctx, self.found(ctx)))

    def found(self, ctx: Context) -> Trajectories:
        """This step's trajectories, drawn without gradient."""
        return ctx.once("trajectories", lambda: self.collect(ctx))

    @torch.no_grad()
    def collect(self, ctx: Context) -> Trajectories:
        """Draw, score, and ask the reference."""
        tuning, walk = self.tuning, self.config.walk
        x, cond, raw = tuning.begin(ctx, walk, self.config.per_prompt)
        kernel, gen = tuning.kernel(ctx, walk), tuning.gen(ctx)
        rollout, sums = roll(self.policy(ctx), kernel, x, tuning.times(walk), cond, gen)
        reference = sums
        if self.compares or tuning.judge.due(ctx):
            reference = rollout.log_prob(tuning.guided(ctx, tuning.reference, walk))
            ctx.log("kl", (sums - reference).sum(0).mean())
        size = rollout.x[0].numel() if self.reduce == "mean" else 1
        reward = tuning.score(ctx, rollout.x, raw)
        return Trajectories(rollout, sums / size, reference / size, reward, raw["prompt"])

    def policy(self, ctx: Context) -> Denoiser:
        """The guided student."""
        return self.tuning.guided(ctx, self.tuning.student, self.config.walk)

    def log_prob(self, ctx: Context, found: Trajectories) -> Tensor:
        """[K',b] with gradient."""
        return found.rollout.log_prob(self.policy(ctx), self.reduce)

    def state(self) -> dict[str, Tensor]:
        """The judge's, and what is known of prompts."""
        return self.tuning.judge.state() | (self.stats.state() if self.stats else {})

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring it back."""
        self.tuning.judge.load(state)
        if self.stats:
            self.stats.load(state)


def _paired(config: settings.Policy) -> None:
    if config.per_prompt % 2:
        raise BadInput(f"per_prompt: {config.per_prompt} makes no pairs of one prompt; make it even")


def build_ddpo(config: settings.Ddpo, build: Build) -> Learning:
    """Factory of ddpo (Black et al. 2023): all steps of a trajectory are in one update."""
    stats = PromptStats(config.buffer, config.fewest)

    def loss(ctx: Context, found: Trajectories) -> Terms:
        prompts = [p for p in made.tuning.source.all_prompts(ctx, config.per_prompt) for _ in range(config.per_prompt)]
        whole = ctx.once("advantages", lambda: stats.advantages(prompts, ctx.gathered(found.reward)))
        limit = ctx.at(config.limit)
        advantage = whole[ctx.draws.rows].clamp(-limit, limit)
        return {"policy": losses.ppo(made.log_prob(ctx, found), found.old, advantage, ctx.at(config.clip))}

    made = Learning(Tuning.of(config, config.optim, build), config, loss, "mean", stats, compares=False)
    return made


def build_reinforce(config: settings.Reinforce, build: Build) -> Learning:
    """Factory of reinforce: r - beta (log p - log p_ref), its mean over the global batch as baseline."""

    def loss(ctx: Context, found: Trajectories) -> Terms:
        logp = made.log_prob(ctx, found)
        value = found.reward - ctx.at(config.beta) * (logp.detach() - found.reference).sum(0).to(found.reward)
        return {"policy": losses.policy_gradient(logp, value - ctx.mean(value.mean()))}

    made = Learning(Tuning.of(config, config.optim, build), config, loss)
    return made


def build_prdp(config: settings.Prdp, build: Build) -> Learning:
    """Factory of prdp (Deng et al. 2024)."""
    _paired(config)

    def loss(ctx: Context, found: Trajectories) -> Terms:
        logp, beta = made.log_prob(ctx, found), ctx.at(config.beta)
        sides = (slice(0, None, 2), slice(1, None, 2))
        rewards = (found.reward[sides[0]], found.reward[sides[1]])
        if config.clip is None:
            ratio = (logp - found.reference).sum(0)
            return {"policy": losses.reward_difference(ratio[sides[0]], ratio[sides[1]], *rewards, beta)}
        new, old, reference = (tuple(v[:, side] for side in sides) for v in (logp, found.old, found.reference))
        return {"policy": losses.proximal_difference(new, old, reference, rewards, beta, ctx.at(config.clip))}  # type: ignore[arg-type]

    made = Learning(Tuning.of(config, config.optim, build), config, loss)
    return made


def build_d3po(config: settings.D3po, build: Build) -> Learning:
    """Factory of d3po (Yang et al. 2023), preferences by the trained reward."""
    _paired(config)

    def loss(ctx: Context, found: Trajectories) -> Terms:
        ratio = made.log_prob(ctx, found) - found.reference
        winner, loser = found.pairs()
        if not len(winner):
            return {"policy": ratio.sum() * 0.0}
        return {"policy": losses.pairwise(ratio[:, winner], ratio[:, loser], ctx.at(config.beta), ctx.at(config.clip))}

    made = Learning(Tuning.of(config, config.optim, build), config, loss, "mean")
    return made


def build_rwr(config: settings.Rwr, build: Build) -> Learning:
    """Factory of rwr: the denoising loss on the student's own samples, weighted by exp(r/T)."""
    from limbeck.core.distillation.config import Denoising

    def loss(ctx: Context, found: Trajectories) -> Terms:
        errors = regression.errors(ctx, "rwr", found.rollout.x, found.rollout.cond)
        return {"policy": losses.weighted_regression(errors, found.reward, ctx.at(config.temperature))}

    made = Learning(Tuning.of(config, config.optim, build), config, loss, compares=False)
    regression = Regression(made.tuning.student, Denoising(dropout=0.1), made.tuning.source.null)
    return made
