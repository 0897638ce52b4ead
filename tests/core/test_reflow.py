"""Progressive distillation and reflow: their pieces of paths, and faults planted against exact answers."""

from contextlib import nullcontext

import pytest
import torch

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Denoiser, Model, Prediction
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.diffusion.mixture import DataSet
from limbeck.core.diffusion.process import EDM, VP, Flow
from limbeck.core.diffusion.sampling import ddim, ddim_jump, times, trajectory
from limbeck.core.diffusion.time import law
from limbeck.core.distillation import config, path_checks, reflow
from limbeck.core.distillation.consistency import Followed, Leg, Shadow
from limbeck.core.distillation.reflow import Halving, Regression, Straight, secant, straightness, two_steps
from limbeck.core.distillation.source import Source
from limbeck.core.run.build import Batch, Build
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player
from limbeck.core.run.recipe import load
from limbeck.core.run.rng import Draws
from limbeck.core.run.trainer import Trainer

torch.set_num_threads(1)
CPU = torch.device("cpu")
CLIP = (3, 4, 6, 6)  # channels, frames, height, width


def ctx(step=0, batch=8, rank=0, world=1):
    return Context(step, "s", Draws(0, step, batch, rank, world), world, rank, CPU)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(Denoiser):
    """A small net on clips that reads its prompt."""

    def __init__(self, process=None):
        super().__init__(process or Flow(), "flow")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mix = torch.nn.Conv3d(3, 3, 3, padding=1)

    def forward(self, x_t, t, cond, features=False):
        return self.mix(x_t) + (cond["text"] + t).view(-1, 1, 1, 1, 1)


def encode(prompts):
    return {"text": torch.tensor([float(len(p)) for p in prompts])}


class Clips:
    """Random clips with prompts."""

    def prompts(self, n, gen, rows):
        drawn = torch.randint(3, (n,), generator=gen).tolist()
        return ["a" * k for k in drawn][rows]

    def batch(self, n, gen, rows):
        return Batch(torch.randn(n, *CLIP, generator=gen)[rows], self.prompts(n, gen, rows))


def clips(process=None):
    """Teacher net, a student copied from it under its own sampler, and data."""
    model = Model(Net(process).requires_grad_(False), CLIP, Identity(), encode, "clips")
    student = ManyStep(model, Net(process), 2, 1.0)
    return Source(model, student, Clips(), encode([""]))


# --- the checks, and the faults they catch --------------------------------------------------------------------------


@pytest.mark.parametrize("check", [path_checks.halving, path_checks.secants])
def test_closed_forms_hold(check):
    assert all(one.passed for one in check())


def tangent(leg, process):
    """What the exact teacher says at the leg's start."""
    teacher = path_checks.three_modes() if leg.x.shape[1] == 2 else path_checks.line(process).denoiser
    return teacher.predict(leg.x, leg.t, {})


def second_answer(leg, process):
    """x_next taken for the answer, wherever the leg ends."""
    return Prediction(leg.x_next, leg.x, leg.t, process, "x0")


@pytest.mark.parametrize("wrong", [tangent, second_answer])
def test_tangents_and_later_states_are_no_secants(wrong):
    assert not path_checks.halving(wrong)[0].passed and path_checks.halving(wrong)[0].measured > 1e-3
    replay, plain = path_checks.secants(wrong)
    assert not replay.passed
    if wrong is tangent:  # at best what plain Euler does
        assert replay.measured > 0.5 * plain.measured


def test_noise_of_another_end_does_not_replay():
    assert path_checks.secants(shuffled=True)[0].measured > 0.3


def shuffled(legs):
    plain = legs.pairs
    legs.pairs = lambda given: (lambda z, x0, cond: (z.roll(1, 0), x0, cond))(*plain(given))


def test_reflow_is_straight_and_ends_where_the_exact_map_does():
    one, eight, straight = path_checks.reflow_map(400, 1024)
    assert one.measured < 0.2 and eight.measured < 0.2 and straight.passed


def test_noise_and_ends_that_do_not_belong_together_give_the_mean():
    model, student = path_checks.reflow(400, 1024, shuffled)
    assert path_checks.map_error(model, student) > 0.6


def test_halving_down_to_one_step_keeps_the_end():
    found = path_checks.progressive(400, 60)
    assert found[1] < 0.3 and max(found[b] - found[a] for a, b in ((8, 4), (4, 2), (2, 1))) < 0.03


def test_a_tangent_target_loses_the_end():
    found = path_checks.progressive(150, 50, tangent)
    assert found[1] > 0.6  # the teacher's own one step: the mean


# --- pieces of paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [VP("cosine"), VP("scaled_linear"), EDM(), Flow(3.0)], ids=lambda p: str(p)[:12])
def test_a_secant_lands_and_at_the_end_is_the_end(process):
    t, s = torch.full((8,), 0.6).double(), torch.full((8,), 0.35).double()
    x, x_next = randn(8, *CLIP).double(), randn(8, *CLIP, seed=1).double()
    found = secant(Leg(x, t, x_next, s, {}), process)
    assert torch.allclose(ddim_jump(x, t, s, found.x0, process), x_next, atol=1e-9)
    assert torch.equal(secant(Leg(x, t, x_next, torch.zeros(8), {}), process).x0, x_next)
    if isinstance(process, Flow):
        slope = (x_next - x) / (process.sigma(s) - process.sigma(t)).view(-1, 1, 1, 1, 1)
        assert torch.allclose(found.flow, slope)


