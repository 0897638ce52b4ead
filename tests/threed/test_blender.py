"""Blender's own importer opens our GLB: upright, on the floor, of the height asked for, front to the front, textured.

BLENDER names an interpreter that has `bpy` (`make test-blender` installs one); without it there is nothing to test.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import solid
from PIL import Image

from limbeck.domains.threed import asset
from limbeck.domains.threed.config import Files

SIDES = (0.3, 0.5, 0.6)  # halves of a box, depth, width and height


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what Blender made of a box, two metres high."""
    if "BLENDER" not in os.environ:
        pytest.skip("BLENDER is not set")
    folder = tmp_path_factory.mktemp("blender")
    scene = solid.Solid(lambda p: solid.box(p, SIDES))
    files = Files(resolution=48, faces=2000, texture=256, height=2.0, colours="field")
    path, _ = asset.export(scene, folder, "glb", files, {})
    script = Path(__file__).with_name("blender.py")
    command = [os.environ["BLENDER"], str(script), str(path), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_it_stands_upright_on_the_floor_with_its_texture(opened: Path) -> None:
    facts = json.loads((opened / "facts.json").read_text())
    told = json.loads((opened / "asset.json").read_text())
    low, high = np.array(facts["bounds"])
    assert low[2] == pytest.approx(0, abs=1e-5) and high[2] == pytest.approx(2, abs=1e-4)
    width, depth = (high - low)[:2]
    assert width == pytest.approx(2 * SIDES[1] / SIDES[2], rel=0.03)
    assert depth == pytest.approx(2 * SIDES[0] / SIDES[2], rel=0.03)
    assert np.abs((low + high)[:2]).max() < 1e-4
    assert (facts["faces"], facts["uv"]) == (told["faces"], 1)
    assert (facts["size"], facts["space"], facts["metallic"], facts["roughness"]) == ([256, 256], "sRGB", 0.0, 1.0)


@pytest.mark.parametrize(("side", "colour"), [("front", solid.GREEN), ("left", solid.YELLOW), ("above", solid.BLUE)])
def test_its_sides_are_where_they_belong_in_their_colours(opened: Path, side: str, colour: tuple[float, ...]) -> None:
    with Image.open(opened / f"{side}.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), float) / 255
    assert np.abs(np.median(pixels[14:18, 14:18], (0, 1)) - colour).max() < 0.12  # what shines adds some white
