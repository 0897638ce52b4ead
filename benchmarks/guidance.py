"""What guidance costs: both branches in one batched forward (what `guide` does) against two forwards, interleaved.

python benchmarks/guidance.py [--repeats N] [--threads N]      prints a markdown table
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from limbeck.core.diffusion.denoiser import Denoiser, Encoded, Network
from limbeck.core.diffusion.guidance import combine, guide
from limbeck.core.diffusion.process import Flow
from limbeck.domains.image.models import build_unet, flow

SCALE = 3.0


def embedded() -> tuple[str, Denoiser, tuple[int, ...], int]:
    """The network of the embedded teacher, random weights: name, denoiser, sample shape, text width."""
    call = lambda net, x, t, cond: flow(net, x, t, cond["states"], cond["mask"])  # noqa: E731
    return "embedded U-Net, 9.4M", Network(build_unet(), Flow(), "flow", call), (3, 32, 32), 384


def latent() -> tuple[str, Denoiser, tuple[int, ...], int]:
    """A U-Net in the layout of Stable Diffusion, narrowed to a CPU's measure."""
    net = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128, 128, 128), layers_per_block=1, cross_attention_dim=128,
        attention_head_dim=8)  # fmt: skip
    call = lambda net, x, t, cond: net(x, 1000 * t, encoder_hidden_states=cond["states"], return_dict=False)[0]  # noqa: E731
    return "Stable Diffusion's layout, narrow", Network(net, Flow(), "flow", call), (4, 16, 16), 128


def condition(rows: int, width: int, gen: torch.Generator) -> Encoded:
    """Random text states with a full mask."""
    return {"states": torch.randn(rows, 16, width, generator=gen), "mask": torch.ones(rows, 16, dtype=torch.bool)}


def seconds(function: Callable[[], Tensor]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(
    denoiser: Denoiser, shape: tuple[int, ...], width: int, batch: int, repeats: int
) -> tuple[float, float, float]:
    """Median seconds of one forward of 2B and of two of B, and the median of their ratios taken pair by pair."""
    gen = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, *shape, generator=gen), torch.rand(batch, generator=gen)
    cond, null = condition(batch, width, gen), condition(1, width, gen)
    guided = guide(denoiser, null, SCALE)

    def one() -> Tensor:
        return guided.predict(x, t, cond).flow

    def two() -> Tensor:
        return combine(denoiser.predict(x, t, cond), denoiser.predict(x, t, null), SCALE).flow

    difference = (one() - two()).abs().max().item()
    if difference > 1e-3:
        raise SystemExit(f"one forward and two disagree by {difference}")
    pairs = []
    for i in range(repeats):  # the order alternates: a machine that slows down does not favour either
        first, second = (one, two) if i % 2 == 0 else (two, one)
        took = {first: seconds(first), second: seconds(second)}
        pairs.append((took[one], took[two]))
    ones, twos = zip(*pairs, strict=True)
    return statistics.median(ones), statistics.median(twos), statistics.median(a / b for a, b in pairs)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| network | batch | one forward of 2B, ms | two forwards of B, ms | ratio |\n|---|---|---|---|---|")
    for name, denoiser, shape, width in (embedded(), latent()):
        for batch in (1, 4, 8):
            one, two, ratio = compare(denoiser.eval(), shape, width, batch, options.repeats)
            print(f"| {name} | {batch} | {1e3 * one:.1f} | {1e3 * two:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