def test_halving_takes_two_steps_of_the_guided_student_as_it_began():
    source = clips()
    own, player = source.student.denoiser, Player("student", source.student, OptimConfig(lr=0.1), 4)
    shadow = Shadow(player)
    legs = Halving("p", source, own, source.model.grid(4), 3.0, shadow.on)
    objective = Followed("p", Regression(own, legs, config.Progressive()), player, shadow)
    run = Trainer(objective, Team("cpu"), 0, "s", 4, 8)
    run.one_step()
    run.one_step()
    leg = legs(ctx(5))
    walker = reflow.guided_teacher(source.model.denoiser, source.null, 3.0)  # the student began as the teacher
    with torch.no_grad():
        expected = two_steps(walker, leg.x, leg.t, leg.s, leg.cond)
    assert torch.equal(leg.x_next, expected) and torch.allclose(leg.t - leg.s, torch.tensor(0.25))
    moving = Halving("p", source, own, source.model.grid(4), 3.0, nullcontext)(ctx(5))  # a teacher that follows
    assert not torch.allclose(moving.x_next, expected, atol=1e-3)
    again = Shadow(player)
    again.load({key: value.clone() for key, value in shadow.state().items()})
    resumed = Halving("p", source, own, source.model.grid(4), 3.0, again.on)(ctx(5))
    assert torch.equal(resumed.x_next, expected)


def straight(batches=None, process=None):
    source = clips(process)
    return Straight("r", source, law(config.FULL), config.Pairing(steps=3, guidance=2.0), batches)


@pytest.mark.parametrize("process", [VP("cosine"), EDM(), Flow()], ids=lambda p: type(p).__name__)
def test_a_line_goes_from_where_the_walk_starts_to_where_it_ends(process):
    legs = straight(process=process)
    z, x0, cond = legs.pairs(ctx())
    model, source = legs.source.model, legs.source
    grid = model.grid(3)
    t = grid[0].expand(8)
    start = x = process.add_noise(x0, z, t)
    drawn = Draws(0, 0, 8).normal("r.noise", CLIP)
    assert torch.allclose(start, process.start(drawn, t), atol=1e-5, rtol=1e-5)
    for step in trajectory(reflow.guided_teacher(model.denoiser, source.null, 2.0), ddim(), x, grid, cond):
        x = step.x_next.detach()
    assert torch.allclose(x, x0, atol=1e-4, rtol=1e-4)
    leg = legs(ctx())
    assert torch.equal(leg.x, process.add_noise(x0, z, leg.t)) and torch.equal(leg.x_next, x0)
    assert (leg.s == 0).all() and len(leg.t.unique()) == 8


def test_kept_pairs_are_made_once_and_again_the_same_after_a_resume():
    legs = straight(batches=2)
    made = [legs.pairs(ctx(step)) for step in range(4)]
    assert made[2] is made[0] and made[3] is made[1] and not torch.equal(made[0][1], made[1][1])
    assert not torch.equal(legs(ctx(0)).t, legs(ctx(2)).t)  # the times are fresh
    late = straight(batches=2)
    assert torch.equal(late.pairs(ctx(3))[1], made[1][1])
    assert torch.equal(late.pairs(ctx(3))[2]["text"], made[1][2]["text"])
    fresh = straight()
    assert not torch.equal(fresh.pairs(ctx(2))[1], fresh.pairs(ctx(0))[1]) and not fresh.kept
    parts = [straight().pairs(ctx(3, 8, rank, 2)) for rank in (0, 1)]
    assert torch.allclose(torch.cat([p[1] for p in parts]), fresh.pairs(ctx(3))[1], atol=1e-5)


def test_straightness_is_0_for_one_point_and_large_for_a_mixture():
    one = DataSet(torch.ones(1, 2), Flow())
    x = randn(64, 2)
    assert straightness(one, x, times(10, Flow())) < 1e-9
    mixture = path_checks.line(Flow()).denoiser
    assert straightness(mixture, randn(64, 1), times(10, Flow())) > 0.1


# --- factories ------------------------------------------------------------------------------------------------------


class Made:
    """The few attributes of a Build that the factories read."""

    def __init__(self, source):
        self.pieces = {"teacher": source.model, "student": source.student, "data": source.data}
        self.recipe = type("R", (), {**self.pieces, "batch": 8})()
        self.device = CPU

    def piece(self, slot):
        return self.pieces[slot]

    def has(self, slot):
        return slot in self.pieces

    def player(self, name, params, optim):
        return Player(name, params, optim, 4)


@pytest.mark.parametrize(
    ("factory", "asked"),
    [
        (reflow.build_progressive, config.Progressive(steps=2, guidance=2.0)),
        (reflow.build_reflow, config.Reflow(walk=config.Pairing(steps=2), pairs=12)),
    ],
)
def test_the_objectives_train_clips_unchanged(factory, asked):
    source = clips()
    objective = factory(asked, Made(source))
    before = [p.detach().clone() for p in objective.player.tensors]
    Trainer(objective, Team("cpu"), 0, "s", 3, 8).run()
    assert not any(torch.equal(a, b) for a, b in zip(before, objective.player.tensors, strict=True))
    assert all(p.grad is None for p in source.model.denoiser.parameters())
    if factory is reflow.build_reflow:
        assert objective.loss.legs.batches == 2 and sorted(objective.loss.legs.kept) == [(0, 0), (1, 0)]
    else:
        kept = objective.state()["shadow/denoiser.mix.weight"]
        assert torch.equal(kept, before[0])


@pytest.mark.parametrize("kind", ["progressive", "reflow"])
def test_what_has_no_path_is_refused(kind):
    recipe = load("toy/ring4", [f"stages.0.losses.0.kind={kind}", "batch=8"])
    with pytest.raises(BadInput, match="the student is none"):
        Build(recipe).objective(recipe.stages[0])
    words = load("toy/words", [f"stages.0.losses=[{{kind: {kind}}}]"])
    with pytest.raises(BadInput, match="model of tokens"):
        Build(words).objective(words.stages[0])
