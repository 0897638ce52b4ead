"""Consistency distillation: boundary, target, guidance, motion maps; faults planted against the exact map."""

import copy
from dataclasses import replace

import pytest
import torch

from limbeck.core.diffusion.checks import gm1d
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Denoiser, FewStep, Model, Network
from limbeck.core.diffusion.mixture import cdf_map
from limbeck.core.diffusion.process import EDM, VP, Flow
from limbeck.core.diffusion.sampling import euler, heun, times
from limbeck.core.distillation import config, consistency, path_checks
from limbeck.core.distillation.consistency import (
    Boundary,
    Consistency,
    Consistent,
    Followed,
    Shadow,
    distance,
)
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


class Told(Denoiser):
    """A small net on clips that reads its prompt and, where there is one, a guidance scale; remembers its questions."""

    def __init__(self, process=None, seed=0):
        super().__init__(process or Flow(), "flow")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.mix = torch.nn.Conv3d(3, 3, 3, padding=1)
        self.asked = []

    def forward(self, x_t, t, cond, features=False):
        self.asked.append((t.clone(), dict(cond)))
        shift = cond["text"] + 0.1 * cond.get("guidance", torch.zeros(len(x_t)))
        return self.mix(x_t.float()).to(x_t) + (shift + t).view(-1, 1, 1, 1, 1).to(x_t)


def encode(prompts):
    return {"text": torch.tensor([float(len(p)) for p in prompts])}


class Clips:
    """Random clips with prompts."""

    def prompts(self, n, gen, rows):
        return (["a", "bc"] * n)[:n][rows]

    def batch(self, n, gen, rows):
        return Batch(torch.randn(n, *CLIP, generator=gen)[rows], self.prompts(n, gen, rows))


def clip_rule(guidance=3.0, target=None, **changes):
    """The rule on clips with a teacher net and a student copied from it."""
    teacher = Told().requires_grad_(False)
    student = Consistent(Told(), (1.0,), Boundary(scaling=10.0))
    player = Player("student", student, OptimConfig(lr=1e-2), 4)
    shadow = None if target is None else Shadow(player, target)
    rule = Consistency("c", student, teacher, encode([""]), times(5, Flow()), euler(), guidance, 1e-3)
    return replace(rule, **({"target": shadow.on} if shadow else {}), **changes), player, shadow


# --- the checks, and the faults they catch --------------------------------------------------------------------------


@pytest.mark.parametrize("check", [path_checks.boundary, path_checks.guidance])
def test_closed_forms_hold(check):
    assert all(one.passed for one in check())


def test_a_map_without_the_boundary_condition_is_seen():
    assert not path_checks.boundary(lambda x, t, x0, t_min: x0)[0].passed
    unshifted = lambda x, t, x0, t_min: Boundary()(x, t, x0, -t_min)  # noqa: E731
    assert not path_checks.boundary(unshifted)[0].passed


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_the_w_of_the_papers_taken_for_g_is_seen(scale):
    assert not path_checks.guidance(scale)[0].passed


def boundless(rule):
    rule.student.boundary = lambda x, t, x0, t_min: x0


def later(rule):
    """The target asked at a time above t."""
    plain = rule.leg
    rule.leg = lambda *given: (lambda leg: replace(leg, s=(leg.t + 1 / 16).clamp(max=0.999)))(plain(*given))


def test_one_step_of_the_student_is_near_the_exact_map_and_that_of_the_teacher_is_not():
    found = path_checks.map_error(*path_checks.consistency(600, 16))
    assert found < 0.3
    assert path_checks.end_point_rmse(path_checks.ddim(), 1) > 0.9


@pytest.mark.parametrize("fault", [boundless, later])
def test_faults_end_far_from_the_exact_map(fault):
    assert path_checks.map_error(*path_checks.consistency(300, 16, fault)) > 0.8  # .5 without a fault


# --- the target -----------------------------------------------------------------------------------------------------


def gradients(rule, target=None):
    """The loss's gradient; with `target` that of the same loss against this constant."""
    rule.student.zero_grad()
    if target is not None:
        rule = replace(rule)
        rule.goal = lambda leg: target
    x0 = randn(8, *CLIP)
    rule(ctx(), x0, encode(["a"] * 8)).backward()
    return torch.cat([p.grad.flatten() for p in rule.student.parameters()])


