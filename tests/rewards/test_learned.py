"""Rewards learned from pairs: the loss, the ensemble, calibration, and the way through recipe, run, file and reward."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from limbeck import cli
from limbeck.core.rewards import checks, preference
from limbeck.core.rewards.calibration import accuracy, calibration_error, measure, temperature
from limbeck.core.rewards.checks import LinearVerdicts, best_accuracy, bradley_terry_line, direction, gap_of, learn
from limbeck.core.rewards.learned import Head, Scorers, bradley_terry, draws_of, scorers
from limbeck.core.rewards.preference import Preference
from limbeck.core.run import job
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator

CPU = torch.device("cpu")


def test_the_check_passes() -> None:
    assert [check for check in bradley_terry_line() if not check.passed] == []


@pytest.mark.parametrize("fault", ["swapped", "scaled"])
def test_fault_the_check_sees_swapped_verdicts_and_overconfidence(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(data: LinearVerdicts) -> Scorers:
        model = learn(LinearVerdicts(swapped=fault == "swapped"), members=1, steps=150)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(5 if fault == "scaled" else 1)
        return model

    monkeypatch.setattr(checks, "learn", wrong)
    failed = {check.name for check in bradley_terry_line() if not check.passed}
    if fault == "swapped":
        assert {"cosine of the worst member with the truth", "accuracy against Bayes'"} <= failed
    else:
        assert {"calibration error", "fitted temperature against 1"} <= failed
        assert "accuracy against Bayes'" not in failed  # it orders as well as before: only the calibration tells


def test_bayes_accuracy_is_that_of_the_true_reward() -> None:
    data = LinearVerdicts()
    pairs = data.held_out(0, 20_000)
    assert pairs is not None
    z = (pairs.winner - pairs.loser) @ checks.TRUTH
    best = best_accuracy(float(checks.TRUTH.norm()))
    assert 0.7 < best < 0.85 and accuracy(z, pairs.tie) == pytest.approx(best, abs=0.01)
    assert temperature(z, pairs.tie) == pytest.approx(1.0, abs=0.05) and calibration_error(z, pairs.tie) < 0.02


def test_a_tie_pulls_both_together_and_a_weak_verdict_pulls_less() -> None:
    gap = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    one, yes, no = torch.ones(3), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)

    def slope(strength: torch.Tensor, tie: torch.Tensor) -> list[float]:
        return torch.autograd.grad(bradley_terry(gap, strength, tie).sum(), gap)[0].tolist()

    tied, decided, weak = slope(one, yes), slope(one, no), slope(one / 4, no)
    assert tied == pytest.approx([-math.tanh(1) / 2, 0.0, math.tanh(1) / 2], abs=1e-6)
    assert decided[1] == -0.5 and weak[1] == -0.125 and all(value < 0 for value in decided)
    assert slope(one / 4, yes) == tied  # of a tie the strength is not read
    assert bradley_terry(torch.zeros(3), one, yes).tolist() == pytest.approx([math.log(2)] * 3)


def test_ties_shrink_the_scale_and_the_reward_stays_calibrated() -> None:
    """A third of ties at random: the best probability of a win is p + (1/2 - p)/3, so rewards must come out smaller."""
    plain, tied = (LinearVerdicts(ties=share) for share in (0.0, 1 / 3))
    norms = []
    for data in (plain, tied):
        model = learn(data, members=1, steps=150)
        norms.append(float(model.members[0].net[0].weight.detach().norm()))
        found = measure(model, data, 5000, CPU)
        assert temperature(gap_of(found), found.tie) == pytest.approx(1.0, abs=0.15) and direction(model) > 0.95
    assert norms[1] < 0.8 * norms[0]


def test_calibration_numbers_by_hand() -> None:
    z, none = torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.zeros(4, dtype=torch.bool)
    sure = 1 / (1 + math.exp(-1))
    assert accuracy(z, none) == 0.75 and calibration_error(z, none) == pytest.approx(0.75 - sure, abs=1e-7)
    assert temperature(z, none) == pytest.approx(1 / math.log(3), rel=1e-6)
    assert temperature(-z, none) == pytest.approx(-1 / math.log(3), rel=1e-6)
    assert accuracy(torch.zeros(4), none) == 0.5 and calibration_error(torch.zeros(4), none) == 0.0
    always = temperature(torch.ones(4), none)
    assert 0 < always < 1e-2  # never wrong: as steep as one likes
    ties = torch.tensor([True, False, False, False])
    assert accuracy(torch.tensor([-9.0, 1.0, 1.0, 1.0]), ties) == 1.0


def test_members_see_samples_of_their_own_and_start_apart() -> None:
    counts = draws_of(500, 3, 0)
    assert counts.sum(1).tolist() == [500.0] * 3 and not torch.equal(counts[0], counts[1])
    assert abs(float((counts == 0).float().mean()) - math.exp(-1)) < 0.05
    assert torch.equal(counts, draws_of(500, 3, 0)) and not torch.equal(counts, draws_of(500, 3, 1))
    same, apart = (learn(LinearVerdicts(), 2, 100, bootstrap) for bootstrap in (False, True))
    distance = [float((m.members[0].net[0].weight - m.members[1].net[0].weight).detach().norm()) for m in (same, apart)]
    assert distance[1] > 3 * distance[0]  # convex: without a bootstrap both members go to the same place


AXES = ("beauty", "match")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 comparisons of points in the plane: beauty likes the first coordinate, match the second; two users."""
    place, gen = tmp_path_factory.mktemp("pairs"), generator(0, "pairs", 0)
    x = torch.randn(600, 2, 2, generator=gen)
    pairs = []
    for i, (a, b) in enumerate(x.tolist()):
        axis = i % 2
        wins = float(torch.rand((), generator=gen)) < 1 / (1 + math.exp(-3 * (a[axis] - b[axis])))
        first, second = (a, b) if wins else (b, a)
        more = {"prompt": f"prompt {i % 60}", "user": f"u{i % 3}", "axis": AXES[axis], "tie": i % 50 == 7}
        pairs.append(Preference(json.dumps(first), json.dumps(second), **more))
    for suffix in ("jsonl", "parquet"):
        preference.write(place / f"pairs.{suffix}", pairs)
    return place


