"""AccVideo: the set of walks on disk, secants of them as targets, and a head for each time."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from limbeck.core.diffusion.denoiser import FewStep
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.diffusion.process import Flow
from limbeck.core.diffusion.time import shifted
from limbeck.core.distillation import config as settings
from limbeck.core.distillation import trajectory_checks as checks
from limbeck.core.distillation.adversarial import Head
from limbeck.core.distillation.consistency import Leg
from limbeck.core.distillation.shards import Shards
from limbeck.core.distillation.trajectories import Following, KeyAdversary, KeyHeads, Making, Walks, hinge
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player
from limbeck.core.run.rng import Draws
from limbeck.core.run.trainer import Trainer

torch.set_num_threads(1)
CPU = torch.device("cpu")


def context(step: int = 0, batch: int = 8) -> Context:
    return Context(step, "s", Draws(0, step, batch), 1, 0, CPU)


def small(folder=None, count: int = 6, each: int = 2, student: ManyStep | None = None) -> Walks:
    """Walks of the plane's three modes in a folder."""
    made = checks.walks(student)
    fine = made.source.student.but(checks.KEYS * each).grid()
    shards = Shards(folder, {"each": each}) if folder else made.shards
    return replace(made, config=settings.TrajectorySet(count=count, each=each, guidance=1.0), fine=fine, shards=shards)


def counted(made: Walks) -> list[int]:
    """The numbers of the walks that the teacher is asked for from now on."""
    asked: list[int] = []
    walk = made.walk
    made.walk = lambda index: asked.extend(index) or walk(index)  # type: ignore[method-assign,func-returns-value]
    return asked