def test_nothing_flows_back_through_the_target_and_a_missing_stop_is_seen():
    rule, _, _ = clip_rule()
    x0 = randn(8, *CLIP)
    target = rule.goal(rule.leg(ctx(), x0, encode(["a"] * 8)))
    assert not target.requires_grad
    fixed = gradients(rule, target)
    assert torch.equal(gradients(rule), fixed)
    leaky = replace(rule)
    leaky.goal = lambda leg: rule.student.denoise(leg.x_next, leg.s, leg.cond).x0
    assert not torch.allclose(gradients(leaky), fixed, rtol=0.01)


def test_the_target_is_the_average_of_the_weights_after_each_update():
    rule, player, shadow = clip_rule(target=0.9)
    objective = Followed("c", lambda c: rule(c, randn(8, *CLIP, seed=c.step), encode(["a"] * 8)), player, shadow)
    run = Trainer(objective, Team("cpu"), 0, "s", 4, 8)
    expected = {n: p.detach().clone() for n, p in player.params.items()}
    for _ in range(3):
        run.one_step()
        expected = {n: 0.9 * w + 0.1 * player.params[n].detach() for n, w in expected.items()}
    assert all(torch.allclose(shadow.weights[n], w, atol=1e-6) for n, w in expected.items())
    before = [p.detach().clone() for p in player.tensors]
    with pytest.raises(KeyError), shadow.on():
        assert torch.equal(player.tensors[0], shadow.weights[next(iter(player.params))])
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, player.tensors, strict=True))
    # the target of a step is said with the shadow's weights
    leg = rule.leg(ctx(9), randn(8, *CLIP), encode(["a"] * 8))
    own = copy.deepcopy(rule.student)
    own.load_state_dict(shadow.weights)
    assert torch.equal(rule.goal(leg), own.denoise(leg.x_next, leg.s, leg.cond).x0.detach())


def test_a_resume_has_the_same_target():
    def trainer():
        rule, player, shadow = clip_rule(target=0.9)
        loss = lambda c: rule(c, randn(8, *CLIP, seed=c.step), encode(["a"] * 8))  # noqa: E731
        return Trainer(Followed("c", loss, player, shadow), Team("cpu"), 0, "s", 4, 8)

    whole, half, again = trainer(), trainer(), trainer()
    for _ in range(4):
        whole.one_step()
    for _ in range(2):
        half.one_step()
    again.load({key: value.clone() for key, value in half.state().items()}, 2, {})
    for _ in range(2):
        again.one_step()
    assert "objective/shadow/denoiser.mix.weight" in half.state()
    assert all(torch.equal(value, again.state()[key]) for key, value in whole.state().items())


# --- legs, guidance, motion -----------------------------------------------------------------------------------------


def test_a_leg_is_one_interval_towards_the_data_with_one_t_per_sample():
    rule, _, _ = clip_rule()
    legs = [rule.leg(ctx(step), randn(8, *CLIP), encode(["a"] * 8)) for step in range(8)]
    assert all((leg.s < leg.t).all() and torch.allclose(leg.t - leg.s, torch.tensor(0.2)) for leg in legs)
    seen = torch.cat([leg.t for leg in legs])
    assert set(seen.tolist()) == set(rule.times[:-1].tolist()) and len(legs[0].t) == 8
    last = [i for i, leg in enumerate(legs) if (leg.s == 0).any()]
    leg = legs[last[0]]
    assert torch.equal(rule.goal(leg)[leg.s == 0], leg.x_next[leg.s == 0])  # the end says itself
    parts = [rule.leg(ctx(3, 8, rank, 2), randn(8, *CLIP)[rank * 4 :][:4], encode(["a"] * 4)) for rank in (0, 1)]
    assert torch.equal(torch.cat([p.x for p in parts]), legs[3].x)