def recipe(folder: Path, suffix: str = "jsonl", *sets: str) -> recipes.Recipe:
    head = {"kind": "preference.head", "inputs": 2, "width": 8, "axes": list(AXES)}
    data = {
        "name": "judge", "steps": 200, "batch": 64, "checkpoint": {"every": 100},
        "student": {"kind": "preference.ensemble", "members": 3, "of": head},
        "data": {"kind": "preferences", "path": str(folder / f"pairs.{suffix}")},
        "stages": [{"name": "main", "losses": [{"kind": "bradley-terry", "optim": {"lr": 0.02, "ema": 0.9}}]}],
        "eval": [{"kind": "preference", "by": ["axis", "user"]}],
    }  # fmt: skip
    return recipes.of(data, sets)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    assert job.run(recipe(folder), folder / "run", device="cpu", quiet=True) == 0
    return folder / "run"


def test_a_recipe_learns_and_its_table_has_a_row_for_each_axis_and_user(run: Path) -> None:
    rows = {row["pairs"]: row for row in json.loads((run / "eval.json").read_text())["preference"]}
    assert set(rows) == {"all", "axis beauty", "axis match", "user u0", "user u1", "user u2"}
    assert rows["all"]["accuracy"] > 0.8 and rows["all"]["disagreement"] > 0.001 and rows["all"]["ties"] > 0
    assert sum(rows[f"user u{i}"]["count"] for i in range(3)) == rows["all"]["count"] > 60


def learned(path: Path, **more: object):
    settings = {"kind": "learned", "path": str(path), **more}
    data = {"name": "r", "job": "sample", "steps": 1, "batch": 1}
    built = Build(recipes.of(data | {"rewards": {"train": [settings], "held_out": [settings]}}))
    return built.piece("rewards.train.0")


X, COND = torch.randn(16, 2, generator=generator(0, "x", 0)), {"prompt": [""] * 16}


def test_the_reward_of_a_run_and_of_its_export_are_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["export", str(run), "--format", "reward", "--out", str(run.parent / "judge"), "--device", "cpu"])
    assert done.value.code == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.name == "judge.safetensors"
    for more in ({}, {"rule": "min", "axis": "match"}, {"rule": "lower", "width": 2.0, "axis": "beauty"}):
        assert torch.equal(learned(run, **more)(X, COND), learned(path, **more)(X, COND))
    both = learned(path)(X, COND)
    assert both.shape == (16, 2) and torch.equal(both[:, 1], learned(path, axis="match")(X, COND))
    low, least, mean = (learned(path, rule=rule, axis="beauty")(X, COND) for rule in ("lower", "min", "mean"))
    assert bool((low < mean).all()) and bool((least < mean).all())


