"""Builds the embedded objects (domains/threed/assets/objects) from one pinned Debian package.

Maintainers run it; users never do, since its output is committed: views from training and held-out cameras, their
poses, names, LICENSES.md, SHA256SUMS.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from limbeck.core.run.errors import LimbeckError
from limbeck.core.run.packages import Package, checked, debian, write_sums
from limbeck.core.run.rng import generator
from limbeck.domains.threed.build_mesh import AMBIENT, Mesh, load_obj, render
from limbeck.domains.threed.cameras import Cameras, orbit
from limbeck.domains.threed.objects import CAMERAS, FACTS, FOLDER, HELD_OUT, TRAINING

DEB = Package(
    "sweethome3d-furniture", "1.8-1", "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668", joint="="
)
MEMBER = "usr/share/sweethome3d/furniture/BlendSwap-CC-0.sh3f"
CATALOGUE = "PluginFurnitureCatalog.properties"
SIZE, FOV, DISTANCE = 32, 40.0, 3.0
VIEWS = 160
LOW, HIGH = -10.0, 50.0  # elevations, degrees
ZERO, OTHER = "Creative Commons Zero", "Creative Commons Attribution"


@dataclass(frozen=True)
class Chosen:
    """A model by its path in the package, what we call it, other words for it, and degrees to turn its front to +x."""

    model: str
    name: str
    words: tuple[str, ...]
    turn: float = 0.0


CHOSEN = (
    Chosen("armchair", "green chair", ("lime green office chair with armrests", "green office armchair")),
    Chosen("caballito", "rocking horse", ("wooden toy horse on rockers", "toy horse"), 90),
    Chosen("cartoon_biplane", "biplane", ("toy airplane with two wings", "cartoon plane", "propeller plane")),
    Chosen("desklamp", "desk lamp", ("golden lamp with a white shade", "bedside lamp")),
    Chosen("flowerBox", "flower box", ("white flowers in a window box", "balcony flowers")),
    Chosen("kitchenaid", "kitchen mixer", ("yellow stand mixer with a steel bowl", "food processor")),
    Chosen("mofx_mailbox", "mailbox", ("black letter box on a wooden post", "american mail box")),
    Chosen("oakTable", "round wooden table", ("round oak table", "dining table")),
    Chosen("pianoAQueue", "grand piano", ("black concert piano", "piano")),
    Chosen("plasticChair", "blue chair", ("blue plastic chair", "school chair")),
    Chosen("poolTable", "pool table", ("green billiard table", "snooker table")),
    Chosen("table_football", "football table", ("table soccer game", "foosball table")),
    Chosen("tableFan", "table fan", ("white electric fan with blue blades", "ventilator")),
    Chosen("tableWithTablecloth", "table with a red tablecloth", ("checkered red tablecloth", "table cloth")),
    Chosen("teddyBear", "teddy bear", ("brown plush bear", "stuffed toy bear")),
    Chosen("tetrapak", "milk carton", ("carton of milk", "milk")),
    Chosen("umbrella", "beach umbrella", ("blue and white striped parasol", "sunshade")),
    Chosen("deckChair", "deck chair", ("blue and white striped beach chair", "sun lounger")),
    Chosen("barrel", "barrel", ("old wooden barrel", "wine cask")),
    Chosen("crate", "wooden crate", ("wooden box", "shipping crate")),
    Chosen("desk", "desk", ("reddish brown computer desk", "writing desk")),
    Chosen("littlePlant", "potted plant", ("green plant in a clay pot", "houseplant")),
    Chosen("basketball", "basketball", ("orange basketball ball", "ball")),
    Chosen("fireExtinguisher", "fire extinguisher", ("red fire extinguisher with a black hose", "extinguisher")),
    Chosen("bed3", "bed", ("bed with a turquoise blanket", "double bed")),
    Chosen("bread", "bread", ("sliced loaf of bread", "bread loaf")),
    Chosen("chicken", "chicken", ("brown hen", "rooster")),
    Chosen("horse2", "horse", ("brown horse", "galloping horse")),
    Chosen("cactus", "cactus", ("green cactus in a black pot", "succulent")),
    Chosen("childHut", "playground with a red slide", ("wooden playhouse with a red slide", "playground")),
    Chosen("coffeeBrewer", "coffee machine", ("red coffee maker", "espresso machine")),
    Chosen("forkLift", "forklift", ("yellow fork lift truck", "forklift truck"), 90),
    Chosen("motorbike", "spring rider motorbike", ("red playground motorcycle on a spring", "motorbike"), -90),
    Chosen("sofa2", "sofa", ("beige sofa", "couch")),
    Chosen("cupcake", "cupcake", ("cupcake with a cherry on top", "muffin")),
    Chosen("stoneLantern", "stone lantern", ("japanese garden lantern", "stone pagoda")),
)
NOTICE = f"""# Licence of the embedded objects

