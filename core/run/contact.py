"""Contact sheets: what many runs made, on one picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WIDTH, WIDEST, GAP, LINE = 400, 4, 12, 22  # pixels of a cell, columns at most, pixels between cells, of a caption


def write(cells: Sequence[tuple[str, Path]], path: Path) -> None:
    """Writes pictures in a grid, each below its caption (its lines joined); see columns_of for the grid."""
    from PIL import Image, ImageDraw, ImageFont

    columns = columns_of([caption for caption, _ in cells])
    parts = [(caption, _fitted(picture)) for caption, picture in cells]
    lines = [parts[i : i + columns] for i in range(0, len(parts), columns)]
    heights = [LINE + GAP + max(picture.height for _, picture in line) for line in lines]
    page = Image.new("RGB", (columns * (WIDTH + GAP) + GAP, sum(heights) + GAP), "white")
    draw, font, y = ImageDraw.Draw(page), ImageFont.load_default(14), GAP
    for line, height in zip(lines, heights, strict=True):
        for i, (caption, picture) in enumerate(line):
            x = GAP + i * (WIDTH + GAP)
            draw.text((x, y), _shortened(caption.replace("\n", " · "), font.getlength), "black", font)
            page.paste(picture, (x, y + LINE))
        y += height
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def columns_of(captions: Sequence[str]) -> int:
    """As many columns as captions begin with the first one's first line (seeds of a prompt); 3 for prompts alone."""
    alike = sum(caption.partition("\n")[0] == captions[0].partition("\n")[0] for caption in captions)
    return min(WIDEST, alike) if alike > 1 else min(WIDEST - 1, len(captions))


def _fitted(path: Path) -> Any:
    """The picture at the width of a cell; small ones keep their pixels."""
    from PIL import Image

    with Image.open(path) as picture:
        method = Image.Resampling.NEAREST if picture.width < WIDTH else Image.Resampling.LANCZOS
        return picture.convert("RGB").resize((WIDTH, max(1, round(picture.height * WIDTH / picture.width))), method)


def _shortened(text: str, length: Callable[[str], float]) -> str:
    while length(text) > WIDTH:
        text = text[:-2] + "…"
    return text