def test_it_likes_what_the_pairs_liked_and_has_a_gradient(run: Path) -> None:
    for i, axis in enumerate(AXES):
        x = X.clone().requires_grad_(True)
        reward = learned(run, axis=axis)
        slope = torch.autograd.grad(reward(x, COND).sum(), x)[0].mean(0)
        assert float(slope[i]) > 3 * abs(float(slope[1 - i])) and reward.differentiable
    with pytest.raises(BadInput, match='did you mean "beauty"'):
        learned(run, axis="beuty")


def test_parquet_and_a_resume_give_the_same_weights(folder: Path, run: Path, tmp_path: Path) -> None:
    from limbeck.core.run import checkpoint

    again = tmp_path / "again"
    assert job.run(recipe(folder, "parquet", "steps=100"), again, device="cpu", quiet=True) == 0
    assert job.run(recipe(folder, "parquet"), again, device="cpu", quiet=True, resume=True) == 0
    one, two = (checkpoint.latest(place / "checkpoints").tensors for place in (run, again))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_what_is_no_learned_reward_is_refused(tmp_path: Path, folder: Path, run: Path) -> None:
    bare, empty = tmp_path / "bare.safetensors", tmp_path / "run"
    save_file({"x": torch.zeros(1)}, bare)
    empty.mkdir()
    (empty / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    for path, words in (
        (bare, "no learned reward"),
        (tmp_path / "none", "no learned reward"),
        (empty, "no checkpoint"),
    ):
        with pytest.raises(BadInput, match=words):
            learned(path)
    about = {"limbeck.student": json.dumps({"kind": "preference.head", "inputs": 3})}
    save_file({"x": torch.zeros(1)}, bare, about)
    with pytest.raises(BadInput, match="do not fit"):
        learned(bare)
    save_file({"x": torch.zeros(1)}, bare, {"limbeck.student": json.dumps({"kind": "os.system"})})
    with pytest.raises(BadInput, match="there is no student"):
        learned(bare)


def data_of(folder: Path, *sets: str):
    return Build(recipe(folder, "jsonl", *sets)).piece("data")


def test_no_prompt_is_on_both_sides_of_the_split(folder: Path) -> None:
    data = data_of(folder)
    learnt, held = ({pair.prompt for pair in side} for side in (data.learned, data.held))
    assert not learnt & held and len(learnt | held) == 60 and 5 < len(held) < 25
    by_pair = data_of(folder, "data.by=pair")
    assert {p.prompt for p in by_pair.learned} & {p.prompt for p in by_pair.held} and len(by_pair.held) > 80
    some = data_of(folder, "data.axis=match", "data.user=u1")
    assert {(p.axis, p.user) for p in (*some.learned, *some.held)} == {("match", "u1")}
    decisive = data.pairs(500, generator(0, "d", 0), slice(None), ties=False)
    assert not decisive.tie.any() and data.pairs(500, generator(0, "d", 0), slice(None)).tie.any()
    mine = data.pairs(500, generator(0, "d", 0), slice(100, 200))
    assert torch.equal(mine.winner, data.pairs(500, generator(0, "d", 0), slice(None)).winner[100:200])


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["data.axis=macth"], 'did you mean "match"'),
        (["data.user=nobody"], 'no user "nobody"'),
        (["data.held_out=0.0001"], "0 held out; add pairs"),
        (["student.of.inputs=3"], "3 numbers are expected, a sample has 2"),
        (["student.of.axes=[beauty, taste]"], 'no axis "match".*; this scorer judges beauty, taste'),
    ],
)
def test_faults_say_what_to_do(folder: Path, sets: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        job.run(recipe(folder, "jsonl", *sets), tmp_path / "run", device="cpu", quiet=True)


def test_samples_that_are_no_numbers_or_differ_in_size_are_refused(tmp_path: Path) -> None:
    for loser, words in (("cat.png", "no list of numbers"), ("[1]", "they must agree"), ("[NaN, 1]", "no list")):
        preference.write(tmp_path / "pairs.jsonl", [Preference("[1, 2]", loser)])
        data = data_of(tmp_path, "data.held_out=0")
        with pytest.raises(BadInput, match=words):
            data.pairs(1, generator(0, "d", 0), slice(None))
    preference.write(tmp_path / "pairs.jsonl", [Preference("[1]", "[2]", tie=True)])
    with pytest.raises(BadInput, match="every pair is a tie"):
        data_of(tmp_path, "data.held_out=0").pairs(1, generator(0, "d", 0), slice(None), ties=False)


def test_any_module_is_an_ensemble_of_one() -> None:
    head = Head(2, 4, 1, 1)
    model = scorers(head)
    assert model.each(X, COND).shape == (1, 16) and scorers(model) is model
