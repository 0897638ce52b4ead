"""The second art style, the towers aligned with captions on it, their bar, and the rewards made of them."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from limbeck.core.run import checkpoint, job
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput, LimbeckError
from limbeck.core.run.rng import Draws, generator
from limbeck.core.text import ROWS, sentences
from limbeck.domains.image import build_noto, reward_clip, towers

HELD = reward_clip.held_out()
FIRST = ["rolling on the floor laughing", "star-struck", "kissing face with smiling eyes"]  # of those held out
CPU = torch.device("cpu")
NAMES_ALONE = "stages.0.losses.0.keywords=0"  # there are three thousand keywords to read


@pytest.fixture(scope="module")
def fresh() -> Build:
    """The recipe's own pieces, nothing trained yet."""
    build = Build(recipes.load("image/reward-clip", ["batch=8", NAMES_ALONE]))
    build.objective("align")
    return build


@pytest.fixture(scope="module")
def embedded() -> dict[str, towers.Tower]:
    return {model: towers.embedded(model) for model in towers.FOLDERS}


def reward(**settings: object):
    both = {split: [{"kind": "image.text", **settings}] for split in ("train", "held_out")}
    recipe = recipes.of({"name": "r", "job": "sample", "steps": 1, "batch": 1, "rewards": both})
    return Build(recipe).piece("rewards.train.0")


def context(step: int, batch: int = 8) -> Context:
    return Context(step, "align", Draws(0, step, batch), 1, 0, CPU)


def agreement(order: torch.Tensor) -> float:
    """Mean overlap of the shapes of the pictures of both styles, the first style in another order."""
    one, two = (reward_clip.style(name).rgba[:, 3].float() / 255 for name in ("fluent", "noto"))
    return float((torch.minimum(one[order], two).sum((1, 2)) / torch.maximum(one[order], two).sum((1, 2))).mean())


def test_both_styles_show_the_same_in_the_same_order() -> None:
    noto, fluent = reward_clip.style("noto"), reward_clip.style("fluent")
    assert len(noto) == len(fluent) == 1599 and noto.names == fluent.names
    assert (noto.rgba[:, 3].float().mean((1, 2)) > 2).all()  # none is missing
    assert ((noto.rgba.float() - fluent.rgba.float()).abs().mean((1, 2, 3)) > 1).all()  # none is of the other style
    order = torch.arange(1599)
    assert agreement(order) > 0.67 > 0.63 > agreement(order.roll(1))  # a sheet that is off by one is seen


def archive(path: Path, names: list[str]) -> Path:
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), "red").save(buffer, "PNG")
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(buffer.getvalue())
            tar.addfile(entry, io.BytesIO(buffer.getvalue()))
    return path


def test_the_build_takes_no_variants_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = "package/img/google/64/"
    names = [
        folder + "1f44b.png",
        folder + "1f44b-1f3fb.png",
        folder + "2764-fe0f.png",
        "package/img/google/x/1f44c.png",
    ]
    path = archive(tmp_path / "a.tgz", names)
    assert set(build_noto.pictures(path, {"1f44b", "2764"})) == {"1f44b", "2764"}
    with pytest.raises(LimbeckError, match="lacks 1 of the captions' pictures, first 1f44c"):
        build_noto.pictures(path, {"1f44b", "1f44c"})
    with pytest.raises(LimbeckError, match=r"is not emoji-datasource-google@16\.0\.0"):
        build_noto.build(path, tmp_path / "out")


def test_held_out_captions_are_fixed_and_have_no_near_twin_among_the_others() -> None:
    seen, names = reward_clip.seen(), reward_clip.style("noto").names
    assert len(HELD) == 320 and set(HELD) | set(seen) == set(range(1599)) and not set(HELD) & set(seen)
    assert not {reward_clip.family(names[i]) for i in HELD} & {reward_clip.family(names[i]) for i in seen}
    assert [names[i] for i in HELD[:3]] == FIRST
    assert reward_clip.family("woman cook") == reward_clip.family("man cook") != reward_clip.family("woman astronaut")
    assert reward_clip.family("one o’clock") == reward_clip.family("six-thirty")


def test_data_gives_seen_captions_in_the_second_style_alone(fresh: Build) -> None:
    data, names = fresh.piece("data"), reward_clip.style("noto").names
    drawn = data.batch(800, generator(0, "x", 0), slice(None))
    assert drawn.x.shape == (800, 3, 32, 32) and len(set(drawn.prompts)) > 500
    assert not set(drawn.prompts) & {names[i] for i in HELD}
    assert not set(data.prompts(4000, generator(0, "y", 0))) & {names[i] for i in HELD}
    again = data.batch(800, generator(0, "x", 0), slice(10, 12))
    assert torch.equal(again.x, drawn.x[10:12]) and again.prompts == drawn.prompts[10:12]


