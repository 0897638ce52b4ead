"""What steering many particles costs and how near it comes: against a direct transcription, interleaved in one process.

python benchmarks/particles.py            prints two markdown tables; exit status 1 when a bar is missed
"""

import argparse
import math
import random
import statistics
import sys
import time
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from diffusers import AutoencoderKL
from meter import peak
from torch import Tensor

from limbeck.core.diffusion.codec import Autoencoder
from limbeck.core.diffusion.denoiser import Denoiser, Prediction
from limbeck.core.diffusion.discrete import categorical
from limbeck.core.diffusion.sampling import Kernel, ddim, first_hitting
from limbeck.core.rewards.toy import Words, variation
from limbeck.core.run.rng import generator
from limbeck.core.steering.checks import TIMES, Hills, masked
from limbeck.core.steering.particles import Scheme, Steering, steer
from limbeck.core.steering.value import expected

ALWAYS = 2.0  # a threshold above every effective sample size: resample at each step
MORE, CHUNK = 0.01, 8  # how much farther from the tilt than the transcription we may be; samples decoded at a time


@dataclass
class Problem:
    """A teacher whose tilted law is known: what is steered, by what estimate, and how far samples are from the tilt."""

    name: str
    denoiser: Denoiser
    kernel: Kernel
    times: Tensor
    temperature: float
    start: Callable[[int, torch.Generator], Tensor]
    value: Callable[[Prediction, torch.Generator], Tensor]
    reward: Callable[[Tensor], Tensor]
    error: Callable[[Tensor], float]


def words(exact: bool) -> Problem:
    """The 81 words; by their exact soft value, or by the reward of one word drawn from the prediction."""
    world = Words()
    teacher, beta = world.teacher(), world.beta

    def value(pred: Prediction, gen: torch.Generator) -> Tensor:
        return world.value(teacher, pred.x_t) if exact else expected(pred, world.score, beta, 1, gen)

    name = "words, exact value" if exact else "words, one guess"
    return Problem(name, teacher, first_hitting(), TIMES, beta, lambda n, gen: masked(n), value, world.score,
                   lambda x: variation(world.law(x), world.tilt()))  # fmt: skip


def hills() -> Problem:
    """Two Gaussian hills on a line and the reward x; the error is that of the mean."""
    world, times = Hills(), torch.linspace(0.999, 0, 31)
    return Problem("hills, x0_hat", world.teacher(), ddim(1.0), times, world.temperature,
                   lambda n, gen: torch.randn(n, 1, generator=gen), lambda pred, gen: world.c * pred.x0[:, 0],
                   lambda x: world.c * x[:, 0], lambda x: abs(float(x.mean()) - world.mean()))  # fmt: skip


@torch.no_grad()
def transcribed(problem: Problem, n: int, total: int, seed: int) -> Tensor:
    """Feynman-Kac steering as its formulas read: potentials exp((r - r before)/T), N multinomial draws at every step.

    Weights and ancestors are Python numbers, particle by particle; the network sees all particles at once.
    """
    gen, draw = generator(seed, "particles", 0), random.Random(seed)
    x, before = problem.start(total, gen), [0.0] * total

    def ancestors(rewards: list[float]) -> list[int]:
        chosen: list[int] = []
        for first in range(0, total, n):
            weights = []
            for i in range(first, first + n):
                weights.append(math.exp((rewards[i] - before[i]) / problem.temperature))
            cumulative = list(accumulate(weights))
            for _ in range(n):
                found = bisect(cumulative, draw.random() * cumulative[-1])
                chosen.append(first + min(found, n - 1))
        return chosen

    for i in range(len(problem.times) - 1):
        t, s = problem.times[i].expand(total), problem.times[i + 1].expand(total)
        pred = problem.denoiser.predict(x, t, {})
        if i > 0:
            rewards = problem.value(pred, gen).tolist()
            index = ancestors(rewards)
            before = [rewards[a] for a in index]
            x, pred = torch.stack([x[a] for a in index]), pred.pick(torch.tensor(index))
        x = problem.kernel.propose(pred, x, t, s, gen)
    return torch.stack([x[a] for a in ancestors(problem.reward(x).tolist())])


def steered(
    problem: Problem, n: int, total: int, seed: int, scheme: Scheme = "systematic", below: float = 0.5
) -> Tensor:
    """limbeck's, all groups at once; groups are resampled below a share of N (the defaults are those of `Steering`)."""
    gen, settings = generator(seed, "particles", 0), Steering(n, problem.temperature, "difference", scheme, below)
    x = problem.start(total, gen)
    value = lambda step: problem.value(step.pred, gen)  # noqa: E731
    return steer(problem.denoiser, problem.kernel, x, problem.times, settings, value, problem.reward, None, gen).x