def test_the_grid_of_shift_seven_has_the_authors_times():
    found = (shifted(5, Flow(), 7.0) * 1000).round().tolist()
    assert found == [1000, 966, 913, 824, 636, 0]
    assert torch.equal(shifted(4, Flow(), 1.0), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_the_stored_states_are_those_of_the_teachers_own_walk_at_the_students_times(tmp_path):
    made = small(tmp_path)
    states, _ = made.states(torch.arange(6))
    assert states.shape == (6, 6, 2) and torch.equal(made.keys, made.source.student.grid())
    whole = ManyStep(made.source.model, made.source.model.denoiser, 10, 1.0)
    noise = torch.stack([made.noise(i) for i in range(6)])
    assert torch.allclose(states[:, 0], noise, atol=2e-3)
    assert torch.allclose(states[:, -1], whole.sample(noise, {}).x, atol=2e-3)
    assert len({tuple(row) for row in noise.tolist()}) == 6


def test_half_precision_costs_little_of_a_velocity():
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    shortest = float(1 - shifted(5, Flow(), 7.0)[1])
    off = {
        d: float((z.to(d).float() - z).square().mean().sqrt() * 2**0.5 / shortest) for d in (torch.half, torch.bfloat16)
    }
    assert off[torch.half] < 0.01 < 0.05 < off[torch.bfloat16] < 0.08


def test_a_set_is_gone_on_with_and_no_walk_is_taken_twice(tmp_path):
    first = small(tmp_path)
    first.states(torch.tensor([0, 1]))
    first.shards.flush()
    (tmp_path / "0123456789abcdef.safetensors").write_bytes(b"cut off before its manifest")
    again = small(tmp_path, count=6)
    asked = counted(again)
    states, _ = again.states(torch.tensor([1, 3, 1, 0, 3]))
    assert asked == [3] and torch.equal(states[1], states[4])
    assert torch.equal(states[[3, 0]], first.states(torch.tensor([0, 1]))[0])
    again.shards.flush()
    other = small(tmp_path, each=4)  # walks of more steps are others
    asked = counted(other)
    other.states(torch.tensor([0]))
    assert asked == [0]


def test_prompts_that_come_again_have_other_seeds(tmp_path):
    made = small(tmp_path)
    made.source.data.prompts = lambda n, gen, rows: ["a", "b", "a", "a", "b", "c"][rows]
    assert made.plan.seeds == [0, 0, 1, 2, 1, 0] and len(set(made.plan.names)) == 6


@pytest.mark.parametrize("what", ["tensors", "names", "manifest"])
def test_a_damaged_shard_is_refused(tmp_path, what):
    made = small(tmp_path)
    made.states(torch.arange(3))
    made.shards.flush()
    tensors, manifest = next(tmp_path.glob("*.safetensors")), next(tmp_path.glob("*.json"))
    if what == "tensors":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif what == "names":
        body = json.loads(manifest.read_text())
        body["names"].reverse()  # other walks under the names of these
        manifest.write_text(json.dumps(body))
    else:
        manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(BadInput, match=r"is damaged .*delete \w+\.json and \w+\.safetensors, and .* made again"):
        small(tmp_path).states(torch.tensor([0]))
    tensors.unlink()
    manifest.unlink()
    assert small(tmp_path).states(torch.tensor([0]))[0].shape == (1, 6, 2)


def test_step_one_makes_every_walk_once_and_trains_nothing(tmp_path):
    made = small(tmp_path)
    asked = counted(made)
    trainer = Trainer(Making(made), Team("cpu"), 0, "walks", 4, 2)
    trainer.run()
    assert asked == list(range(6)) and trainer.state() == {}
    assert len(json.loads(next(tmp_path.glob("*.json")).read_text())["names"]) == 6


def shuffle(rule: Following) -> None:
    """Starts and ends of different walks."""
    inner = rule._leg

    def leg(ctx: Context) -> tuple[Leg, torch.Tensor]:
        found, m = inner(ctx)
        return replace(found, x=found.x.roll(1, 0)), m

    rule._leg = leg  # type: ignore[method-assign]


def tangent(rule: Following) -> None:
    """The teacher's own velocity in place of the secant."""
    teacher = rule.walks.source.model.denoiser
    rule.goal = lambda leg, process: teacher.predict(leg.x, leg.t, leg.cond)


@pytest.mark.parametrize(
    ("fault", "steps", "caught"),
    [(lambda rule: None, 300, []), (shuffle, 60, [0, 2]), (tangent, 60, [0])],
    ids=["right", "shuffled", "tangent"],
)
def test_a_student_of_five_steps_ends_where_fifty_do(fault, steps, caught):
    found = checks.followed(steps, fault)
    assert [i for i, check in enumerate(found) if not check.passed] == caught, found


def test_heads_tell_a_wrong_time_and_not_a_right_student():
    assert all(check.passed for check in checks.told())


class Spy(nn.Module):
    """Heads that keep what they were asked."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.asked = nn.Parameter(torch.ones(())), []

    def forward(self, features, m):
        self.asked.append(features[0])
        return self.gain * features[0].sum(1)


def adversarial(heads: nn.Module, weight: float = 0.1) -> Following:
    student = checks.fresh()
    teacher = checks.model().denoiser
    config = settings.Trajectory(adversary=settings.KeyAdversaryConfig(weight=weight))
    players = [Player(name, net, checks.OPTIM, 10) for name, net in (("student", student), ("heads", heads))]
    return Following(small(count=16, student=student), config, players[0], KeyAdversary(teacher, heads), players[1])


def test_the_heads_see_where_the_step_lands_and_the_state_stored_for_that_time():
    spy = Spy()
    rule, ctx = adversarial(spy), context()
    leg, m = rule.leg(ctx)
    terms = rule.student_terms(ctx)
    rows, _ = rule.walks.states(Draws(0, 0, 8).integers("trajectory.row", 16))
    assert torch.equal(leg.x_next, rows[torch.arange(8), m + 1]) and torch.equal(leg.s, rule.walks.keys[m + 1])
    rule.head_terms(ctx)
    landed, fake, real = spy.asked
    assert torch.equal(landed, fake) and torch.equal(real, leg.x_next)
    one = rule.denoiser.predict(leg.x, leg.t, {})
    assert torch.allclose(landed, leg.x + (Flow(7.0).sigma(leg.s) - Flow(7.0).sigma(leg.t)).float()[:, None] * one.flow)
    assert terms["gan"].item() == pytest.approx(-0.1 * landed.sum(1).mean().item(), rel=1e-5)


def test_the_wish_to_be_taken_for_stored_trains_the_student_and_telling_trains_the_heads():
    rule, ctx = adversarial(KeyHeads([Head([2], 8) for _ in range(checks.KEYS)])), context()
    terms = rule.student_terms(ctx)
    weights = list(rule.player.tensors)
    assert any(g.abs().sum() > 0 for g in torch.autograd.grad(terms["gan"], weights, retain_graph=True))
    asked = [*weights, *rule.heads.tensors]
    found = torch.autograd.grad(rule.head_terms(ctx)["gan"], asked, allow_unused=True)
    assert all(g is None for g in found[: len(weights)]) and any(g is not None for g in found[len(weights) :])


def test_every_time_has_its_own_head_and_the_hinge_is_flat_beyond_one():
    heads = KeyHeads([Head([2], 8) for _ in range(3)])
    features = [torch.randn(4, 2)]
    found = heads(features, torch.tensor([2, 0, 2, 1]))
    assert torch.allclose(found, torch.stack([heads[i](features)[r] for r, i in enumerate((2, 0, 2, 1))]))
    heads(features, torch.tensor([2, 2, 2, 2])).sum().backward()
    assert all(p.grad.abs().sum() == 0 for p in heads[0].parameters())
    assert hinge(torch.tensor([-1.5]), torch.tensor([1.5])) == 0
    assert hinge(torch.tensor([0.5]), torch.tensor([0.25])) == 2.25


def test_two_and_two_steps_are_four_and_missing_walks_are_made(tmp_path):
    def trainer(folder) -> Trainer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            rule = adversarial(KeyHeads([Head([2], 8) for _ in range(checks.KEYS)]))
        rule.walks.shards = Shards(folder, {})
        return Trainer(rule, Team("cpu"), 0, "s", 4, 4)

    whole, first, second = trainer(tmp_path / "a"), trainer(tmp_path / "b"), trainer(tmp_path / "b")
    whole.run()
    first.steps = 2
    first.run()
    second.load({key: value.clone() for key, value in first.state().items()}, 2, {})
    second.run()
    one, two = whole.state(), second.state()
    assert [key for key in one if not torch.equal(one[key], two[key])] == [] and one.keys() == two.keys()


def test_a_student_that_does_not_take_the_walks_steps_is_refused(tmp_path):
    source = checks.walks().source
    build = Build(recipes.load("toy/ring4"), folder=tmp_path)
    wrong = [FewStep(source.model.denoiser, (1.0, 0.5)), ManyStep(source.model, source.model.denoiser, 5, 3.0)]
    for student in wrong:
        with pytest.raises(BadInput, match="set student: .kind: many_step, steps: 5"):
            Walks.of(build, replace(source, student=student), settings.TrajectorySet())
    odd = replace(source.model)
    odd.grid = lambda steps: torch.linspace(1, 0, steps + 1) ** (1 + steps / 10)  # finer grids that miss the coarse one
    with pytest.raises(BadInput, match=r"miss its times; set student\.shift"):
        Walks.of(build, replace(source, student=ManyStep(odd, odd.denoiser, 5, 1.0)), settings.TrajectorySet())
    made = Walks.of(build, replace(source, student=ManyStep(odd, odd.denoiser, 5, 1.0, 7.0)), settings.TrajectorySet())
    assert made.shards.folder == tmp_path / "trajectories"
    assert all(a > b for a, b in itertools.pairwise(made.fine.tolist()))