Pictures of {len(CHOSEN)} models of the set "Blend Swap CC-0" of Sweet Home 3D, which are in the public domain (Creative
Commons Zero, https://creativecommons.org/publicdomain/zero/1.0/). Nobody need be named; we name the authors below.

## {DEB.spec} (Debian)

Package SHA-256: `{DEB.sha256}`; file `{MEMBER}`.

Choice: of its 175 models, {len(CHOSEN)} that a look at their pictures at 32 pixels showed to be complete, coloured and
recognisable, of many kinds, and whose own licence file in the package says {ZERO}. (Some models of the set have no
such file, and two have one that asks for attribution; none of those is here.) Names and words are ours.

Changes: models turned to z up and front to +x, scaled into the unit ball, and rendered at {SIZE} pixels by our own
rasteriser: one soft light from the front, right and above (half Lambert, at least {AMBIENT} of the colour), nearest
texels of pictures made smaller, flat faces, no glass, no shadows; 4x4 samples a pixel. {VIEWS} training cameras an
object (azimuth stratified, elevation {LOW:g} to {HIGH:g} degrees) and 12 held-out ones, the same for all; field of view
{FOV:g} degrees, distance {DISTANCE:g} radii. Colours are those on white; alpha is kept beside them.

## Models

| model | named here | author |
|---|---|---|
"""


def catalogue(folder: Path) -> dict[str, dict[str, str]]:
    """What the set says of its models, by the name of the model's file."""
    entries: dict[str, dict[str, str]] = {}
    for line in (folder / CATALOGUE).read_text(encoding="latin-1").splitlines():
        found = re.fullmatch(r"(\w+)#(\d+)=(.*)", line.strip())
        if found:
            entries.setdefault(found[2], {})[found[1]] = found[3]
    return {Path(entry["model"]).stem: entry for entry in entries.values()}


def upright(chosen: Chosen, entry: dict[str, str]) -> Tensor:
    """The matrix [3,3] from the set's axes (y up, front +z), after its own rotation, to ours."""
    given = entry.get("modelRotation")
    own = torch.tensor([float(v) for v in given.split()]).view(3, 3) if given else torch.eye(3)
    axes = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    c, s = math.cos(math.radians(chosen.turn)), math.sin(math.radians(chosen.turn))
    return torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ axes @ own


def model(folder: Path, chosen: Chosen, entry: dict[str, str]) -> Mesh:
    """One model, upright; LimbeckError if its own licence file does not say that it is free."""
    path = folder / entry["model"].lstrip("/")
    texts = [p.read_text(encoding="latin-1") for p in path.parent.iterdir() if p.suffix in (".txt", ".html")]
    if not any(ZERO in text for text in texts) or any(OTHER in text for text in texts):
        raise LimbeckError(f"{path.name} has no licence file that says {ZERO}; choose another model")
    return load_obj(path).turned(upright(chosen, entry))


def around(azimuth: Tensor, elevation: Tensor) -> Cameras:
    """Cameras at angles [V] in degrees."""
    one = torch.ones(len(azimuth))
    return orbit(azimuth.deg2rad(), elevation.deg2rad(), DISTANCE * one, math.radians(FOV) * one, SIZE, SIZE)


def training_cameras(number: int) -> Cameras:
    """The training cameras of an object: azimuths stratified, elevations uniform."""
    gen = generator(0, "threed.objects", number)
    place = (torch.arange(VIEWS) + torch.rand(VIEWS, generator=gen)) / VIEWS
    return around(360 * place, LOW + (HIGH - LOW) * torch.rand(VIEWS, generator=gen))


def held_out_cameras() -> Cameras:
    """Twelve cameras all around, the first four a quarter turn apart, at six heights."""
    order = torch.tensor([0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11])
    heights = torch.tensor([15.0, 25.0, 5.0, 35.0, -5.0, 45.0]).repeat(2)
    return around(30.0 * order + 11.0, heights)


def on_white(views: Tensor) -> Tensor:
    """uint8 RGBA [V,4,H,W] of premultiplied views in [0,1]: colours over white, alpha beside them."""
    alpha = views[:, 3:]
    return (torch.cat([views[:, :3] + 1 - alpha, alpha], 1) * 255).round().byte()


def save_sheet(views: list[Tensor], path: Path) -> None:
    """A row an object, a column a view."""
    rows = [torch.cat(list(row), 2) for row in views]
    pixels = torch.cat(rows, 1).permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels, "RGBA").save(path, lossless=True, quality=100, method=6, exact=True)


def write(archive: Path, folder: Path = FOLDER) -> None:
    """Writes the set of an unpacked package with licence and sums."""
    folder.mkdir(parents=True, exist_ok=True)
    held, drawn = held_out_cameras(), [training_cameras(i) for i in range(len(CHOSEN))]
    with tempfile.TemporaryDirectory() as place:
        zipfile.ZipFile(archive).extractall(place)
        entries = catalogue(Path(place))
        meshes = [model(Path(place), chosen, entries[chosen.model]) for chosen in CHOSEN]
    save_sheet(
        [on_white(render(mesh, cameras)) for mesh, cameras in zip(meshes, drawn, strict=True)], folder / TRAINING
    )
    save_sheet([on_white(render(mesh, held)) for mesh in meshes], folder / HELD_OUT)
    poses = {"training": torch.stack([cameras.pose for cameras in drawn]), "held_out": held.pose}
    save_file(poses, folder / CAMERAS)
    write_facts(entries, folder)
    write_sums(folder)


def write_facts(entries: dict[str, dict[str, str]], folder: Path) -> None:
    """Names and words, and the licence with the authors."""
    rows = [{"name": c.name, "words": c.words, "model": c.model, "author": entries[c.model]["creator"]} for c in CHOSEN]
    lines = ",\n".join(json.dumps(row) for row in rows)
    facts = f'{{"size": {SIZE}, "fov": {FOV}, "distance": {DISTANCE}, "objects": [\n{lines}\n]}}\n'
    (folder / FACTS).write_text(facts, encoding="utf-8")
    table = "".join(f"| {row['model']} | {row['name']} | {row['author']} |\n" for row in rows)
    (folder / "LICENSES.md").write_text(NOTICE + table, encoding="utf-8")


def build() -> None:
    """`limbeck assets build objects`: the committed set."""
    with tempfile.TemporaryDirectory() as place:
        package = checked(DEB, debian(DEB, Path(place)))
        subprocess.run(["dpkg-deb", "-x", package, place], check=True)
        write(Path(place) / MEMBER)
