"""What the trainer costs: against a bare loop on the same 1M-parameter nets, in one process, interleaved.

python benchmarks/framework_tax.py            prints a markdown table; exit status 1 when a bar is missed
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.players import Phase, Player
from limbeck.core.run.trainer import Cadence, Trainer

DIM, WIDTH, BATCH, RATIO = 64, 656, 64, 5
SHARE, MILLISECONDS = 0.05, 0.3  # the bars
OPTIM = OptimConfig(lr=1e-4, ema=0.99)


def net(out: int = DIM) -> nn.Sequential:
    """About a million parameters."""
    layers = [nn.Linear(DIM + 1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Linear(WIDTH, out))


def eps(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """A net's noise prediction at x [B, DIM], t [B, 1]."""
    return model(torch.cat([x, t], 1))


class Nets:
    """The same start for both sides."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.teacher, self.student, self.critic, self.head = net().requires_grad_(False), net(), net(), net(1)


def score_loss(n: Nets, x: Tensor, t: Tensor, noise: Tensor, baseline: nn.Module | None) -> Tensor:
    """SDS (no baseline: the noise itself) or VSD, as a surrogate whose gradient on x is the residual."""
    x_t = (1 - t) * x.detach() + t * noise
    with torch.no_grad():
        residual = eps(n.teacher, x_t, t) - (noise if baseline is None else eps(baseline, x_t, t))
    return (residual * x).sum() / len(x)


def critic_loss(n: Nets, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Denoising of the student's samples."""
    x = x.detach()
    return mse_loss(eps(n.critic, (1 - t) * x + t * noise, t), noise)


def judge(n: Nets, x: Tensor, t: Tensor) -> Tensor:
    """The discriminator's logit [B, 1]."""
    return eps(n.head, x, t)


def draw(gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """z [B, DIM], t [B, 1], noise [B, DIM]."""
    normal = [torch.randn(BATCH, DIM, generator=gen) for _ in range(2)]
    return normal[0], torch.rand(BATCH, 1, generator=gen), normal[1]


def bare(method: str) -> Callable[[int], None]:
    """The loop that one would write by hand: returns a function that makes n steps."""
    n, gen, count = Nets(), torch.Generator().manual_seed(0), 0
    groups = [[n.student], [n.critic, n.head]]
    params = [[p for m in group for p in m.parameters()] for group in groups]
    averages = [[p.detach().clone() for p in group] for group in params]
    optims = [torch.optim.AdamW(group, lr=1e-4, weight_decay=0.0, fused=True) for group in params]

    def update(i: int, loss: Tensor) -> None:
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in params[i] if p.grad is not None], 1.0)
        if not torch.isfinite(norm):
            raise ValueError("not finite")
        optims[i].step()
        optims[i].zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages[i], params[i], 0.01)

    def steps(amount: int) -> None:
        nonlocal count
        for _ in range(amount):
            z, t, noise = draw(gen)
            due = method != "dmd2" or count % RATIO == 0
            with torch.set_grad_enabled(due):
                x = eps(n.student, z, torch.ones_like(t))
            if due:
                n.critic.requires_grad_(False), n.head.requires_grad_(False)
                loss = score_loss(n, x, t, noise, None if method == "sds" else n.critic)
                if method == "dmd2":
                    loss = loss + 1e-3 * softplus(-judge(n, x, t)).mean()
                update(0, loss)
                n.critic.requires_grad_(True), n.head.requires_grad_(True)
            if method != "sds":
                loss = critic_loss(n, x, t, noise)
                if method == "dmd2":
                    fake_real = softplus(judge(n, x.detach(), t)).mean() + softplus(-judge(n, noise, t)).mean()
                    loss = loss + 1e-2 * fake_real
                update(1, loss)
            count += 1

    return steps


class Ours:
    """The same as an objective."""

    def __init__(self, method: str) -> None:
        self.method, self.n = method, Nets()
        every = RATIO if method == "dmd2" else 1
        trained = nn.ModuleDict({"net": self.n.critic, "head": self.n.head} if method != "sds" else {})
        self.players = {"student": Player("student", self.n.student, OPTIM.model_copy(update={"every": every}), 1)}
        if method != "sds":
            self.players["critic"] = Player("critic", trained, OPTIM, 1)

    def phases(self, ctx: Context) -> Iterator[Phase]:
        n, dmd2 = self.n, self.method == "dmd2"
        z, noise, t = ctx.draws.normal("z", (DIM,)), ctx.draws.normal("noise", (DIM,)), ctx.draws.uniform("t", (1,))

        def x() -> Tensor:
            return ctx.once("x", lambda: eps(n.student, z, torch.ones_like(t)))

        def student() -> dict[str, Tensor]:
            terms = {"match": score_loss(n, x(), t, noise, None if self.method == "sds" else n.critic)}
            return terms | ({"fool": 1e-3 * softplus(-judge(n, x(), t)).mean()} if dmd2 else {})

        def critic() -> dict[str, Tensor]:
            terms = {"denoise": critic_loss(n, x(), t, noise)}
            if dmd2:
                fake_real = softplus(judge(n, x().detach(), t)).mean() + softplus(-judge(n, noise, t)).mean()
                terms["judge"] = 1e-2 * fake_real
            return terms

        yield Phase(("student",), student)
        if self.method != "sds":
            yield Phase(("critic",), critic)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        pass


def ours(method: str) -> Callable[[int], None]:
    """The trainer with its log every ten steps: returns a function that makes n steps."""
    trainer = Trainer(Ours(method), Team("cpu"), 0, "main", 0, BATCH, Cadence(log_every=10, save_every=10**9))

    def steps(amount: int) -> None:
        trainer.steps += amount
        trainer.cadence.save_every = trainer.steps + 1
        while trainer.step < trainer.steps:
            trainer.one_step()
            if trainer.step % 10 == 0:
                trainer.numbers()
                trainer.pending.clear()
            trainer.team.agree(0)

    return steps


def measure(method: str, blocks: int, steps: int) -> tuple[float, float]:
    """Medians over interleaved blocks: CPU milliseconds of a bare step, and our extra ones."""
    sides, times = [bare(method), ours(method)], ([], [])
    for block in range(blocks + 2):
        for i in (0, 1) if block % 2 else (1, 0):
            began = time.process_time()  # other programs on the machine do not count
            sides[i](steps)
            if block >= 2:
                times[i].append((time.process_time() - began) / steps * 1e3)
    extra = [b - a for a, b in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(extra)


def main() -> int:
    """Print the table; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10, help="steps a block")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = sum(p.numel() for p in net().parameters()) / 1e6
    print(
        f"nets of {size:.2f}M parameters, batch {BATCH}, {args.threads} thread(s), {args.blocks} interleaved blocks\n"
    )
    print("| method | bare loop, CPU ms a step | limbeck, CPU ms a step | more | bar | |\n|---|---|---|---|---|---|")
    missed = 0
    for method in ("sds", "vsd", "dmd2"):
        plain, extra = measure(method, args.blocks, args.steps)
        good = extra <= SHARE * plain and extra <= MILLISECONDS
        missed += not good
        more = f"{extra:+.3f} ms ({extra / plain:+.1%})"
        print(f"| {method} | {plain:.2f} | {plain + extra:.2f} | {more} | {MILLISECONDS} ms and {SHARE:.0%} "
              f"| {'pass' if good else 'FAIL'} |", flush=True)  # fmt: skip
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
