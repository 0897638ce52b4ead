"""What backpropagating a reward costs in memory: bytes at the peak against K, the last sampler steps with gradient.

python benchmarks/reward_memory.py            prints a markdown table; exit status 1 when a bar is missed
"""

import argparse
import sys
from dataclasses import dataclass

import torch
from meter import peak
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Network
from limbeck.core.diffusion.guidance import guide
from limbeck.core.diffusion.process import Flow
from limbeck.core.diffusion.sampling import ddim, times, trajectory
from limbeck.core.run.rng import generator
from limbeck.domains.image.models import build_unet, flow

LAST = (1, 5, 10, 25, 50)
SIZE, WIDTH, TOKENS, SCALE = 32, 384, 16, 3.0
SLACK = 1.02  # a step also keeps its times and coefficients, some dozen numbers a sample
RANDOM = 5056  # bytes of the CPU generator's state, which torch's checkpoint keeps for each step: dropout must repeat


@dataclass
class Walk:
    """A guided denoiser with all it is asked: x [B,3,32,32], cond, and the number of sampler steps."""

    denoiser: Denoiser
    x: Tensor
    cond: Encoded
    steps: int

    @classmethod
    def of(cls, channels: tuple[int, ...], batch: int, steps: int) -> "Walk":
        """The embedded teacher's network with weights of seed 0, under classifier-free guidance as rewards train it."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = build_unet(SIZE, channels).train()
        call = lambda net, x, t, cond: flow(net, x, t, cond["states"], cond["mask"])  # noqa: E731
        cond, null = text(batch, "cond"), text(1, "null")
        x = torch.randn(batch, 3, SIZE, SIZE, generator=generator(0, "x", 0))
        return cls(guide(Network(net, Flow(), "flow", call), null, SCALE), x, cond, steps)

    @property
    def latent(self) -> int:
        """Bytes of one state."""
        return self.x.numel() * self.x.element_size()

    @property
    def gradients(self) -> int:
        """Bytes of one gradient of all parameters."""
        return sum(p.numel() * p.element_size() for p in self.denoiser.parameters())

    def backward(self, last: int, remat: bool, eta: float) -> None:
        """One reward gradient through the last steps, added to gradients that exist (they are not counted)."""
        gen, grid = generator(0, "walk", 0), times(self.steps, self.denoiser.process)
        for step in trajectory(self.denoiser, ddim(eta), self.x, grid, self.cond, gen, last, remat):
            x = step.x_next
        (x - 1).square().mean().backward()


def text(rows: int, name: str) -> Encoded:
    """Random text states with a full mask."""
    states = torch.randn(rows, TOKENS, WIDTH, generator=generator(0, name, 0))
    return {"states": states, "mask": torch.ones(rows, TOKENS, dtype=torch.bool)}


def cost(walk: Walk, last: int, remat: bool, eta: float) -> tuple[int, Tensor]:
    """Bytes at the peak of one reward gradient, and the gradient's norm."""
    for parameter in walk.denoiser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = peak(lambda: walk.backward(last, remat, eta))
    return found, torch.stack([p.grad.norm() for p in walk.denoiser.parameters() if p.grad is not None]).norm()


def measure(walk: Walk, lasts: tuple[int, ...], eta: float) -> tuple[list[int], list[int]]:
    """Peaks with and without rematerialisation; both must give the same gradient."""
    columns: tuple[list[int], list[int]] = ([], [])
    for last in lasts:
        (ours, norm), (kept, plain) = (cost(walk, last, remat, eta) for remat in (True, False))
        torch.testing.assert_close(norm, plain, rtol=1e-4, atol=0)
        columns[0].append(ours)
        columns[1].append(kept)
    return columns


def growth(lasts: tuple[int, ...], peaks: list[int]) -> list[float]:
    """Bytes a step between neighbours, nan for the first."""
    pairs = list(zip(lasts, peaks, strict=True))
    return [float("nan"), *((q - p) / (b - a) for (a, p), (b, q) in zip(pairs, pairs[1:], strict=False))]


def missed(walk: Walk, lasts: tuple[int, ...], peaks: list[int], forward: float) -> list[str]:
    """What breaks the bar: a latent a step and, once for all steps, a rematerialised forward, above the first peak.

    From the second step on, autograd also sums the gradients of all steps before it hands them over: one gradient more.
    These once-only parts alone would hide many latents a step, so the growth to the last K is held to the latent.
    """
    step, once = walk.latent * SLACK + RANDOM, forward + walk.gradients
    found = [
        f"K = {last}: {found - peaks[0]} bytes above K = {lasts[0]}"
        for last, found in zip(lasts, peaks, strict=True)
        if found - peaks[0] > (last - lasts[0]) * step + once
    ]
    slope = growth(lasts, peaks)[-1]
    return found + ([f"{slope:.0f} bytes a step at the end"] if slope > step else [])


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--last", type=int, nargs="+", default=LAST, help="values of K")
    parser.add_argument("--channels", type=int, nargs="+", default=(64, 128, 192), help="of the network's levels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--eta", type=float, default=1.0, help="the sampler's noise; 0 is DDIM")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    walk, lasts = Walk.of(tuple(args.channels), args.batch, max(args.last)), tuple(args.last)
    ours, kept = measure(walk, lasts, args.eta)
    forward, latent = growth(lasts, kept)[-1], walk.latent
    print(f"network of {walk.gradients / 4e6:.2f}M, batch {args.batch}, guidance {SCALE}, eta {args.eta}, "
          f"{walk.steps} sampler steps; a latent {latent} bytes, a gradient {walk.gradients / 1e6:.2f} MB, "
          f"one forward's graph {forward / 1e6:.2f} MB\n")  # fmt: skip
    print("| K | peak, MB | growth a step, bytes | in latents | peak with all graphs kept, MB |\n|---|---|---|---|---|")
    for last, mine, step, plain in zip(lasts, ours, growth(lasts, ours), kept, strict=True):
        print(f"| {last} | {mine / 1e6:.3f} | {step:.0f} | {step / latent:.3f} | {plain / 1e6:.2f} |")
    wrong = missed(walk, lasts, ours, forward)
    print("\n" + ("pass" if not wrong else "FAIL: " + "; ".join(wrong)))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
