"""The losses of preference and policy methods as pure functions of log-probabilities, errors and rewards.

Legend: K' steps with a density, B trajectories, P pairs. Rewards are maximised; every loss is minimised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def policy_gradient(logp: Tensor, advantage: Tensor) -> Tensor:
    """REINFORCE: -mean_b A_b sum_k log p_k, for logp [K',B] with gradient and advantages [B] without."""
    return -(advantage.detach() * logp.sum(0)).mean()


def ppo(logp: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """DDPO (Black et al. 2023, eq. 5): mean of max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = exp(logp - old) [K',B].

    The log-probabilities are means over dimensions, as in the authors' code: c = 1e-4 is meant for these.
    """
    ratio = (logp - old).exp()
    a = advantage.detach()
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)).mean()


def reward_difference(ratio_a: Tensor, ratio_b: Tensor, reward_a: Tensor, reward_b: Tensor, beta: float) -> Tensor:
    """PRDP without its proximal clip: mean of (Delta log ratio - (r_a - r_b)/beta)^2 over pairs [P].

    ratio_* are sums over steps of log p - log p_ref for two trajectories of ONE prompt: then log Z cancels, and the
    loss is zero only at the optimum of E r - beta KL.
    """
    return ((ratio_a - ratio_b) - (reward_a - reward_b) / beta).square().mean()


def proximal_difference(
    logp: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor],
    rewards: tuple[Tensor, Tensor], beta: float, clip: float,
) -> Tensor:  # fmt: skip
    """PRDP (Deng et al. 2024): the larger of the plain and the clipped squared residual; all logs [K',P] a side.

    Clipping holds each step's log ratio within `clip` of what it was when the trajectories were drawn.
    """
    plain = [(new - ref).sum(0) for new, ref in zip(logp, reference, strict=True)]
    near = [
        (before + (new - before).clamp(-clip, clip) - ref).sum(0)
        for new, before, ref in zip(logp, old, reference, strict=True)
    ]
    target = (rewards[0] - rewards[1]) / beta
    return torch.maximum((plain[0] - plain[1] - target).square(), (near[0] - near[1] - target).square()).mean()


def pairwise(winner: Tensor, loser: Tensor, beta: float, clip: float | None = None) -> Tensor:
    """-log sigmoid(beta (log rho_w - log rho_l)), mean over all entries; rho [K',P] relative to a frozen reference.

    D3PO and PSO clip each ratio to [1 - clip, 1 + clip] and apply the image's label to every step; without a clip it
    is the loss of DPO. Ties must have been dropped. At the reference its value is log 2.
    """
    if clip is not None:
        winner, loser = (ratio.exp().clamp(1 - clip, 1 + clip).log() for ratio in (winner, loser))
    return -F.logsigmoid(beta * (winner - loser)).mean()


def diffusion_dpo(
    error_w: Tensor, error_l: Tensor, reference_w: Tensor, reference_l: Tensor, beta: float
) -> Tensor:  # fmt: skip
    """Diffusion-DPO (Wallace et al. 2023, eq. 14): -log sigmoid(-beta/2 [(e_w - e_l) - (e_ref_w - e_ref_l)]), mean [P].

    Errors [P] are means over dimensions of |eps - eps_hat|^2 at the SAME t and eps for winner and loser. As in the
    authors' code, the factor T w(t) is part of beta.
    """
    return -F.logsigmoid(-0.5 * beta * ((error_w - error_l) - (reference_w - reference_l))).mean()


def weighted_regression(errors: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """Reward-weighted regression: mean of exp((r - max r)/T) e over the batch, its weights of mean one, errors [B]."""
    weights = torch.softmax(rewards.detach().double() / temperature, 0) * len(rewards)
    return (weights.to(errors) * errors).mean()
