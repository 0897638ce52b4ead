"""Pictures of sets of sequences: logos, sequences in colour, and k-mers against k-mers.

Legend: N sequences, L length, V letters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from limbeck.core.pictures import stacked
from limbeck.domains.sequence import statistics, tokens
from limbeck.domains.sequence.text import Alphabet

ROW = 50  # positions in a row of a logo
CELL, HEIGHT = 18, 84  # pixels a position and a row's highest stack
LEFT, GAP, LABEL = 46, 10, 16
WIDTH = LEFT + ROW * CELL + GAP
SCALES = (0.25, 0.5, 1.0, 2.0, 3.0, 4.5)  # bits at the top of an axis
GREY, LINE = "#555", "#bbb"
BASES = {"A": "#1b8a3a", "C": "#1f5fbf", "G": "#e0a100", "T": "#c8322b", "U": "#c8322b"}
CLASSES = {  # residues that behave alike: acid, basic, polar, small, aromatic, aliphatic
    "DE": "#c8322b", "KRH": "#1f5fbf", "NQST": "#1b8a3a", "GPC": "#c77d00", "FWY": "#7a3fb0", "AILMV": "#333333",
}  # fmt: skip


def colour(letter: str, alphabet: Alphabet) -> str:
    """The colour of a letter: one a base, one a class of residues, grey for a mask."""
    if alphabet.name != "protein":
        return BASES.get(letter, LINE)
    return next((tone for residues, tone in CLASSES.items() if letter in residues), LINE)


@cache
def font(size: int) -> Any:
    """Pillow's own typeface."""
    return ImageFont.load_default(size)


def frequencies(ids: Tensor, size: int) -> Tensor:
    """The letters' shares at each place of ids [N,L], [L,V] float64; masks are left out (zeros where there is none)."""
    counts = F.one_hot(ids, size + 1)[..., :size].sum(0).double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def information(ids: Tensor, size: int) -> Tensor:
    """Bits [L] that each place of ids [N,L] tells: log2 V - entropy - (V-1)/(2 ln2 n), at least 0.

    The last term is Schneider's correction for few sequences; a single sequence is drawn without it.
    """
    share, n = frequencies(ids, size), (ids < size).sum(0).double()
    entropy = -torch.special.xlogy(share, share).sum(1) / math.log(2)
    few = torch.where(n > 1, (size - 1) / (2 * math.log(2) * n.clamp(min=1)), 0.0)
    return torch.where(n > 0, math.log2(size) - entropy - few, 0.0).clamp_min(0)


def heights(ids: Tensor, size: int) -> Tensor:
    """How high each letter stands at each place, in bits [L,V]."""
    return frequencies(ids, size) * information(ids, size)[:, None]


def scale(stacks: Sequence[Tensor]) -> float:
    """Bits at the top of an axis that fits all stacks [L,V], so that logos on a page can be compared."""
    top = max((float(stack.sum(1).max()) for stack in stacks), default=0.0)
    return next((bits for bits in SCALES if top <= bits), SCALES[-1])


