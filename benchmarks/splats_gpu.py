"""What pictures of Gaussians cost on a GPU, and that gsplat and our tiles show the same.

python benchmarks/splats_gpu.py            prints two markdown tables (needs CUDA and gsplat)

A step is forward and backward of one picture; times are wall clock between synchronisations, medians of rounds.
"""

import argparse
import statistics
import time

import torch
from rasteriser import NAMES, scene
from torch import Tensor

from limbeck.core.run.rng import generator
from limbeck.domains.threed import gaussians
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.rasteriser import Splats

WAYS = {"tiles": gaussians.by_tiles, "gsplat": gaussians.by_gsplat}


def step(way: str, splats: Splats, size: int) -> list[Tensor]:
    """The picture's values and all gradients."""
    view = ring(1, size).to(splats.means)
    picture, screen = WAYS[way](splats, view)
    values = torch.cat([picture.colour, picture.alpha, picture.depth], 1)
    weight = torch.randn(values.shape, generator=generator(0, "weight", size)).to(values)
    return [values.detach(), *torch.autograd.grad((values * weight).sum(), [*vars(splats).values(), screen])]


def rate(way: str, splats: Splats, size: int, rounds: int) -> float:
    """Steps a second."""
    found = []
    for i in range(rounds + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(way, splats, size)
        torch.cuda.synchronize()
        found += [time.perf_counter() - began] if i > 2 else []
    return 1 / statistics.median(found)


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[5000, 50_000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    print(torch.cuda.get_device_name())
    print("\n| splats | picture | tiles, steps/s | gsplat, steps/s |\n|---|---|---|---|", flush=True)
    for count in given.counts:
        splats = Splats(*(part.detach().cuda().requires_grad_() for part in vars(scene(count)).values()))
        for size in given.sizes:
            tiles, other = (rate(way, splats, size, given.rounds) for way in WAYS)
            print(f"| {count} | {size} x {size} | {tiles:.1f} | {other:.1f} |", flush=True)
    splats = Splats(*(part.detach().cuda().requires_grad_() for part in vars(scene(given.counts[0])).values()))
    print("\n| difference over the largest value | |\n|---|---|")
    ours, theirs = (step(way, splats, given.sizes[-1]) for way in WAYS)
    for name, a, b in zip(("picture", *NAMES), ours, theirs, strict=True):
        print(f"| {name} | {float((a - b).abs().max() / b.abs().max()):.1e} |")


if __name__ == "__main__":
    main()