Way = Callable[[Problem, int, int, int], Tensor]
WAYS: dict[str, Way] = {
    "transcription": transcribed,
    "the same scheme": lambda *args: steered(*args, scheme="multinomial", below=ALWAYS),
    "systematic": lambda *args: steered(*args, below=ALWAYS),
    "as it comes": steered,
}


def compare(problem: Problem, n: int, total: int, seeds: int) -> dict[str, tuple[float, float, float]]:
    """Each way's mean error, its standard error, and particles a second of CPU time (median over the seeds)."""
    errors: dict[str, list[float]] = {name: [] for name in WAYS}
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(seeds):
        order = list(WAYS.items())
        for name, way in order if seed % 2 else order[::-1]:
            began = time.process_time()
            x = way(problem, n, total, seed)
            rates[name].append(total / (time.process_time() - began))
            errors[name].append(problem.error(x))
    spread = {name: statistics.stdev(found) / math.sqrt(seeds) for name, found in errors.items()}
    return {name: (statistics.mean(errors[name]), spread[name], statistics.median(rates[name])) for name in WAYS}


def tilts(numbers: list[int], total: int, seeds: int) -> list[str]:
    """Print the first table; what misses the bars: the same scheme must come as near, and all of ours be as quick."""
    print(f"| problem, N | {' | '.join(WAYS)} |\n|---|" + "---|" * len(WAYS))
    wrong = []
    for problem in (words(True), words(False), hills()):
        for n in numbers:
            found = compare(problem, n, total // n * n, seeds)
            cells = " | ".join(f"{e:.4f} ± {spread:.4f}, {rate / 1e3:.0f}" for e, spread, rate in found.values())
            print(f"| {problem.name}, {n} | {cells} |", flush=True)
            (theirs, noise, slow), (error, spread, _), *_ = found.values()
            if error > theirs + MORE + 3 * math.hypot(noise, spread):
                wrong.append(f"{problem.name}, {n}: error {error:.4f} against {theirs:.4f}")
            rates = {name: rate for name, (_, _, rate) in found.items() if rate < slow}
            wrong += [f"{problem.name}, {n}, {name}: {r:,.0f} a second, not {slow:,.0f}" for name, r in rates.items()]
    return wrong


def floor(total: int, seeds: int) -> float:
    """The mean error of as many exact draws of the tilted words: no steering does better."""
    world = Words()
    laws = [categorical(world.tilt().expand(total, -1), generator(seed, "floor", 0)) for seed in range(seeds)]
    return statistics.mean(variation(world.law(world.states[law]), world.tilt()) for law in laws)


def codec(chunk: int, side: int) -> tuple[Autoencoder, tuple[int, ...]]:
    """A narrow autoencoder in the layout of Stable Diffusion's, weights of seed 0, and its latent's shape."""
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=down, up_block_types=up, block_out_channels=(16, 32), norm_num_groups=8, sample_size=side
        )
    return Autoencoder(vae.requires_grad_(False), chunk=chunk), (4, side // 2, side // 2)


def decodes(counts: list[int], side: int) -> list[str]:
    """Print the second table; what misses the bar: the peak of one chunk, and the pixels twice (parts and whole)."""
    (chunked, shape), (whole, _) = codec(CHUNK, side), codec(max(counts), side)
    first = torch.randn(CHUNK, *shape, generator=generator(0, "latents", 0))
    with torch.no_grad():
        one = peak(lambda: chunked.decode(first))
        print(f"\na chunk of {CHUNK} pictures of {side} x {side}: {one / 1e6:.2f} MB\n")
        print("| particles | pixels, MB | peak in chunks, MB | peak at once, MB |\n|---|---|---|---|")
        wrong = []
        for count in counts:
            z = torch.randn(count, *shape, generator=generator(0, "latents", count))
            torch.testing.assert_close(chunked.decode(z), whole.decode(z))
            cut, full = peak(lambda z=z: chunked.decode(z)), peak(lambda z=z: whole.decode(z))
            pixels = count * 3 * side**2 * 4
            print(f"| {count} | {pixels / 1e6:.2f} | {cut / 1e6:.2f} | {full / 1e6:.2f} |", flush=True)
            if cut > one + 2 * pixels:
                wrong.append(f"{count} decoded in chunks: {cut} bytes, more than {one} and twice {pixels}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Print both tables; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--particles", type=int, nargs="+", default=[4, 16, 64], help="values of N")
    parser.add_argument("--total", type=int, default=16_000, help="particles of all groups together")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--decoded", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--side", type=int, default=64, help="pixels of a decoded picture's side")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    least = floor(args.total, args.seeds)
    print(f"error, thousand particles a second of CPU time; {args.total} particles a run, {args.seeds} seeds, "
          f"{args.threads} thread(s); the error of exact draws of the words {least:.4f}\n")  # fmt: skip
    wrong = tilts(args.particles, args.total, args.seeds) + decodes(args.decoded, args.side)
    print("\n" + ("pass" if not wrong else "FAIL: " + "; ".join(wrong)))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