@cache
def glyph(letter: str) -> Image.Image:
    """A letter that fills its box, as a mask; narrow ones (I) keep room at their sides."""
    big = Image.new("L", (220, 260))
    ImageDraw.Draw(big).text((40, 20), letter, fill=255, font=font(180), stroke_width=3, stroke_fill=255)
    cut = big.crop(big.getbbox())
    box = Image.new("L", (max(cut.width, cut.height * 6 // 10), cut.height))
    box.paste(cut, ((box.width - cut.width) // 2, 0))
    return box


def stamp(page: Image.Image, letter: str, tone: str, box: tuple[int, int, int, int]) -> None:
    """Draws a letter stretched to a box (left, top, right, bottom); nothing into an empty one."""
    width, height = box[2] - box[0], box[3] - box[1]
    if width > 0 and height > 0:
        page.paste(tone, box[:2], glyph(letter).resize((width, height), Image.Resampling.LANCZOS))


def logo(stack: Tensor, alphabet: Alphabet, top: float) -> Image.Image:
    """A logo of heights [L,V] in bits, in rows of 50 positions under an axis of `top` bits."""
    rows = max(1, -(-len(stack) // ROW))
    page = Image.new("RGB", (WIDTH, rows * (HEIGHT + LABEL + GAP)), "white")
    for row in range(rows):
        y = row * (HEIGHT + LABEL + GAP) + GAP // 2
        part = stack[row * ROW : (row + 1) * ROW]
        axis(page, y, top, row * ROW, len(part))
        for i, place in enumerate(part.tolist()):
            column(page, (LEFT + i * CELL, y + HEIGHT), place, alphabet, top)
    return page


def axis(page: Image.Image, y: int, top: float, first: int, count: int) -> None:
    """The bits at the left, the positions below (every tenth, counted from 1)."""
    draw, base = ImageDraw.Draw(page), y + HEIGHT
    draw.line((LEFT - 4, y, LEFT - 4, base, LEFT + count * CELL, base), fill=LINE)
    for bits, at in ((top, y), (top / 2, y + HEIGHT // 2), (0.0, base)):
        draw.line((LEFT - 8, at, LEFT - 4, at), fill=LINE)
        draw.text((LEFT - 11, at), f"{bits:g}", fill=GREY, font=font(11), anchor="rm")
    draw.text((3, y + HEIGHT // 2 - 22), "bits", fill=GREY, font=font(11))
    for i in range(count):
        if (first + i + 1) % 10 == 0 or i == 0:
            where = (LEFT + i * CELL + CELL // 2, base + 3)
            draw.text(where, str(first + i + 1), fill=GREY, font=font(11), anchor="mt")


def column(page: Image.Image, foot: tuple[int, int], place: list[float], alphabet: Alphabet, top: float) -> None:
    """One position's letters [V], the highest on top."""
    (x, base), done = foot, 0.0
    for bits, letter in sorted(zip(place, alphabet.letters, strict=True)):
        low, done = done, min(done + bits, top)
        box = (x + 1, base - round(done / top * HEIGHT), x + CELL - 1, base - round(low / top * HEIGHT))
        stamp(page, letter, colour(letter, alphabet), box)


def lines(texts: Sequence[str], alphabet: Alphabet, width: int = 100) -> Image.Image:
    """Sequences as letters in colour, in lines of 100, positions at the left."""
    step, tall = (WIDTH - LEFT - GAP) // width, 14
    rows = max((-(-len(text) // width) for text in texts), default=0) * tall + GAP // 2  # pixels a sequence
    page = Image.new("RGB", (WIDTH, len(texts) * rows + GAP), "white")
    draw = ImageDraw.Draw(page)
    wrapped = [(i, at, text[at : at + width]) for i, text in enumerate(texts) for at in range(0, len(text), width)]
    for number, start, part in wrapped:
        y = number * rows + start // width * tall + tall // 2
        draw.text((LEFT - 8, y), str(start + 1), fill=GREY, font=font(10), anchor="rm")
        for i, letter in enumerate(part):
            tone = colour(letter, alphabet)
            draw.text((LEFT + i * step + step // 2, y), letter, fill=tone, font=font(11), anchor="mm")
    return page


def heading(text: str, size: int = 14) -> Image.Image:
    """A line of text over the page's width."""
    page = Image.new("RGB", (WIDTH, size + GAP), "white")
    ImageDraw.Draw(page).text((GAP, GAP // 2), text, fill="black", font=font(size))
    return page


@dataclass(frozen=True)
class Block:
    """What a page shows under one title."""

    title: str
    ids: Tensor  # [N,L]


def sheet(blocks: Sequence[Block], alphabet: Alphabet, shown: int = 3) -> Image.Image:
    """Logos one under the other on one scale, each with its first sequences."""
    stacks = [heights(block.ids, alphabet.size) for block in blocks]
    top, parts = scale(stacks), []
    for block, stack in zip(blocks, stacks, strict=True):
        count = len(block.ids)
        parts.append(heading(f"{block.title} ({count} sequence{'s' * (count != 1)})"))
        parts.append(logo(stack, alphabet, top))
        parts.append(lines(tokens.decode(block.ids[:shown], alphabet), alphabet))
    return stacked(parts)


@dataclass(frozen=True)
class Axis:
    """One side of a scatter: what it shows, and the values [N] on it."""

    name: str
    values: Tensor


def scatter(x: Axis, y: Axis, title: str, side: int = 420) -> Image.Image:
    """Points [N] >= 0 against each other on equal axes of square roots, so that rare things have room too."""
    left, head, foot = 62, 34, 46
    page = Image.new("RGB", (left + side + 18, head + side + foot), "white")
    draw, top = ImageDraw.Draw(page), max(float(x.values.max()), float(y.values.max()), 1e-12)
    draw.rectangle((left, head, left + side, head + side), outline=LINE)
    draw.line((left, head + side, left + side, head), fill=LINE)
    draw.text((left, 10), title, fill="black", font=font(14))
    draw.text((left + side // 2, head + side + 24), x.name, fill=GREY, font=font(12), anchor="mt")
    turned = Image.new("RGB", (side, 18), "white")
    ImageDraw.Draw(turned).text((side // 2, 2), y.name, fill=GREY, font=font(12), anchor="mt")
    page.paste(turned.rotate(90, expand=True), (2, head))
    for share in (0, 0.5, 1):
        value = f"{share**2 * top:.3g}"
        draw.text((left + share * side, head + side + 5), value, fill=GREY, font=font(11), anchor="mt")
        draw.text((left - 5, head + side - share * side), value, fill=GREY, font=font(11), anchor="rm")
    return dotted(page, (x.values / top).sqrt(), (y.values / top).sqrt(), (left, head, side))


def dotted(page: Image.Image, x: Tensor, y: Tensor, frame: tuple[int, int, int]) -> Image.Image:
    """Half-transparent dots at x, y [N] in [0,1] inside a frame (left, top, side)."""
    left, head, side = frame
    ink = Image.new("RGBA", page.size)
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        dot = Image.new("RGBA", (5, 5))
        ImageDraw.Draw(dot).ellipse((0, 0, 4, 4), fill=(31, 95, 191, 90))
        ink.alpha_composite(dot, (left + round(a * side) - 2, head + round((1 - b) * side) - 2))
    return Image.alpha_composite(page.convert("RGBA"), ink).convert("RGB")


def kmer_scatter(designs: Tensor, natural: Tensor, k: int, size: int) -> Image.Image:
    """Frequencies of k-mers (a thousand letters) in designs [N,L] against natural sequences [M,L]."""
    a, b = (statistics.kmers(x, k, size) for x in (natural, designs))
    a, b = (1000 * x / x.sum().clamp(min=1) for x in (a, b))
    seen = (a > 0) | (b > 0)
    title = f"{k}-mers, Pearson r = {statistics.pearson(a, b):.3f}"
    return scatter(Axis("natural, per 1000", a[seen]), Axis("designs, per 1000", b[seen]), title)
