"""The shared toy: its pieces, its metric, and every matching method end to end (the checks of `limbeck verify`)."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from limbeck.core.distillation import checks, toy
from limbeck.core.distillation.config import Ring4Teacher
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load

torch.set_num_threads(1)
END_TO_END = ["ring4_swiftbrush", "ring4_dmd2", "ring4_sim", "ring4_f_distill", "ring4_sds"]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_exact_samples_have_the_modes_weights_and_spread():
    x, labels = toy.exact(40000, gen())
    assert (toy.shares(x) - toy.WEIGHTS).abs().max() < 0.01
    assert ((x - toy.MODES[labels]).std(0) - toy.STD).abs().max() < 0.01


def test_the_teacher_is_the_cards_closed_form():
    teacher = toy.Ring4(Ring4Teacher())
    x, s = torch.randn(7, 2, generator=gen(), dtype=torch.float64), 0.9
    t = teacher.process.t_of_ratio(torch.full((7,), s, dtype=torch.float64))
    total = toy.STD**2 + s**2
    r = (toy.WEIGHTS.double().log() - torch.cdist(x, toy.MODES.double()) ** 2 / (2 * total)).softmax(1)
    parts = (toy.STD**2 * x[:, None] + s**2 * toy.MODES.double()) / total
    assert torch.allclose(teacher(x, t, {}), (r[..., None] * parts).sum(1), atol=1e-6)
    raw, features = teacher(x, t, {}, True)
    assert torch.equal(raw, teacher(x, t, {})) and features[0].shape == (7, 5)


def test_energy_distance():
    a, b = toy.exact(4000, gen(0))[0], toy.exact(4000, gen(1))[0]
    assert abs(toy.energy_distance(a, b)) < 0.002
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert toy.energy_distance(points, points + torch.tensor([100.0, 0.0])) > 180
    assert toy.energy_distance(torch.zeros(10, 2), torch.ones(10, 2)) == pytest.approx(2 * 2**0.5, rel=1e-5)
    mean = a.mean(0, keepdim=True) + 0 * a
    assert toy.energy_distance(mean, b) > 0.5  # one point, as SDS ends


def test_prompts_are_the_modes():
    assert toy.encode(["0", "", "3"])["label"].tolist() == [0, -1, 3]
    with pytest.raises(BadInput, match="no mode '7'"):
        toy.encode(["7"])
    batch = toy.Ring4Set().batch(64, gen(), slice(16, 32))
    assert batch.x.shape == (16, 2) and len(batch.prompts) == 16
    nearest = torch.cdist(batch.x, toy.MODES).argmin(1)
    assert (nearest == torch.tensor([int(p) for p in batch.prompts])).float().mean() > 0.9


def test_pictures_samples_and_export(tmp_path):
    build = Build(load("toy/ring4", ["teacher.labels=true"]))
    space = build.piece("space")
    (shown,) = space.show(build, 400, tmp_path)
    assert shown.name == "step-00000400.png" and Image.open(shown).size == (640, 320)
    again = space.show(build, 401, tmp_path)[0]
    assert Image.open(shown).tobytes() == Image.open(again).tobytes()
    for which in ("teacher", "student"):
        (path,) = space.sample(build, ["0", "2"], 0, tmp_path, which=which)
        assert Image.open(path).size == (320, 320)
    (weights,) = space.export(build, tmp_path / "student.safetensors", "safetensors")
    assert set(load_file(weights)) == set(build.piece("student").state_dict())


def test_the_metric_prints_the_floor_beside_the_student():
    build = Build(load("toy/ring4", ["eval.0.count=500"]))
    student, exact = build.piece("eval.0")()
    assert student["samples"] == "student" and exact["samples"] == "exact"
    assert student["energy distance"] > 0.5 > 0.02 > exact["energy distance"]


def test_a_critic_with_a_dead_learning_rate_is_caught():
    """The card's fault: with a critic that does not learn, the student leaves the data."""
    loss = "stages.0.losses.0"
    sets = ["steps=350", f"{loss}.critic.warm=100", f"{loss}.critic.optim.lr=[[0, 1e-3], [99, 1e-3], [100, 0.0]]"]
    assert checks.ring4(*sets, f"{loss}.adversary=null")["energy distance"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", END_TO_END)
def test_ring4_end_to_end(name):
    for check in getattr(checks, name)():
        assert check.passed, f"{check.name}: {check.measured:.4f} against {check.bound}"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "shard"), [("dmd2", "true"), ("f-distill", "false")])
def test_two_processes_equal_one(method, shard, tmp_path, python):
    """The student's and critic's losses after six steps: a head on a sharded critic; a ratio over the global batch."""
    loss = "stages.0.losses.0"
    sets = ["steps=6", "log.every=6", "eval=[]", f"{loss}.kind={method}", f"{loss}.critic.warm=1"]
    found = []
    for name, size, extra in (("one", 1, "false"), ("two", 2, shard)):
        options = [word for item in (*sets, f"distributed.shard={extra}") for word in ("--set", item)]
        python.team(["-m", "limbeck", "run", "toy/ring4", "--out", tmp_path, "--name", name, *options], size)
        found.append(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]))
    for key in ("loss/student", "loss/critic"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-4), key
