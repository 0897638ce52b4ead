"""Logos: bits at each place, letters where they belong, pages that can be compared."""

import math

import pytest
import torch
from PIL import Image

from limbeck.core.run.rng import generator
from limbeck.domains.sequence import logo, tokens
from limbeck.domains.sequence.text import DNA, PROTEIN


def rows(*texts: str) -> torch.Tensor:
    return torch.cat([tokens.encode([text], DNA) for text in texts])


def inked(picture: Image.Image, tone: str, box: tuple[int, int, int, int]) -> int:
    """Pixels of exactly this colour in a part of a picture."""
    wanted = tuple(int(tone[i : i + 2], 16) for i in (1, 3, 5))
    return sum(count for count, colour in picture.crop(box).getcolors(1 << 20) or [] if colour == wanted)


def test_bits_are_those_of_schneider() -> None:
    x = rows(*(["AAC"] * 8 + ["AGC"] * 8))
    few = 3 / (2 * math.log(2) * 16)
    assert logo.information(x, 4).tolist() == pytest.approx([2 - few, 1 - few, 2 - few])
    assert logo.information(x[:1], 4).tolist() == [2, 2, 2]  # one sequence stands as it is
    x[:, 2] = 4
    assert float(logo.information(x, 4)[2]) == 0 and logo.frequencies(x, 4)[2].tolist() == [0] * 4
    even = torch.randint(4, (8, 200), generator=generator(0, "t", 0))
    assert float(logo.information(even, 4).mean()) < 0.15  # uncorrected it is .29: noise that looks like a motif


def test_heights_share_out_the_bits() -> None:
    stack = logo.heights(rows("AC", "AC", "AG", "AT"), 4)
    assert torch.allclose(stack[1] / stack[1].sum().clamp_min(1e-9), torch.tensor([0, 0.5, 0.25, 0.25]).double()) or (
        float(stack[1].sum()) == 0
    )
    assert logo.scale([torch.tensor([[0.1, 0.1]])]) == 0.25 and logo.scale([torch.tensor([[1.1, 0.1]])]) == 2.0


def test_a_letter_stands_at_its_place_in_its_colour_and_rows_wrap() -> None:
    stack = torch.zeros(120, 4).double()
    stack[3, 2], stack[107, 0] = 2.0, 1.0
    picture = logo.logo(stack, DNA, 2.0)
    step = logo.HEIGHT + logo.LABEL + logo.GAP
    assert picture.size == (logo.WIDTH, 3 * step)
    at = (logo.LEFT + 3 * logo.CELL, 0, logo.LEFT + 4 * logo.CELL, step)
    assert inked(picture, logo.BASES["G"], at) > 200
    assert inked(picture, logo.BASES["G"], (0, 0, *picture.size)) == inked(picture, logo.BASES["G"], at)
    half = (logo.LEFT + 7 * logo.CELL, 2 * step + logo.GAP // 2, logo.LEFT + 8 * logo.CELL, 3 * step)
    found = inked(picture, logo.BASES["A"], half)
    upper = (half[0], half[1], half[2], half[1] + logo.HEIGHT // 2 - 1)
    assert found > 60 and inked(picture, logo.BASES["A"], upper) == 0  # one bit of two: the lower half


def test_every_letter_has_a_glyph_and_a_colour() -> None:
    for alphabet in (DNA, PROTEIN):
        for letter in alphabet.letters:
            assert logo.glyph(letter).getbbox() and logo.colour(letter, alphabet) != logo.LINE
    narrow, wide = logo.glyph("I"), logo.glyph("W")
    assert narrow.width < wide.width and narrow.getbbox()[0] > 0
    assert logo.colour("_", DNA) == logo.LINE


def test_a_page_of_two_blocks_has_one_scale() -> None:
    strong, weak = rows(*["ACGT" * 5] * 20), torch.randint(4, (20, 20), generator=generator(0, "t", 0))
    page = logo.sheet([logo.Block("a", strong), logo.Block("b", weak)], DNA)
    alone = logo.sheet([logo.Block("b", weak)], DNA)
    below = page.crop((0, page.height - alone.height, *page.size))
    assert page.width == alone.width == logo.WIDTH and below.tobytes() != alone.tobytes()
    again = logo.sheet([logo.Block("a", strong), logo.Block("b", weak)], DNA)
    assert again.tobytes() == page.tobytes()


def test_points_of_equal_frequency_lie_on_the_diagonal() -> None:
    x = torch.randint(4, (30, 60), generator=generator(0, "t", 0))
    picture = logo.kmer_scatter(x, x.flip(0), 3, 4)
    blue = [
        (i % picture.width, i // picture.width)
        for i, (r, g, b) in enumerate(picture.get_flattened_data())
        if b - r > 60
    ]
    off = [abs((a - 62) - (34 + 420 - b)) for a, b in blue]
    assert len(blue) > 100 and max(off) <= 5
