"""Density control: which rows change, what the optimiser keeps, whose gradient counts, and runs that go on."""

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.run.build import Build
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput, LimbeckError
from limbeck.core.run.players import Player
from limbeck.core.run.recipe import of
from limbeck.core.run.rng import generator
from limbeck.core.run.trainer import Trainer
from limbeck.domains.threed import densify
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.config import DensityControl
from limbeck.domains.threed.gaussians import PARTS, Gaussians
from limbeck.domains.threed.known import psnr
from limbeck.domains.threed.posed import PROMPTS
from limbeck.domains.threed.rasteriser import Splats
from limbeck.domains.threed.scene import seen

SMALL, LARGE, FAINT = math.log(0.02), math.log(0.1), -6.0
SPLATS = {"kind": "threed.gaussians", "count": 60, "capacity": 80, "scale": 0.1}
OPTIM = {"kind": "adam", "lr": 0.02, "betas": [0.9, 0.95], "clip": None}


def scene(n: int = 12, capacity: int = 16) -> Gaussians:
    """Rows 0 to 3 are small, 4 to 7 large, the rest small and faint from row 10 on."""
    gen = torch.Generator().manual_seed(0)
    scales = torch.full((n, 3), SMALL)
    scales[4:8, 1] = LARGE
    opacity = torch.randn(n, generator=gen)
    opacity[10:12] = FAINT
    means, quats, colours = (torch.randn(n, k, generator=gen) for k in (3, 4, 3))
    return Gaussians(Splats(0.3 * means, scales, quats, opacity, colours), capacity)


def trained(one: Gaussians, ema: float | None = 0.9) -> Player:
    """A player whose optimiser has moments in every row."""
    player = Player("student", one, OptimConfig(kind="adam", lr=1e-4, ema=ema), 10)
    gen = torch.Generator().manual_seed(1)
    for step in range(2):
        for p in player.tensors:
            p.grad = torch.randn(p.shape, generator=gen)
        player.step(step)
    return player


def rows(one: Gaussians, player: Player) -> dict[str, Tensor]:
    """Copies of parameters, moments and averages, row by row."""
    found = {name: getattr(one, name).detach().clone() for name in PARTS}
    for name in PARTS:
        for slot in ("exp_avg", "exp_avg_sq"):
            found[f"{name}/{slot}"] = player.optim.state[getattr(one, name)][slot].clone()
        if player.ema:
            found[f"{name}/ema"] = player.ema[name].clone()
    return found


@torch.no_grad()
def changed(one: Gaussians, pull: Tensor, **settings) -> tuple[Player, dict[str, Tensor], dict[str, Tensor]]:
    """Before and after pruning and growing."""
    player = trained(one)
    before = rows(one, player)
    config = DensityControl(threshold=1.0, large=0.05, **settings)
    densify.prune(one, player, config.prune)
    densify.grow(one, player, pull, config, generator(0, "densify", 0))
    return player, before, rows(one, player)


def pulls(*hot: int) -> Tensor:
    """Strong at these rows, the first most."""
    found = torch.full((16,), 0.5)
    for i, row in enumerate(hot):
        found[row] = 10.0 - i
    return found


def survivors(one: Gaussians, before: dict[str, Tensor], after: dict[str, Tensor], gone: set[int]) -> None:
    """All rows but these are what they were, moments and averages too."""
    kept = [row for row in range(16) if row not in gone]
    for name, value in before.items():
        assert torch.equal(value[kept], after[name][kept]), name


def newcomers(after: dict[str, Tensor], new: list[int]) -> None:
    """No moments; the average is the value."""
    for name in PARTS:
        assert not after[f"{name}/exp_avg"][new].any() and not after[f"{name}/exp_avg_sq"][new].any()
        assert torch.equal(after[f"{name}/ema"][new], after[name][new])
    assert after["means/exp_avg"].any()


def test_copies_are_copies_in_free_rows() -> None:
    one = scene()
    _, before, after = changed(one, pulls(1, 3))
    assert one.alive.tolist() == [True] * 12 + [False] * 4  # the faint rows 10 and 11 were freed, and taken
    for name in PARTS:
        assert torch.equal(after[name][[10, 11]], before[name][[1, 3]])  # opacity too: it is not halved
    survivors(one, before, after, {10, 11})
    newcomers(after, [10, 11])


