"""What pictures of Gaussians cost on a CPU: our tiles against every splat on every pixel, and against count and size.

python benchmarks/rasteriser.py            prints three markdown tables; exit status 1 when a bar is missed

Scenes are balls of radius 0.6 seen from a distance of 3; times are of one process and its CPU, medians of interleaved
rounds; a hit is a splat in a tile of 8 x 8 pixels. Gradients are those of a random sum of colour, alpha and depth.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from meter import peak
from torch import Tensor

from limbeck.core.run.rng import generator
from limbeck.domains.threed.cameras import Cameras, ring
from limbeck.domains.threed.rasteriser import Picture, Plan, Splats, dense, project, render

FASTER, ALIKE, GROWTH = 20.0, 1e-6, 1.5  # bars: times faster, relative error, how much dearer a hit may get
NAMES = ("means", "scales", "quats", "opacity", "colours", "screen")
Way = Callable[[Splats, Cameras, Tensor | None], Picture]


def scene(count: int, dtype: torch.dtype = torch.float32) -> Splats:
    """A ball of splats of many shapes, turns and opacities; they are smaller where there are more of them."""
    gen = generator(0, "rasteriser", count)
    way, depth = torch.randn(count, 3, generator=gen), torch.rand(count, 1, generator=gen) ** (1 / 3)
    means = 0.6 * depth * way / way.norm(dim=1, keepdim=True)
    middle = torch.tensor(0.03 * (5000 / count) ** (1 / 3)).log()
    parts = [means, middle + 0.5 * torch.randn(count, 3, generator=gen), torch.randn(count, 4, generator=gen)]
    parts += [torch.randn(count, generator=gen), torch.rand(count, 3, generator=gen)]
    return Splats(*(part.to(dtype).requires_grad_() for part in parts))


def camera(size: int, dtype: torch.dtype = torch.float32) -> Cameras:
    """One, from slightly above."""
    return ring(1, size).to(torch.zeros((), dtype=dtype))


def forward(way: Way, splats: Splats, view: Cameras) -> None:
    """A picture without gradient."""
    with torch.no_grad():
        way(splats, view, None)


def gradients(way: Way, splats: Splats, view: Cameras) -> list[Tensor]:
    """The picture's values and all gradients."""
    screen = splats.means.new_zeros(len(view), len(splats.means), 2, requires_grad=True)
    picture = way(splats, view, screen)
    values = torch.cat([picture.colour, picture.alpha, picture.depth], 1)
    weight = torch.randn(values.shape, generator=generator(0, "weight", view.height)).to(values)
    slopes = torch.autograd.grad((values * weight).sum(), [*vars(splats).values(), screen])
    return [values.detach(), *slopes]


def hits(splats: Splats, view: Cameras) -> int:
    """How many splats all tiles hold together."""
    with torch.no_grad():
        return len(Plan.of(project(splats, view), len(view), view.height, view.width).row)


def timed(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of CPU time, interleaved; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            found[name] += [1e3 * (time.process_time() - began)] if i else []
    return {name: statistics.median(values) for name, values in found.items()}


def apart(splats: Splats, view: Cameras) -> dict[str, float]:
    """The largest difference of picture and gradients to the dense ones, as shares of their largest values."""
    pairs = zip(("picture", *NAMES), gradients(render, splats, view), gradients(dense, splats, view), strict=True)
    return {name: float((a - b).abs().max() / b.abs().max()) for name, a, b in pairs}


def against(count: int, size: int, rounds: int) -> list[str]:
    """Prints our times beside the dense ones; returns the bars that are missed."""
    splats, view = scene(count), camera(size)
    ways: dict[str, Way] = {"tiles": render, "dense": dense}
    steps: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        steps[f"{name}, forward"] = lambda way=way: forward(way, splats, view)
        steps[f"{name}, forward + backward"] = lambda way=way: gradients(way, splats, view)
    cost = timed(steps, rounds)
    print(f"\n| {count} splats, {size} x {size} | dense, ms | tiles, ms | times faster |\n|---|---|---|---|")
    for what in ("forward", "forward + backward"):
        slow, fast = cost[f"dense, {what}"], cost[f"tiles, {what}"]
        print(f"| {what} | {slow:.0f} | {fast:.1f} | {slow / fast:.1f} |")
    ratio = cost["dense, forward + backward"] / cost["tiles, forward + backward"]
    return [] if ratio >= FASTER else [f"forward + backward: {ratio:.1f} times faster, the bar is {FASTER:g}"]


def agreement(count: int, size: int, double: int) -> list[str]:
    """Prints how far picture and gradients are from the dense ones, in float64 with `double` splats; missed bars."""
    single = apart(scene(count), camera(size))
    exact = apart(scene(double, torch.float64), camera(size // 2, torch.float64))
    print(f"\n| relative error | float32, {count} splats, {size} x {size} | float64, {double} splats |\n|---|---|---|")
    for name in single:
        print(f"| {name} | {single[name]:.1e} | {exact[name]:.1e} |")
    return [f"{name}: {error:.1e} in float64" for name, error in exact.items() if error > ALIKE]


def scaling(counts: list[int], sizes: list[int], rounds: int) -> list[str]:
    """Prints time and memory against the number of splats and the picture's size; returns the bars that are missed."""
    print("\n| splats | picture | hits | forward + backward, ms | us a hit | peak, MB |\n|---|---|---|---|---|---|")
    missed = []
    for what, cases in (("splats", [(n, sizes[-2]) for n in counts]), ("pixels", [(counts[-2], s) for s in sizes])):
        dear = []
        for count, size in cases:
            splats, view = scene(count), camera(size)
            step = lambda splats=splats, view=view: gradients(render, splats, view)  # noqa: E731
            cost, many, most = timed({"": step}, rounds)[""], hits(splats, view), peak(step)
            dear.append(1e3 * cost / many)
            print(f"| {count} | {size} x {size} | {many} | {cost:.1f} | {dear[-1]:.2f} | {most / 1e6:.1f} |")
        if dear[-1] > GROWTH * dear[0]:
            missed.append(f"a hit costs {dear[-1] / dear[0]:.2f} times as much with the most {what}")
    return missed


def main(arguments: list[str] | None = None) -> int:
    """All tables; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 2000, 5000, 10000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--count", type=int, default=5000, help="splats of the dense picture")
    parser.add_argument("--size", type=int, default=128, help="pixels along a side of the dense picture")
    parser.add_argument("--double", type=int, default=2000, help="splats of the comparison in float64")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    missed = against(given.count, given.size, given.rounds)
    missed += agreement(given.count, given.size, given.double)
    missed += scaling(given.counts, given.sizes, given.rounds)
    print("\n" + ("pass" if not missed else "missed: " + "; ".join(missed)))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
