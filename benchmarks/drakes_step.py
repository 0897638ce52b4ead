"""What one tuning step of DRAKES costs: the core against a transcription of the published procedure.

python benchmarks/drakes_step.py            prints a markdown table; exit status 1 when a bar is missed

The transcription draws a walk whose last K steps are soft, with all graphs kept, and then asks student and reference
about every state again for the path KL, with the gradient running through the states into both (the core's "whole
gradient"). Here it has the right form of that KL, so that the two are one objective where they sum over the same steps.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from meter import peak
from torch import Tensor, nn

from limbeck.core.alignment.config import Drakes, TokenWalk
from limbeck.core.alignment.drakes_checks import terms, tuning
from limbeck.core.alignment.tuning import Tuning
from limbeck.core.diffusion.discrete import MaskProcess, TokenNetwork
from limbeck.core.rewards.base import Reward
from limbeck.core.run.rng import generator

V, PRICE, NEVER = 4, 0.03, -1e6
PAIRS = [  # as each comes; then with more of the same gradient and the same steps
    ("published, KL over all", "core, KL over the last"),
    ("published, KL over all", "core, KL over the last, whole gradient"),
    ("published, KL over all", "core, KL over all"),
    ("published, KL over all", "core, KL over all, whole gradient"),
    ("published, KL over all", "core, KL over all, whole gradient, graphs kept"),
    ("published, KL over the last", "core, KL over the last"),
    ("published, KL over the last", "core, KL over the last, whole gradient"),
    ("published, KL over the last", "core, KL over the last, whole gradient, graphs kept"),
]
FASTER, SMALLER, ALIKE = 1.5, 0.6, 1e-5  # the bars: a ratio of times, one of bytes, a relative error of gradients


class Dilated(nn.Module):
    """Residual dilated convolutions on rows [B,L,V+1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(V + 1, width, 9, padding=4), nn.Conv1d(width, V, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(5))
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 9, padding=4 * d, dilation=d) for d in (1, 1, 4, 16, 64))

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        rows = x if x.is_floating_point() else F.one_hot(x, V + 1)
        h = self.first(rows.to(self.first.weight.dtype).transpose(1, 2))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = h + conv(norm(h).relu())
        return self.last(h).transpose(1, 2)


@dataclass
class Case:
    """Two nets that differ a little, a reward (how well the best place fits a motif) and the shape of the walk."""

    student: Dilated
    reference: Dilated
    motif: Tensor
    batch: int
    length: int
    steps: int
    last: int

    @classmethod
    def of(cls, width: int, batch: int, length: int, steps: int, last: int) -> "Case":
        """Weights of seed 0."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student, reference = Dilated(width), Dilated(width)
        reference.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in student.state_dict().items()})
        motif = torch.randn(1, V, 9, generator=generator(0, "motif", 0))
        return cls(student, reference.requires_grad_(False), motif, batch, length, steps, last)

    def double(self) -> "Case":
        """All in float64, so that gradients can be compared."""
        for net in (self.student, self.reference):
            net.double()
        return self

    def reward(self, x: Tensor) -> Tensor:
        """[B] of rows [B,L,V]."""
        return F.conv1d(x.transpose(1, 2), self.motif.to(x)).flatten(1).logsumexp(1)

    def tuned(self) -> Tuning:
        """The same for the core."""
        reward = Reward(lambda x, cond, *, t, gen: self.reward(x), "motif", "onehot", differentiable=True)
        student, reference = (TokenNetwork(net, MaskProcess(V)) for net in (self.student, self.reference))
        return tuning(student, reference, reward, self.length)

    def gradient(self) -> Tensor:
        """All gradients of the student, flat; they are cleared."""
        found = torch.cat([p.grad.flatten() for p in self.student.parameters() if p.grad is not None])
        self.student.zero_grad()
        return found


def ours(case: Case, kl_steps: str, through: bool = False, remat: bool = True) -> None:
    """Loss and backward of one step."""
    more = {"kl": PRICE, "kl_steps": kl_steps, "kl_through": through, "remat": remat}
    config = Drakes.model_validate({"walk": TokenWalk(steps=case.steps), "last": case.last} | more)
    torch.stack(list(terms(case.tuned(), config, case.batch).values())).sum().backward()


def subs(logits: Tensor, x: Tensor) -> Tensor:
    """log p(x0 | x_t) [B,L,V]; where the state is a letter, all on that letter."""
    logp, state = logits.log_softmax(-1), x.argmax(-1)
    known = torch.full_like(logp, NEVER).scatter(-1, state.clamp(max=V - 1)[..., None], 0.0)
    return torch.where(state[..., None] == V, logp, known)


def draw(logp: Tensor, x: Tensor, t: Tensor, s: Tensor, soft: bool, gen: torch.Generator) -> Tensor:
    """The Gumbel draw of a step, by its maximum or soft at temperature 1; what is no mask stays."""
    logq = torch.cat([logp + (t - s).log(), s.log().clamp_min(NEVER).expand(*logp.shape[:2], 1)], -1)
    u = torch.rand(logq.shape, generator=gen, dtype=torch.float64).clamp_min(1e-300)
    found = (logq - (-u.log()).log().to(logq)).softmax(-1)
    drawn = found if soft else F.one_hot(found.argmax(-1), V + 1).to(found)
    keep = 1 - x[..., V:]
    return keep * x + (1 - keep) * drawn


def published(case: Case, every: bool = True, cut: bool = False) -> None:
    """Loss and backward of one step; the KL over `every` step or the soft ones, its reference with states `cut` off."""
    dtype, gen = case.student.first.weight.dtype, generator(0, "tuning.walk", 0)
    x = F.one_hot(torch.full((case.batch, case.length), V), V + 1).to(dtype)
    times, turn = torch.linspace(1, 0, case.steps + 1).to(dtype), case.steps - case.last
    states = []
    for i in range(case.steps):
        states.append(x)
        with torch.set_grad_enabled(i >= turn):
            x = draw(subs(case.student(x), x), x, times[i], times[i + 1], i >= turn, gen)
    kl = torch.zeros((), dtype=dtype)
    for i in range(0 if every else turn, case.steps):
        state, rate = states[i], (times[i] - times[i + 1]) / times[i]
        p = subs(case.student(state), state)
        fixed = state.detach() if cut else state
        q = subs(case.reference(fixed), fixed)
        gap = (p.exp() * (p - q) - p.exp() + q.exp()).sum(-1)
        kl = kl + rate * (state[..., V] * gap).sum(1).mean()
    letters = x[..., :V]
    hard = F.one_hot(letters.argmax(-1), V).to(letters) + letters - letters.detach()
    (PRICE * kl - case.reward(hard).mean()).backward()


Step = Callable[[], None]


def measure(case: Case, steps: dict[str, Step], repeats: int) -> dict[str, tuple[float, int]]:
    """Median seconds (interleaved) and peak bytes of each step."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):  # the first round warms up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
            case.student.zero_grad()
    out = {}
    for name, step in steps.items():
        out[name] = statistics.median(seconds[name][1:]), peak(step)
        case.student.zero_grad()
    return out