def test_a_drawn_scale_guides_the_teacher_and_is_told_to_the_student():
    rule, _, _ = clip_rule(2.0, guidance_to=6.0)
    cond, x0 = encode(["a", "bc"] * 4), randn(8, *CLIP)
    leg = rule.leg(ctx(), x0, cond)
    scale = leg.cond["guidance"]
    assert len(scale.unique()) == 8 and (2 <= scale).all() and (scale <= 6).all()
    assert all("guidance" not in asked for _, asked in rule.teacher.asked)  # it has two branches instead
    rows = [rule.advanced(leg.x[i : i + 1], leg.t[i : i + 1], leg.s[i : i + 1],
                          {"text": cond["text"][i : i + 1]}, float(scale[i])) for i in range(8)]  # fmt: skip
    assert torch.allclose(torch.cat([row.x_next for row in rows]), leg.x_next, atol=1e-5)
    rule(ctx(1), x0, cond)
    (_, goal), (_, own) = rule.student.denoiser.asked[-2:]
    assert torch.equal(goal["guidance"], own["guidance"])


def test_a_teacher_that_takes_the_scale_as_an_input_is_asked_once_with_it():
    rule, _, _ = clip_rule(2.0, guidance_to=6.0, null={"text": torch.zeros(1), "guidance": torch.ones(1)})
    leg = rule.leg(ctx(), randn(8, *CLIP), encode(["a"] * 8) | {"guidance": torch.ones(8)})
    (_, asked), *more = rule.teacher.asked
    assert not more and torch.equal(asked["guidance"], leg.cond["guidance"])


def test_a_scale_input_learns_the_line_of_the_closed_form():
    """Two classes of one deviation: the end of a guided path is affine in g with slope m_c - m_u = 1.3."""
    teacher, null = path_checks.two_normals(), {"label": torch.tensor([0])}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 1)

    def call(net, x, t, cond):
        g = cond["guidance"][:, None]
        return net(torch.cat([x, x * t[:, None], g, g * t[:, None]], 1))

    student = Consistent(Network(layer, teacher.process, "x0", call), (0.999,), Boundary(scaling=10.0))
    player = Player("student", student, OptimConfig(kind="adam", lr=3e-2, decay="linear", clip=None), 500)
    rule = Consistency("c", student, teacher, null, times(8, teacher.process), euler(),
                       1.0, None, 5.0)  # fmt: skip
    label = {"label": torch.ones(128, dtype=torch.long)}
    data = lambda c: teacher.sample(128, c.draws.gen("data"), label)  # noqa: E731
    Trainer(Followed("c", lambda c: rule(c, data(c), label), player), Team("cpu"), 0, "s", 500, 128).run()
    ends = [student.sample(torch.zeros(1, 1), {"guidance": torch.tensor([g])}).x.item() for g in (1.0, 3.0, 5.0)]
    slopes = [(b - a) / 2 for a, b in zip(ends, ends[1:], strict=False)]
    assert slopes == pytest.approx([1.3, 1.3], abs=0.25)


def test_the_motion_map_is_all_that_is_compared():
    """Frame differences do not see what is added to every frame; the raw clip does."""
    motion = lambda x: x[:, :, 1:] - x[:, :, :-1]  # noqa: E731
    x0, cond, still = randn(8, *CLIP), encode(["a"] * 8), randn(8, 3, 1, 6, 6, seed=5)
    for m, blind in ((motion, True), (lambda x: x, False)):
        rule, _, _ = clip_rule(motion=m)
        plain = rule(ctx(), x0, cond)
        moved, said = replace(rule), rule.student.denoise
        goal = rule.goal(rule.leg(ctx(), x0, cond))
        moved.goal = lambda leg, goal=goal: goal
        rule.student.denoise = lambda *given, said=said: (lambda p: p.replace(p.x0 + still))(said(*given))
        changed = moved(ctx(), x0, cond)
        assert torch.allclose(plain, changed, atol=1e-6) == blind


def test_distances_are_per_sample_means():
    a, b = randn(4, 3, 5).double(), randn(4, 3, 5, seed=1).double()
    error = (a - b).flatten(1)
    assert torch.allclose(distance(a, b, None).double(), error.square().mean(1), atol=1e-6)
    assert torch.allclose(distance(a, b, 0.5).double(), ((error**2 + 0.25).sqrt() - 0.5).mean(1), atol=1e-6)