def test_degradation_touches_the_share_it_names() -> None:
    x = reward_clip.style("noto").batch(torch.arange(400), generator(0, "x", 0), "name")[0]
    for share, low, high in ((0.0, 0, 0), (0.5, 270, 330), (1.0, 400, 400)):  # half blurred, half noisy: 3/4 touched
        changed = (reward_clip.degraded(x, share, generator(0, "d", 0)) - x).abs().amax((1, 2, 3)) > 0
        assert low <= int(changed.sum()) <= high


def test_the_loss_is_the_cross_entropy_among_all_seen_captions(fresh: Build) -> None:
    objective = fresh.objective("align")
    net, data = objective.net, objective.data
    (phase,) = list(objective.phases(context(3)))
    terms = phase.loss()
    drawn = data.batch(8, Draws(0, 3, 8).gen("data.batch"), slice(0, 8))
    z = net.features(drawn.x) * (Draws(0, 3, 8).uniform("contrastive.dropout", (3304,)) >= 0.75) * 4
    assert torch.equal(objective.targets, net.captions(data.names))
    own = torch.tensor([data.names.index(name) for name in drawn.prompts])
    logp = (10 * F.normalize(z @ net.head.weight.T, dim=-1) @ objective.targets.T).log_softmax(-1)
    assert torch.allclose(terms["contrastive"], -logp[range(8), own].mean(), atol=1e-4)


def test_targets_lean_towards_keywords(fresh: Build) -> None:
    net, words = fresh.piece("student"), [["fruit", "red"], []]
    found = reward_clip.leaning(net, ["red apple", "rocket"], words, 0.5)
    apple, rocket, fruit, red = net.captions(["red apple", "rocket", "fruit", "red"])
    assert torch.allclose(found[0], F.normalize(apple + 0.25 * (fruit + red), dim=0), atol=1e-6)
    assert torch.allclose(found[1], rocket, atol=1e-6)


def test_only_the_head_learns_and_the_loss_falls(fresh: Build) -> None:
    objective = fresh.objective("align")
    assert set(objective.player.params) == {"head.weight", "head.bias"}
    losses = []
    for step in range(24):
        (phase,) = list(objective.phases(context(step, 16)))
        loss = phase.loss()["contrastive"]
        loss.backward()
        objective.player.step(step)
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5]) - 2.5  # of 7.1 each at first


def test_fixed_numbers_standardise_features_and_whiten_captions(fresh: Build) -> None:
    net, data = fresh.piece("student"), fresh.piece("data")
    x = data.batch(128, generator(9, "x", 0), slice(None)).x
    z = net.features(x)
    assert float(z.mean(0).abs().mean()) < 0.15 and 0.5 < float(z.std(0).mean()) < 1.0
    assert float(z.abs().max()) < 40  # what hardly ever fires is not blown up
    (plain,) = sentences()(data.names)
    assert float(net.captions(data.names).mean(0).norm()) < 0.3 * float(plain.mean(0).norm())


def test_a_tower_refuses_other_data_and_an_objective_other_students() -> None:
    with pytest.raises(BadInput, match="image.noto"):
        Build(recipes.load("image/reward-clip", ["data.kind=image.fluent"])).piece("student")
    with pytest.raises(BadInput, match="student: {kind: image.tower}"):
        other = recipes.load("image/teacher", ["student={kind: image.few_step}", "batch=2"])
        other.stages[0].losses = recipes.load("image/reward-clip").stages[0].losses
        Build(other).objective("still")


def rows(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "speed", "memory")} for line in lines]


def test_the_recipe_runs_resumes_bit_for_bit_and_exports_a_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_clip, "FITTED", 16)
    sets = ["steps=6", "batch=4", "checkpoint.every=3", "log.every=1", "eval=[]", "space.count=8", NAMES_ALONE]
    recipe, whole, halves = recipes.load("image/reward-clip", sets), tmp_path / "whole", tmp_path / "halves"
    assert job.run(recipe, whole, device="cpu", quiet=True) == 0
    assert "step 6" in (whole / "report.html").read_text() and (whole / "samples/step-00000006.png").exists()
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints/align-00000006")
    assert job.run(recipe, halves, device="cpu", resume=True, quiet=True) == 0
    one, two = (checkpoint.latest(folder / "checkpoints").tensors for folder in (whole, halves))
    assert one.keys() == two.keys() and [key for key in one if not torch.equal(one[key], two[key])] == []
    assert rows(whole) == rows(halves)
    build = job.open_run(whole, "cpu")
    (path,) = build.piece("space").export(build, tmp_path / "mine", "tower")
    x = reward_clip.style("fluent").batch(torch.arange(6), generator(0, "x", 0), "name")[0]
    made, trained = towers.load(path), build.piece("student")
    assert torch.allclose((made(x) * trained(x)).sum(-1), torch.ones(6), atol=1e-3)  # the head in float16
    assert torch.equal(made.captions(["red apple"]), trained.captions(["red apple"]))
    with pytest.raises(BadInput, match="draws none"):
        build.piece("space").sample(build, ["x"], 0, tmp_path)
    with pytest.raises(BadInput, match="is missing"):
        towers.load(tmp_path / "nowhere.safetensors")


