"""Closed-form checks of alignment (`limbeck verify`): optima on words and on a line, identities of each loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.core.alignment.losses import diffusion_dpo, pairwise, policy_gradient, ppo, reward_difference
from limbeck.core.alignment.rollout import Rollout, roll
from limbeck.core.diffusion.discrete import MaskProcess
from limbeck.core.diffusion.mixture import TokenTable
from limbeck.core.diffusion.sampling import ddim, first_hitting, mask, trajectory
from limbeck.core.rewards.toy import LENGTH, MASK, VOCAB, Shifted, Words, Writer, variation
from limbeck.core.run.checks import Check
from limbeck.core.run.rng import generator

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (log p [K',B], log p_ref [K',B], reward [B]) -> scalar
STEPS = 16
LINE = torch.linspace(0.995, 0, 21, dtype=torch.float64)  # twenty steps on the line
NOISY = ddim(1.0, floor=0.01)


def reinforce(logp: Tensor, reference: Tensor, reward: Tensor, beta: float = 0.5) -> Tensor:
    """REINFORCE with the KL inside the reward: r - beta (log p - log p_ref), its mean as baseline."""
    value = reward - beta * (logp.detach() - reference).sum(0)
    return policy_gradient(logp, value - value.mean())


def difference(logp: Tensor, reference: Tensor, reward: Tensor, beta: float = 0.5) -> Tensor:
    """PRDP on pairs of neighbours."""
    ratio = (logp - reference).sum(0)
    return reward_difference(ratio[::2], ratio[1::2], reward[::2], reward[1::2], beta)


def write(loss: Loss, iterations: int = 150, batch: int = 256, lr: float = 4e-3) -> Tensor:
    """The law over the 81 words after training a Writer with this loss (MDLM's sampler, 16 steps)."""
    words, times, gen = Words(), torch.linspace(1, 0, STEPS + 1), generator(0, "check.write", 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        writer = Writer(words)
    optim = torch.optim.Adam(writer.net.parameters(), lr)
    teacher, start = words.teacher(), torch.full((batch, LENGTH), MASK)
    for _ in range(iterations):
        rollout, _ = roll(writer, mask(), start, times, None, gen, STEPS)
        with torch.no_grad():
            reference = rollout.log_prob(teacher)
        value = loss(rollout.log_prob(writer), reference, words.score(rollout.x))
        optim.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optim.step()
    many = torch.full((20_000, LENGTH), MASK)
    return words.law(roll(writer, mask(), many, times, None, gen)[0].x)


def optimum(name: str, law: Tensor) -> list[Check]:
    """How far a law is from the exact tilt, and its objective of .690."""
    words = Words()
    return [
        Check(f"{name}: objective, .690 at best", words.objective(law), 0.67, ">="),
        Check(f"{name}: total variation from the tilt", variation(law, words.tilt()), 0.08, "<="),
    ]


def reinforce_words() -> list[Check]:
    """REINFORCE with KL comes to the tilted law of words."""
    return optimum("words", write(reinforce))


def prdp_words() -> list[Check]:
    """PRDP comes to the tilted law of words; at the exact optimum its loss is zero."""
    return [*optimum("words", write(difference)), Check("loss at the exact optimum", residual_at_optimum(), 1e-9, "<=")]


def residual_at_optimum(loss: Loss = difference, n: int = 2000) -> float:
    """PRDP's loss of the tilted law itself, one letter a step (no factorisation error)."""
    words, gen = Words(), generator(0, "check.residual", 0)
    best = TokenTable(words.tilt().view(*[VOCAB] * LENGTH), MaskProcess(VOCAB))
    times = torch.linspace(1, 0, LENGTH + 1)
    rollout, logp = roll(best, first_hitting(), torch.full((n, LENGTH), MASK), times, None, gen)
    return float(loss(logp, rollout.log_prob(words.teacher()), words.score(rollout.x)))


def line_rollout(theta: float, n: int, stream: str = "check.line") -> tuple[Shifted, Rollout, Tensor]:
    """n trajectories of the denoiser of N(theta, 1)."""
    model, gen = Shifted(theta), generator(0, stream, 0)
    x = torch.randn(n, 1, generator=gen, dtype=torch.float64)
    return (model, *roll(model, NOISY, x, LINE, None, gen))


def quadratic(x: Tensor) -> Tensor:
    """-(x - 1)^2/2 [B]."""
    return -((x[:, 0] - 1) ** 2) / 2


def line_gradient(n: int = 100_000) -> Tensor:
    """The score-function gradient of E quadratic at theta = 0; exactly 1 for a perfect sampler."""
    model, rollout, _ = line_rollout(0.0, n)
    reward = quadratic(rollout.x)
    loss = policy_gradient(rollout.log_prob(model), reward - reward.mean())
    return -torch.autograd.grad(loss, model.theta)[0]


def line_ddpo(iterations: int = 60, clip: float = 0.1) -> float:
    """theta after DDPO on the quadratic reward, two inner updates a rollout."""
    model = Shifted()
    optim = torch.optim.Adam([model.theta], 0.05)
    for i in range(iterations):
        _, rollout, old = line_rollout(float(model.theta.detach()), 512, f"check.ddpo.{i}")
        reward = quadratic(rollout.x)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        for _ in range(2):
            loss = ppo(rollout.log_prob(model), old, advantage, clip)
            optim.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optim.step()
    return float(model.theta.detach())


def policy_line() -> list[Check]:
    """The policy gradient is the true gradient; DDPO climbs to the reward's maximum."""
    return [
        Check("score-function gradient, exact 1", abs(float(line_gradient()) - 1), 0.03, "<="),
        Check("DDPO's theta, best 1", abs(line_ddpo() - 1), 0.15, "<="),
    ]


def draft_gradient(last: int, n: int = 4096) -> float:
    """d E quadratic/d theta by backpropagation through the last `last` of the twenty steps."""
    model, gen = Shifted(), generator(0, "check.draft", 0)
    x = torch.randn(n, 1, generator=gen, dtype=torch.float64)
    for step in trajectory(model, NOISY, x, LINE, None, gen, grad_last=last, remat=False):
        x = step.x_next
    return float(torch.autograd.grad(quadratic(x).mean(), model.theta)[0])


def draft_truncation() -> list[Check]:
    """DRaFT-K: longer chains see more of the gradient, all of it with every step."""
    found = {k: draft_gradient(k) for k in (1, 2, 5, 10, 20)}
    steps = [b - a for a, b in zip(list(found.values()), list(found.values())[1:], strict=False)]
    return [
        Check("all twenty steps, exact .994", abs(found[20] - 0.994), 0.03, "<="),
        Check("ten steps, .493", abs(found[10] - 0.493), 0.03, "<="),
        Check("one step, .006", abs(found[1] - 0.006), 0.003, "<="),
        Check("least increase from K to the next", min(steps), 0.0, ">="),
    ]


def dpo_line(beta: float, shared: bool = True, swapped: bool = False, iterations: int = 1500) -> tuple[float, float]:
    """(first loss, theta) of Diffusion-DPO with Bradley-Terry labels from r = x, t uniform."""
    model, reference, gen = Shifted(), Shifted(), generator(0, "check.dpo", 0)
    optim = torch.optim.Adam([model.theta], 0.02 / beta)
    first = math.nan
    for i in range(iterations):
        pair = torch.randn(2, 1024, 1, generator=gen, dtype=torch.float64)
        wins = torch.rand(1024, generator=gen, dtype=torch.float64) < torch.sigmoid(pair[0, :, 0] - pair[1, :, 0])
        order = torch.where((wins != swapped)[:, None], pair, pair.flip(0))
        t = torch.rand(1024, generator=gen, dtype=torch.float64) * 0.995
        eps = torch.randn(2, 1024, 1, generator=gen, dtype=torch.float64)
        errors = [_errors(net, order, t, eps[[0, 0]] if shared else eps) for net in (model, reference)]
        loss = diffusion_dpo(errors[0][0], errors[0][1], errors[1][0].detach(), errors[1][1].detach(), beta)
        first = float(loss.detach()) if i == 0 else first
        optim.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optim.step()
    return first, float(model.theta.detach())


def _errors(model: Shifted, pair: Tensor, t: Tensor, eps: Tensor) -> list[Tensor]:
    process = model.process
    noisy = [process.add_noise(x0, e, t) for x0, e in zip(pair, eps, strict=True)]
    return [(model.predict(x, t, {}).eps - e).square().mean(1) for x, e in zip(noisy, eps, strict=True)]


def dpo_identities() -> list[Check]:
    """Diffusion-DPO starts at log 2 and ends at theta beta = 5.85; D3PO's slope and its clip are exact."""
    first, theta = dpo_line(4.0)
    ratio = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    start = pairwise(ratio, torch.zeros(1), 0.1, 0.1)
    (slope,) = torch.autograd.grad(start, ratio)
    far = torch.full((1,), 0.2, dtype=torch.float64, requires_grad=True)
    (flat,) = torch.autograd.grad(pairwise(far, -far, 0.1, 0.1), far)
    return [
        Check("Diffusion-DPO at the reference against log 2", abs(first - math.log(2)), 1e-9, "<="),
        Check("Diffusion-DPO's theta beta, 5.85", abs(theta * 4.0 - 5.85), 0.4, "<="),
        Check("D3PO at the reference against log 2", abs(float(start.detach()) - math.log(2)), 1e-9, "<="),
        Check("D3PO's slope there against -beta/2", abs(float(slope) + 0.05), 1e-9, "<="),
        Check("D3PO's slope out of its clip", abs(float(flat)), 0.0, "<="),
    ]