def test_split_splats_leave_and_their_parts_come() -> None:
    one = scene()
    _, before, after = changed(one, pulls(5), prune=0.0)
    assert int(one.alive.sum()) == 13
    new = [5, 12]
    survivors(one, before, after, set(new))
    newcomers(after, new)
    for row in new:
        assert torch.allclose(after["scales"][row], before["scales"][5] - math.log(1.6))
        assert torch.equal(after["quats"][row], before["quats"][5]) and after["opacity"][row] == before["opacity"][5]
        away = (after["means"][row] - before["means"][5]).norm()
        assert 0 < away < 4 * 0.1
    assert not torch.equal(after["means"][5], after["means"][12])


def test_parts_are_drawn_from_their_splat() -> None:
    """Their covariance is the splat's, whatever its orientation."""
    n = 4000
    quats = torch.tensor([0.3, 0.8, -0.2, 0.5]).repeat(n, 1)
    scales = torch.tensor([0.2, 0.1, 0.02]).log().repeat(n, 1)
    one = Gaussians(Splats(torch.zeros(n, 3), scales, quats, torch.zeros(n), torch.zeros(n, 3)))
    axes = Splats(one.means, one.scales, one.quats, one.opacity, one.colours).axes()[0].detach()
    with torch.no_grad():
        densify.scatter(one, torch.arange(n), generator(0, "densify", 0))
    assert torch.allclose(one.means.detach().T @ one.means.detach() / n, axes @ axes.T, atol=2e-3)


def test_a_full_scene_serves_the_strongest_pulls() -> None:
    one = scene(12, 13)
    _, before, after = changed(one, pulls(2, 6, 0, 4)[:13], prune=0.0)
    assert one.alive.all() and torch.equal(after["means"][12], before["means"][2])
    assert torch.equal(after["means"][:12], before["means"][:12])


def test_a_dead_row_rests() -> None:
    one = scene()
    player, _, _ = changed(one, torch.zeros(16))
    before = {name: getattr(one, name).detach()[10:12].clone() for name in PARTS}
    for step in range(2, 6):
        views = ring(1, 8)
        one.render(views, torch.ones(1, 3)).image.sum().backward()
        player.step(step)
    assert all(torch.equal(getattr(one, name).detach()[10:12], value) for name, value in before.items())


def test_fault_moments_that_stay_move_dead_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(densify, "renewed", lambda *args: None)
    with pytest.raises(AssertionError):
        test_a_dead_row_rests()
    with pytest.raises(AssertionError):
        test_copies_are_copies_in_free_rows()


def shell(capacity: int) -> Gaussians:
    """A sphere of 600 splats in two colours."""
    gen = torch.Generator().manual_seed(0)
    means = 0.5 * torch.nn.functional.normalize(torch.randn(600, 3, generator=gen), dim=1)
    colours = torch.where(means[:, :1] > 0, torch.tensor([1.5, 0.0, -1.5]), torch.tensor([-1.5, 0.0, 1.5]))
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(600, 1)
    return Gaussians(Splats(means, torch.full((600, 3), math.log(0.06)), quats, torch.ones(600), colours), capacity)


@torch.no_grad()
def kept(large: float) -> tuple[float, float, float]:
    """Decibels between the sphere and itself after a tenth of it was split or copied; mean opacity before and after."""
    before, after = shell(660), shell(660)
    player = Player("student", after, OptimConfig(), 1)
    pull = torch.arange(660) % 10 * 1.0
    densify.grow(after, player, pull, DensityControl(threshold=9.0, large=large), generator(0, "densify", 0))
    assert after.alive.all()
    a, b = (seen(one, ring(4, 32)) for one in (before, after))
    return psnr(a.image, b.image), float(a.alpha.mean()), float(b.alpha.mean())


def test_a_split_keeps_the_picture_and_a_copy_makes_it_denser() -> None:
    decibels, _, _ = kept(0.01)
    assert decibels >= 25
    _, before, after = kept(1.0)
    assert after > before * 1.001