def steps_of(case: Case) -> dict[str, Step]:
    """Everything that is measured."""
    return {
        "published, KL over all": lambda: published(case),
        "published, KL over the last": lambda: published(case, False),
        "core, KL over all": lambda: ours(case, "all"),
        "core, KL over all, whole gradient": lambda: ours(case, "all", True),
        "core, KL over all, whole gradient, graphs kept": lambda: ours(case, "all", True, False),
        "core, KL over the last": lambda: ours(case, "last"),
        "core, KL over the last, whole gradient": lambda: ours(case, "last", True),
        "core, KL over the last, whole gradient, graphs kept": lambda: ours(case, "last", True, False),
    }


def compared(found: dict[str, tuple[float, int]]) -> list[str]:
    """Print the ratios of pairs; what is missed where each does as it comes (the bar), the rest is for information."""
    print("\n| published | core | times faster | share of the memory |\n|---|---|---|---|")
    wrong = []
    for theirs, mine in PAIRS:
        faster, smaller = found[theirs][0] / found[mine][0], found[mine][1] / found[theirs][1]
        print(f"| {theirs[11:]} | {mine[6:]} | {faster:.2f} | {smaller:.3f} |")
        if (theirs, mine) == PAIRS[0] and (faster < FASTER or smaller > SMALLER):
            wrong.append(f"as each comes: {faster:.2f} times faster, {smaller:.3f} of the memory")
    return wrong


def difference(case: Case, a: Step, b: Step) -> float:
    """|grad a - grad b|/|grad b|."""
    found = []
    for step in (a, b):
        step()
        found.append(case.gradient())
    return float((found[0] - found[1]).norm() / found[1].norm())


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"width": 64, "batch": 8, "length": 200, "steps": 32, "last": 16, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    case = Case.of(args.width, args.batch, args.length, args.steps, args.last)
    found = measure(case, steps_of(case), args.repeats)
    print("| step | ms | peak, MB |\n|---|---|---|")
    for name, (seconds, size) in found.items():
        print(f"| {name} | {1e3 * seconds:.1f} | {size / 1e6:.2f} |")
    wrong = compared(found)
    soft = Case.of(args.width, args.batch, args.length, args.last, args.last).double()
    for through in (True, False):
        error = difference(soft, lambda w=through: ours(soft, "last", w), lambda w=through: published(soft, cut=not w))  # type: ignore[misc]
        kind = "whole gradient" if through else "no gradient through the reference on either side"
        print(f"\ngradients, all {args.last} steps soft, {kind}: relative difference {error:.2e}")
        wrong += [f"gradients differ by {error:.2e}"] if error > ALIKE else []
    error = difference(soft, lambda: ours(soft, "last"), lambda: ours(soft, "last", True))
    print(f"\ngradients of the core, without the reference's part against the whole: {error:.2e}\n")
    print("pass" if not wrong else "FAIL: " + "; ".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