def recall(net: towers.Tower, name: str, indices: tuple[int, ...] = HELD) -> float:
    """R@10."""
    return float((reward_clip.ranks(net, name, indices, 1, generator(0, "bar", 0)) < 10).double().mean())


def test_the_bar_r10_is_ten_times_chance_on_style_and_captions_never_seen(embedded: dict[str, towers.Tower]) -> None:
    chance = 10 / len(HELD)
    assert recall(embedded["a"], "fluent") >= 10 * chance
    assert recall(embedded["a"], "noto") >= 10 * chance
    assert recall(embedded["b"], "fluent") >= 5 * chance  # the judge is of a weaker net: see its LICENSES.md


def test_the_bar_sees_a_head_that_knows_nothing() -> None:
    net = towers.embedded("a")
    net.head.weight.data = net.head.weight[torch.randperm(384, generator=generator(0, "p", 0))]
    assert recall(net, "fluent") < 3 * 10 / len(HELD)


def test_the_metric_reports_both_styles_and_both_kinds_of_captions(
    embedded: dict[str, towers.Tower], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_clip, "seen", lambda: tuple(i for i in range(80) if i not in HELD))
    monkeypatch.setattr(reward_clip, "held_out", lambda: HELD[:40])
    config = recipes.load("image/reward-clip", ["eval.0.count=1"]).eval[0]
    table = list(reward_clip.retrieval(embedded["a"], config))
    assert [(row["style"][:4], row["captions"]) for row in table] == [
        ("noto", "seen"), ("noto", "never seen"), ("flue", "seen"), ("flue", "never seen")
    ]  # fmt: skip
    for row in table:
        assert 0 <= row["R@1"] <= row["R@10"] <= 1 and row["times chance"] == pytest.approx(
            row["R@10"] / row["chance R@10"]
        )
    assert table[3]["choices"] == 40


@pytest.mark.parametrize("model", ["a", "b"])
def test_the_reward_knows_the_right_caption_and_has_a_gradient_that_helps(model: str) -> None:
    judge, pictures = reward(model=model), reward_clip.style("fluent")
    which = torch.tensor(HELD[::20])
    x, names, _ = pictures.batch(which, generator(0, "x", 0), "name")
    right, wrong = judge(x, {"prompt": names}), judge(x, {"prompt": names[1:] + names[:1]})
    assert right.shape == (16,) and right.dtype == torch.float32 and right.abs().max() <= 1
    assert right.mean() > wrong.mean() + 0.05
    assert judge.differentiable and judge.space == "pixels"
    assert torch.allclose(judge(F.interpolate(x, (64, 64)), {"prompt": names}), right, atol=0.15)  # any size
    x = x[:4] * 0.9
    climbed = {}
    for sign in (1, -1):
        moved = x.clone().requires_grad_(True)
        for _ in range(5):
            (gradient,) = torch.autograd.grad(judge(moved, {"prompt": names[1:5]}).sum(), moved)
            step = 0.3 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            moved = (moved + sign * step).detach().requires_grad_(True)
        climbed[sign] = (judge(moved, {"prompt": names[1:5]}) - judge(x, {"prompt": names[1:5]})).detach()
    assert (climbed[1] > 0.05).all() and (climbed[-1] < 0).all()


def test_a_prompt_is_read_once_and_its_bits_do_not_depend_on_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    read, shared = [], sentences()
    plain = shared.encode
    monkeypatch.setattr(shared, "encode", lambda prompts: read.append(len(prompts)) or plain(prompts))
    (alone,) = shared(["a prompt of this test"])
    assert read == [ROWS] and torch.equal(shared(["a prompt of this test"])[0], alone) and len(read) == 1
    for prompt in ("one", "two", "a prompt of this test"):
        shared.known.pop(prompt, None)
    assert torch.equal(shared(["one", "two", "a prompt of this test"])[0][2:], alone)
