"""How far particles of one prompt lie apart: the root mean square between their views, in shares of the range.

    python benchmarks/particles_3d.py threed/vsd threed/sds-nerf --prompt "green chair" --set steps=600

A step trains one particle, so that steps are to grow with their number. Views are those of held-out cameras. SDS's
particles differ by what they drew alone, as runs of other seeds do.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import torch
from assets_3d import made

from limbeck.domains.threed import known, space
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.quality import sharpness
from limbeck.domains.threed.scene import seen


def measured(recipe: str, prompt: str, sets: list[str], device: str) -> dict[str, float]:
    """PSNR and sharpness, means over particles, and the distances of all pairs."""
    build, _, seconds = made(recipe, prompt, sets, device)
    truth = Known.of(build, prompt)
    assert truth is not None
    views = [seen(scene, truth.cameras).image for scene in space.scenes(build)]
    apart = [float(((a - b) / 2).square().mean().sqrt()) for a, b in itertools.combinations(views, 2)]
    wrong = [float(((a - truth.image) / 2).square().mean().sqrt()) for a in views]
    return {
        "PSNR": statistics.mean(known.psnr(view, truth.image) for view in views),
        "sharpness": statistics.mean(sharpness(view) for view in views),
        "apart": statistics.mean(apart),
        "from the truth": statistics.mean(wrong),
        "seconds": seconds,
    }


def main() -> None:
    """A line a recipe and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--particles", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for recipe in options.recipes:
        sets = [f"student.particles={options.particles}", *options.sets]
        found = measured(recipe, options.prompt, sets, options.device)
        print(f"{recipe}, {options.prompt!r}:", {name: round(value, 4) for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
