"""Diffusion-DPO as a recipe's objective, on a line where theta beta = 5.85; the known faults planted and caught."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from limbeck.core.alignment import config, preference
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.config import Uniform
from limbeck.core.diffusion.denoiser import FewStep, Model
from limbeck.core.distillation.source import Source
from limbeck.core.pictures import to_pictures
from limbeck.core.rewards.pairs import Pairs
from limbeck.core.rewards.preference import Preference, write
from limbeck.core.rewards.toy import Shifted
from limbeck.core.run import checkpoint, job
from limbeck.core.run.build import Build
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player
from limbeck.core.run.recipe import Recipe, load
from limbeck.core.run.rng import Draws, generator
from limbeck.core.run.trainer import Trainer
from limbeck.domains.image import models

CPU = torch.device("cpu")
LINE = Uniform(lo=0.0, hi=0.995)


class Verdicts:
    """Pairs from N(0, 1), judged by Bradley-Terry on r = strength x."""

    def __init__(self, strength: float = 1.0, swapped: bool = False) -> None:
        self.strength, self.swapped = strength, swapped

    def pairs(self, n: int, gen: Generator, rows: slice, ties: bool = True) -> Pairs:
        assert not ties, "a tie has no winner"
        x = torch.randn(2, n, 1, generator=gen)
        wins = torch.rand(n, generator=gen) < torch.sigmoid(self.strength * (x[0, :, 0] - x[1, :, 0]))
        order = torch.where((wins != self.swapped)[:, None], x, x.flip(0))[:, rows]
        b, empty = order.shape[1], [""] * n
        strength, tie = torch.full((b,), self.strength), torch.zeros(b, dtype=torch.bool)
        return Pairs(order[0], order[1], empty[rows], strength, tie, empty, empty, strength)


def objective(data: object, **settings: object) -> preference.DiffusionDpo:
    """The objective on the line, without a recipe."""
    model = Model(Shifted().requires_grad_(False), (1,), Identity(), lambda prompts: {}, "line")
    student = FewStep(copy.deepcopy(model.denoiser).requires_grad_(True), (0.995,))
    made = config.DiffusionDpo(time=LINE, **settings)
    optim = OptimConfig(kind="adam", lr=0.02 / made.beta, clip=None)
    return preference.DiffusionDpo(
        Source(model, student, data, {}), student.denoiser, made, Player("student", student, optim, 1)
    )


def trained(data: object, beta: float = 4.0, steps: int = 1200) -> float:
    """theta beta after training."""
    made = objective(data, beta=beta)
    Trainer(made, Team("cpu"), 0, "s", steps, 512).run()
    return float(made.denoiser.theta.detach()) * beta


def terms(made: preference.DiffusionDpo, batch: int = 64) -> dict[str, Tensor]:
    context = Context(0, "s", Draws(0, 0, batch), 1, 0, CPU)
    (phase,) = made.phases(context)
    return phase.loss()


def test_the_first_loss_is_log_two_and_both_errors_are_told_apart() -> None:
    found = terms(objective(Verdicts()))
    assert float(found["dpo"].detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert found["dpo"].requires_grad and not found["_winner"].requires_grad
    for side in ("winner", "loser"):
        assert float(found[f"_{side}"]) == pytest.approx(float(found[f"_{side}_reference"]), rel=1e-6)
    assert float(found["_winner"]) != float(found["_loser"])


def test_it_ends_where_the_card_says() -> None:
    assert trained(Verdicts()) == pytest.approx(5.85, abs=0.4)


def test_beta_is_the_price_of_leaving_the_reference() -> None:
    assert trained(Verdicts(), beta=16.0) == pytest.approx(5.85, abs=0.4)


def test_fault_swapped_pairs_end_on_the_other_side() -> None:
    assert trained(Verdicts(swapped=True)) == pytest.approx(-5.85, abs=0.4)


def test_fault_a_noise_for_each_side_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(x: Tensor) -> Tensor:
        if x.ndim == 1:  # t stays shared
            return x.repeat(2)
        return torch.cat([x, torch.randn(x.shape, generator=gen)])

    gen = Generator().manual_seed(0)
    monkeypatch.setattr(preference, "twice", apart)
    assert trained(Verdicts()) == pytest.approx(1.64, abs=0.4)


def test_a_weaker_judges_verdicts_give_the_same_optimum() -> None:
    """Labels from sigmoid(s gap) with strength s; the same labels taken at full strength move the student less."""
    half = Verdicts(strength=0.5)
    assert trained(half) == pytest.approx(5.85, abs=0.6)

    class Certain(Verdicts):
        def pairs(self, n: int, gen: Generator, rows: slice, ties: bool = True) -> Pairs:
            found = super().pairs(n, gen, rows, ties)
            return replace(found, strength=torch.ones_like(found.strength))

    assert trained(Certain(strength=0.5)) < 4.0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher on disk, and six pairs of noise pictures of which the redder one was preferred; one is a tie."""
    place = tmp_path_factory.mktemp("pictures")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models.save_teacher(models.build_unet(32, (32, 32)), place / "tiny")
    noise = torch.rand(12, 3, 32, 32, generator=generator(0, "pictures", 0)) * 2 - 1
    for i, picture in enumerate(to_pictures(noise)):
        picture.save(place / f"{i}.png")
    red, pairs = noise[:, 0].mean((1, 2)), []
    for i in range(0, 12, 2):
        better, worse = (i, i + 1) if red[i] > red[i + 1] else (i + 1, i)
        pairs.append(Preference(f"{better}.png", f"{worse}.png", "red apple", tie=i == 10))
    write(place / "pairs.parquet", pairs)
    write(place / "ties.jsonl", pairs[5:])
    return place