def test_fault_parts_as_large_as_their_splat(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kept(0.01)[0]
    monkeypatch.setattr(densify, "SHRINK", 0.5)
    assert kept(0.01)[0] < min(25, plain - 3)


def recipe(*losses: dict, **student):
    score = {"kind": "score", "operator": "sds", "guidance": 1.0, "optim": OPTIM}
    return of({
        "name": "tiny", "teacher": {"kind": "threed.solids", "size": 16}, "steps": 8, "batch": 2,
        "student": student.get("student", {**SPLATS, **student}),
        "data": {"kind": "threed.law", "prompt": PROMPTS[0], "size": 16},
        "stages": [{"name": "make", "losses": [score, *losses]}],
    })  # fmt: skip


def control(**settings) -> dict:
    return {"kind": "threed.density_control", "optim": OPTIM, "every": 2, "start": 2, "threshold": 1e-6, **settings}


def trainer(*losses: dict, steps: int = 8, **student) -> Trainer:
    made = Build(recipe(*losses, **student))
    return Trainer(made.objective("make"), Team("cpu"), 0, "make", steps, 2)


def controls(run: Trainer) -> densify.DensityControl:
    return next(part for part in run.objective.objectives if isinstance(part, densify.DensityControl))


def test_splats_grow_while_a_scene_is_made() -> None:
    run = trainer(control())
    counts = []
    for _ in range(6):
        run.one_step()
        counts.append(int(controls(run).scenes[0].alive.sum()))
    assert counts[0] == 60 and counts[1] == 80 and run.numbers()["splats/copied"] + run.numbers()["splats/split"] >= 0
    assert all(0 < count <= 80 for count in counts)
    quiet = trainer(control(threshold=1e9))
    for _ in range(6):
        quiet.one_step()
    assert int(controls(quiet).scenes[0].alive.sum()) == 60


def test_statistics_are_means_over_views_in_units_of_the_picture() -> None:
    run = trainer(control(every=50, start=50))
    own, found = controls(run), []
    plain = own.gather

    def watch(ctx) -> None:
        found.append(own.source.sampled(ctx).aux["screen"].grad * 8 * 2)  # half of 16 pixels, 2 views
        plain(ctx)

    own.gather = watch
    run.one_step()
    run.one_step()
    norms = torch.cat(found).norm(dim=2)
    expected = norms.sum(0) / (norms > 0).sum(0).clamp_min(1)
    assert torch.allclose(own.pulls[0].mean()[:60], expected, rtol=1e-5) and expected.max() > 0
    assert not own.pulls[0].total[60:].any()


REGULAR = {"kind": "threed.regular", "optim": OPTIM, "weight": 3.0, "opacity": 50.0}


def first_pull(*losses: dict, parts: int = 1) -> Tensor:
    run = trainer(control(every=50, start=50), *losses)
    run.parts = parts
    run.one_step()
    return controls(run).pulls[0].mean()


def test_regularisers_do_not_count() -> None:
    assert torch.allclose(first_pull(REGULAR), first_pull(), rtol=1e-3, atol=1e-3 * float(first_pull().max()))


def test_a_batch_in_parts_pulls_as_the_whole_one() -> None:
    whole = first_pull(REGULAR)
    assert torch.allclose(first_pull(REGULAR, parts=2), whole, rtol=1e-3, atol=1e-3 * float(whole.max()))


def test_fault_regularisers_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from limbeck.domains.threed.regular import Regular

    monkeypatch.setattr(Regular, "_tell", lambda *args: None)
    apart = (first_pull(REGULAR) - first_pull()).abs().max()
    assert apart > 0.02 * first_pull().max()


def test_a_run_that_goes_on_is_the_same_bit_for_bit() -> None:
    whole, first, second = (trainer(control(every=3, start=3), count=40, capacity=100) for _ in range(3))
    for _ in range(8):
        whole.one_step()
    for _ in range(4):  # a change lies before the cut, another one after it, and statistics are at work between
        first.one_step()
    second.load({name: value.clone() for name, value in first.state().items()}, 4, {})
    assert any(name.startswith("objective/1/views") and value.any() for name, value in first.state().items())
    for _ in range(4):
        second.one_step()
    assert int(controls(whole).scenes[0].alive.sum()) > 40
    assert whole.state().keys() == second.state().keys()
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())


def test_fault_statistics_that_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(densify.DensityControl, "load", lambda *args: None)
    with pytest.raises(AssertionError):
        test_a_run_that_goes_on_is_the_same_bit_for_bit()


def test_a_scene_that_would_vanish_stops_the_run() -> None:
    run = trainer(control(prune=0.9))
    run.one_step()
    with pytest.raises(LimbeckError, match="all splats had become fainter than 0.9; lower prune"):
        run.one_step()


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(BadInput, match="end 1 is before start 2"):
        trainer(control(end=1))
    with pytest.raises(BadInput, match="capacity 10 is below count 60"):
        trainer(control(), capacity=10)
    alone = recipe(control())
    del alone.stages[0].losses[0]
    with pytest.raises(BadInput, match="only listens to other losses"):
        Build(alone).objective("make")
    with pytest.raises(BadInput, match="is for splats"):
        Build(recipe(control(), student={"kind": "threed.nerf"})).objective("make")
    for count in (0, 10_000_000):
        with pytest.raises(BadInput, match="count"):
            recipe(count=count)
