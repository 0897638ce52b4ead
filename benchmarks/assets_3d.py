"""Assets of every embedded object by a recipe, measured at held-out cameras: the table and a sheet of pictures.

    python benchmarks/assets_3d.py threed/sds-nerf --objects 24 --out runs/assets [--set a.b=c]
    python benchmarks/assets_3d.py threed/paint --objects 6 --set student.of=runs/threed/sds-nerf/{object}

`{object}` in a setting is the object's name with dashes. A line an object: PSNR before the first step, then PSNR and
SSIM against the true views, silhouettes, the teacher's own answer in one step, a white picture, whether the views
resemble their own object most, and seconds. Held out are cameras, not objects: the teacher has seen every object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from PIL import Image

from limbeck.core.run.build import Build
from limbeck.core.run.distributed import Team
from limbeck.core.run.recipe import load
from limbeck.core.run.trainer import Trainer
from limbeck.domains.threed import known, quality, space
from limbeck.domains.threed.known import Known
from limbeck.domains.threed.objects import objects
from limbeck.domains.threed.scene import seen

Row = dict[str, float | str]


def made(recipe_name: str, prompt: str, sets: list[str], device: str) -> tuple[Build, float, float]:
    """A run of the recipe in memory, the PSNR that it started from, and its seconds."""
    named = [item.replace("{object}", prompt.replace(" ", "-")) for item in sets]
    recipe = load(recipe_name, [f"data.prompt={prompt}", "eval.0.formats=[]", *named])
    team, stage = Team(device), recipe.stages[0]
    build = Build(recipe, team.device)
    objective, truth = build.objective(stage), Known.of(build, prompt)
    assert truth is not None
    before = known.psnr(seen(space.scenes(build)[0], truth.cameras).image, truth.image)
    start = time.perf_counter()
    Trainer(objective, team, recipe.seed, stage.name, recipe.steps, recipe.batch).run()
    return build, before, time.perf_counter() - start


def row(build: Build, prompt: str, before: float, seconds: float) -> Row:
    """What the run's evaluation says, in one line."""
    scene, teacher, white = quality.rows(build.recipe.eval[0], build)
    found = {name: scene[name] for name in ("PSNR", "SSIM", "silhouette IoU", "own prompt", "sharpness")}
    return {
        "object": prompt,
        "before": before,
        **found,
        "one step": teacher["PSNR"],
        "white": white["PSNR"],
        "seconds": seconds,
    }


def strip(build: Build, prompt: str) -> torch.Tensor:
    """Truth above the asset, four sides, [3,2H,4W]."""
    truth = Known.of(build, prompt)
    assert truth is not None
    some = slice(0, 8, 2)
    image = seen(space.scenes(build)[0], truth.cameras.pick(some)).image
    return torch.cat([torch.cat(list(views), 2) for views in (truth.image[some], image)], 1)


def summary(rows: list[Row]) -> Row:
    """Over all objects; the bars of the recipe's promise."""
    values = [float(one["PSNR"]) for one in rows]
    return {
        "objects": len(rows), "mean before": statistics.mean(float(one["before"]) for one in rows),
        "mean PSNR": statistics.mean(values), "least": min(values),
        "at least 20 dB": sum(value >= 20 for value in values),
        "5 dB over white": sum(float(one["PSNR"]) >= float(one["white"]) + 5 for one in rows),
        "above one step": sum(float(one["PSNR"]) > float(one["one step"]) for one in rows),
        "mean IoU": statistics.mean(float(one["silhouette IoU"]) for one in rows),
        "mean sharpness": statistics.mean(float(one["sharpness"]) for one in rows),
        "retrieved": sum(float(one["own prompt"]) for one in rows),
        "seconds": statistics.mean(float(one["seconds"]) for one in rows),
    }  # fmt: skip


def main() -> None:
    """Prints the lines as they come, then the summary; leaves rows.json and sheet.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--objects", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("runs/assets"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, strips = [], []
    for prompt in objects().names[: options.objects]:
        build, before, seconds = made(options.recipe, prompt, options.sets, options.device)
        rows.append(row(build, prompt, before, seconds))
        strips.append(strip(build, prompt))
        print(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True
        )
    (options.out / "rows.json").write_text(json.dumps([*rows, summary(rows)], indent=1))
    columns = [torch.cat(strips[i::4], 1) for i in range(min(4, len(strips)))]
    tall = max(column.shape[1] for column in columns)
    padded = [torch.nn.functional.pad(column, (0, 0, 0, tall - column.shape[1]), value=1.0) for column in columns]
    sheet = space.strip(torch.cat(padded, 2)[None])
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(options.out / "sheet.png")
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in summary(rows).items()})


if __name__ == "__main__":
    main()