def recipe(pictures: Path, *sets: str) -> Recipe:
    """image/diffusion-dpo made tiny, on these pairs."""
    tiny = ["steps=12", "batch=4", "checkpoint.every=6", "log.every=1", "space.steps=1", "sample.prompts=[red apple]"]
    tiny += [f"teacher.model={pictures / 'tiny'}", f"data.path={pictures / 'pairs.parquet'}", "data.held_out=0"]
    tiny += ["student.steps=1", "stages.0.losses.0.optim.lr=1e-3", "stages.0.losses.0.optim.warmup=0"]
    return load("image/diffusion-dpo", [*tiny, *sets])


def rows(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_a_recipe_on_pictures_learns_and_resumes_bit_for_bit(pictures: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert job.run(recipe(pictures), whole, device="cpu", quiet=True) == 0
    assert job.run(recipe(pictures, "steps=6"), halves, device="cpu", quiet=True) == 0
    assert job.run(recipe(pictures), halves, device="cpu", resume=True, quiet=True) == 0
    one, two = (checkpoint.latest(folder / "checkpoints").tensors for folder in (whole, halves))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    found = rows(whole)
    assert found == rows(halves)
    assert found[0]["student/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1]["student/dpo"] < 0.6 and found[-1]["student/agreed"] == 1.0
    for side in ("winner", "loser"):
        assert {f"student/{side}", f"student/{side}_reference"} <= found[-1].keys()


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["student=null"], "a student that denoises"),
        (["teacher={kind: toy.ring4}", "student={kind: toy.mlp}", "space=null"], "a student that denoises"),
        (["data=null"], "learns from pairs and `data` gives none"),
        (["data={kind: image.fluent}"], "learns from pairs and `data` gives none"),
        (["data.path=PLACE/ties.jsonl"], "every pair is a tie"),
        (["space=null"], "is no list of numbers; give the recipe a space"),
    ],
)
def test_what_gives_no_pairs_or_does_not_denoise_is_refused(
    sets: list[str], words: str, pictures: Path, tmp_path: Path
) -> None:
    sets = [item.replace("PLACE", str(pictures)) for item in sets]
    with pytest.raises(BadInput, match=words):
        job.run(recipe(pictures, *sets), tmp_path / "run", device="cpu", quiet=True)


def test_pictures_that_are_none_or_lie_elsewhere_are_refused(pictures: Path) -> None:
    read = Build(recipe(pictures)).piece("space").read
    (pictures / "text.png").write_text("no picture")
    assert read("0.png", pictures).shape == (3, 32, 32) and float(read("0.png", pictures).abs().max()) <= 1.0
    for name, words in (("text.png", "no picture that can"), ("../x.png", "lies outside"), ("x.png", "no file")):
        with pytest.raises(BadInput, match=words):
            read(name, pictures)


def test_pairs_of_another_shape_than_the_teachers_are_refused() -> None:
    class Wide(Verdicts):
        def pairs(self, n: int, gen: Generator, rows: slice, ties: bool = True) -> Pairs:
            found = super().pairs(n, gen, rows, ties)
            return replace(found, winner=found.winner.repeat(1, 2), loser=found.loser.repeat(1, 2))

    with pytest.raises(BadInput, match=r"shape \[2\], the teacher has \[1\]"):
        terms(objective(Wide()))