def test_heun_steps_are_nearer_to_the_exact_path():
    teacher = gm1d()
    rule = Consistency("c", Consistent(teacher, (0.999,), Boundary()), teacher, {}, times(8, teacher.process), euler(),
                       1.0, None)  # fmt: skip
    x, t, s = randn(200, 1).double(), torch.full((200,), 0.6).double(), torch.full((200,), 0.4).double()
    exact = cdf_map(teacher, x[:, 0], t, s)[:, None]
    errors = []
    for solver in (euler(), heun()):
        rule.solver = solver
        errors.append(float((rule.advanced(x, t, s, {}, 1.0).x_next - exact).square().mean().sqrt()))
    assert errors[1] < 0.3 * errors[0]


# --- student and factory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [VP("scaled_linear"), EDM(), Flow()], ids=lambda p: type(p).__name__)
def test_the_student_says_x_at_0_and_samples_in_several_steps_with_its_map(process):
    student = Consistent(Told(process), (0.8, 0.4), Boundary(scaling=10.0))
    x, cond = randn(2, *CLIP), encode(["a", "b"])
    assert torch.equal(student.denoise(x, torch.zeros(2), cond).x0, x)
    renoise = randn(2, *CLIP, seed=1)
    first = student.denoise(process.start(x, torch.full((2,), 0.8)), torch.full((2,), 0.8), cond).x0
    second = student.denoise(process.add_noise(first, renoise, torch.full((2,), 0.4)), torch.full((2,), 0.4), cond).x0
    assert torch.equal(student.sample(x, cond, [renoise]).x, second)
    plain = FewStep(student.denoiser, (0.8, 0.4)).sample(x, cond, [renoise]).x
    assert not torch.allclose(plain, second, atol=1e-4)  # a wide boundary matters to the sampler too


class Made:
    """The few attributes of a Build that the factories read."""

    def __init__(self, student):
        model = Model(Told(), CLIP, Identity(), encode, "clips")
        self.pieces = {"teacher": model, "student": student, "data": Clips()}
        self.recipe = type("R", (), {**self.pieces, "batch": 8})()
        self.device, self.parts = CPU, {"few": FewStep(Told(), (1.0,)), "other": torch.nn.Linear(1, 1)}

    def piece(self, slot):
        return self.pieces[slot]

    def has(self, slot):
        return slot in self.pieces

    def part(self, kind, asked):
        return self.parts[asked.kind]

    def player(self, name, params, optim):
        return Player(name, params, optim, 4)


@pytest.mark.parametrize("target", [0.95, None])
def test_the_objective_trains_clips_unchanged(target):
    of = type("Of", (), {"kind": "few"})()
    asked = type("Asked", (), {"of": of, "scaling": 4e3, "sigma_data": 0.5})()
    made = Made(None)
    made.pieces["student"] = made.recipe.student = consistency.build_student(asked, made)
    objective = consistency.build(config.Consistency(intervals=4, target=target, optim={"lr": 1e-3}), made)
    before = [p.detach().clone() for p in objective.player.tensors]
    Trainer(objective, Team("cpu"), 0, "s", 2, 8).run()
    assert not any(torch.equal(a, b) for a, b in zip(before, objective.player.tensors, strict=True))
    assert all(p.grad is None for p in made.pieces["teacher"].denoiser.parameters())
    assert bool(objective.state()) == (target is not None)


def test_what_cannot_be_is_refused():
    recipe = load("toy/ring4", ["stages.0.losses.0.kind=consistency", "batch=8"])
    with pytest.raises(BadInput, match=r"set student: \{kind: consistency, of: "):
        Build(recipe).objective(recipe.stages[0])
    nested = load("toy/ring4", ["student={kind: consistency, of: {kind: toy.mlp}}"])
    with pytest.raises(BadInput, match="toy.mlp is no few-step student"):
        Build(nested).piece("student")
    words = load("toy/words", ["stages.0.losses=[{kind: consistency}]"])
    with pytest.raises(BadInput, match="model of tokens"):
        Build(words).objective(words.stages[0])
