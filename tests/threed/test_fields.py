"""Fields at points: what they say, that their gradients are right and repeat, and how a hash grid's levels grow."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.domains.threed import fields
from limbeck.domains.threed.config import HashGrid, Triplane, Voxels

SMALL = {
    "voxels": Voxels(size=5),
    "triplane": Triplane(size=4, features=2, hidden=4),
    "concat": Triplane(size=4, features=2, hidden=4, join="concat"),
    "hashgrid": HashGrid(levels=3, entries=6, base=2, finest=8, hidden=4),
}


def points(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 1.9 - 0.95


def filled(body: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The same module with parameters that are far from zero."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in body.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=gen))
    return body


def made(name: str, channels: int = 3, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return filled(fields.build(SMALL[name], channels, 1.0).to(dtype))  # type: ignore[attr-defined]


def test_lookup_is_grid_sample() -> None:
    gen = torch.Generator().manual_seed(0)
    p = points(200)
    grid = torch.randn(4, 6, 6, 6, generator=gen, dtype=torch.float64)
    mine = fields.lookup(grid.flatten(1), *fields.corners(fields.cells(p, 1.0, 6), 6))
    theirs = F.grid_sample(grid[None], p.flip(1)[None, None, None], align_corners=True)[0, :, 0, 0]  # x is their last
    assert torch.allclose(mine, theirs, atol=1e-12)
    plane = torch.randn(4, 7, 7, generator=gen, dtype=torch.float64)
    mine = fields.lookup(plane.flatten(1), *fields.corners(fields.cells(p, 1.0, 7)[:2], 7))
    theirs = F.grid_sample(plane[None], p[:, :2].flip(1)[None, None], align_corners=True)[0, :, 0]
    assert torch.allclose(mine, theirs, atol=1e-12)


def test_voxels_at_a_grid_point() -> None:
    body = fields.Voxels(Voxels(size=5, height=4.0, reach=0.8, sharp=2.0), 3, 1.0)
    with torch.no_grad():
        body.raw[0, 3, 2, 1] = 1.5
        body.colour[0, 3, 2, 1] = 0.7
    density, colour = body(torch.tensor([[0.5, 0.0, -0.5]]))  # x, y, z of grid point 3, 2, 1
    away = math.sqrt(0.5)
    assert density.item() == pytest.approx(2 * math.log1p(math.exp(1.5 + 4 * (1 - away / 0.8))), rel=1e-5)
    assert colour[0].tolist() == pytest.approx([2 / (1 + math.exp(-0.7)) - 1, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_latent_channels_are_not_squashed(name: str) -> None:
    body = made(name, 4)
    with torch.no_grad():
        for p in body.parameters():
            p.mul_(20)
    density, colour = body(points(50))
    assert density.shape == (50,) and colour.shape == (50, 4)
    assert colour.abs().max() > 2
    assert made(name, 3)(points(50))[1].abs().max() <= 1


@pytest.mark.parametrize("name", SMALL)
def test_fields_start_as_a_grey_blob(name: str) -> None:
    body = fields.build(SMALL[name], 3, 1.0)
    density, colour = body(torch.tensor([[0.0, 0.0, 0.0], [0.4, 0, 0], [0.0, 0.95, 0]]))
    assert density[0] > 9 > density[1] > 1 > density[2] and density[2] < 0.05
    assert colour.abs().max() < 0.6


@pytest.mark.parametrize("name", SMALL)
def test_density_alone_is_the_same(name: str) -> None:
    body = made(name)
    assert torch.equal(body.density(points(64)), body(points(64))[0])  # type: ignore[operator]


@pytest.mark.parametrize("name", SMALL)
def test_gradients(name: str) -> None:
    body = made(name)
    names = [n for n, _ in body.named_parameters()]

    def call(p: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.func.functional_call(body, dict(zip(names, values, strict=True)), (p,))
        return found

    inputs = (points(3, 1).requires_grad_(), *(p.detach().requires_grad_() for p in body.parameters()))
    assert torch.autograd.gradcheck(call, inputs)


def test_densities_have_a_second_derivative() -> None:
    """Normals are derivatives, and the orientation loss derives them once more."""
    body = made("voxels")

    def call(p: Tensor, raw: Tensor) -> Tensor:
        density, _ = torch.func.functional_call(body, {"raw": raw, "colour": body.colour}, (p,))
        return density  # type: ignore[no-any-return]

    p, raw = points(2, 2).requires_grad_(), body.raw.detach().requires_grad_()  # type: ignore[operator,union-attr]
    assert torch.autograd.gradgradcheck(call, (p, raw))


def test_lookups_have_gradients_that_repeat(threads: None) -> None:
    """Plain indexing, table[:, entry], adds in another order when both threads run at once; a busy machine hides it."""
    gen = torch.Generator().manual_seed(0)
    entry = torch.randint(500, (8, 30_000), generator=gen)
    weight, slope = (torch.rand(shape, generator=gen) for shape in ((8, 30_000), (1, 30_000)))
    table = torch.zeros(1, 500, requires_grad=True)
    first, *rest = (torch.autograd.grad(fields.lookup(table, entry, weight), table, slope)[0] for _ in range(40))
    assert all(torch.equal(first, other) for other in rest)


@pytest.mark.parametrize("config", [Voxels(size=24), Triplane(size=24, features=4), HashGrid(levels=3, entries=10)])
def test_gradients_repeat_with_two_threads(config: Voxels | Triplane | HashGrid, threads: None) -> None:
    """Many points share few entries, so that a scatter in any order would show in the last bits."""
    body = filled(fields.build(config, 3, 1.0))  # type: ignore[arg-type]
    p = points(15_000, dtype=torch.float32) * 0.3

    def gradients() -> list[Tensor]:
        density, colour = body(p)
        loss = (density.sin() + colour.square().sum(1)).sum()
        return list(torch.autograd.grad(loss, list(body.parameters())))

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_levels_grow_by_one_factor() -> None:
    published = fields.resolutions(HashGrid(levels=16, entries=19, base=16, finest=4096))
    assert published[0] == 17 and published[-1] == 4097
    growth = 2 ** (8 / 15)  # 1.447
    assert all(abs(size - 1 - 16 * growth**level) <= 0.5 for level, size in enumerate(published))


def test_levels_are_dense_where_they_fit() -> None:
    body = fields.HashGrid(HashGrid(levels=3, entries=10, base=4, finest=32), 3, 1.0)
    assert body.sizes == [5, 12, 33]
    assert [table.shape[1] for table in body.tables] == [125, 1024, 1024]
    place = torch.tensor([[0.5, 3.5], [1.25, 2.0], [3.0, 0.75]])
    entry, weight = fields.corners(place, 5)
    assert len(set(entry[:, 0].tolist())) == 8 and int(entry[0, 0]) == 0 * 25 + 1 * 5 + 3
    assert torch.allclose(weight.sum(0), torch.ones(2))
    hashed, same = fields.corners(place * 8, 33, 1023)
    x, y, z = 4, 10, 24
    assert int(hashed[0, 0]) == (x ^ (y * 2654435761) ^ (z * 805459861)) % 1024
    assert torch.allclose(same.sum(0), torch.ones(2)) and int(hashed.max()) < 1024


def test_levels_come_one_by_one() -> None:
    body = fields.HashGrid(HashGrid(levels=3, entries=6, base=2, finest=8, active=[(10, 1.0), (20, 3.0)]), 3, 1.0)
    p = points(40, dtype=torch.float32)
    for step, active in ((0, 1), (14, 1), (15, 2), (20, 3), (99, 3)):
        body.at(step)
        body.zero_grad()
        body(p)[0].sum().backward()
        assert [table.grad is not None for table in body.tables] == [i < active for i in range(3)]
    with torch.no_grad():
        whole = body(p)[0]
        body.at(0)
        assert not torch.equal(body(p)[0], whole)
        for table in list(body.tables)[1:]:
            table.zero_()
        coarse = body(p)[0]
        body.at(20)
        assert torch.equal(body(p)[0], coarse)  # a level that is not active counts as zeros


def test_only_neighbours_are_smoothed() -> None:
    assert [tuple(g.shape) for g in made("voxels").grids()] == [(1, 5, 5, 5), (3, 5, 5, 5)]  # type: ignore[operator]
    assert [tuple(g.shape) for g in made("triplane").grids()] == [(2, 4, 4)] * 3  # type: ignore[operator]
    assert made("hashgrid").grids() == []  # type: ignore[operator]
