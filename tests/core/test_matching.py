"""Matching by composition, on ring4 and a tiny net teacher: who trains when, on what, with which gradient."""

from dataclasses import replace

import pytest
import torch

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Denoiser, FewStep, Model, Preconditioned
from limbeck.core.diffusion.process import EDM, VP, Flow
from limbeck.core.diffusion.time import law
from limbeck.core.distillation import checks
from limbeck.core.distillation.config import CriticConfig, Score, Sim, SwiftBrush, Uniform
from limbeck.core.distillation.critic import Critic, FlatNet
from limbeck.core.distillation.matching import AsdShift, Implicit, Matching, Residual
from limbeck.core.distillation.operators import OPERATORS
from limbeck.core.distillation.source import Source
from limbeck.core.distillation.toy import Ring4Set
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.core.run.rng import Draws
from limbeck.core.run.trainer import Trainer

torch.set_num_threads(1)
CPU = torch.device("cpu")
LOSS = "stages.0.losses.0"
METHODS = ["swiftbrush", "dmd2", "sim", "f-distill", "score"]


def ctx(step=0, batch=16):
    return Context(step, "s", Draws(0, step, batch), 1, 0, CPU)


def build(*sets, batch=16):
    recipe = load("toy/ring4", [*sets, f"batch={batch}", "steps=4", f"{LOSS}.critic.warm=0"])
    made = Build(recipe)
    return made, made.objective(recipe.stages[0])


def trainer(*sets, batch=16):
    made, objective = build(*sets, batch=batch)
    return Trainer(objective, Team("cpu"), 0, "match", 4, batch)


def weights(player):
    return [p.detach().clone() for p in player.tensors]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Counting(Denoiser):
    """A labelled net teacher that counts its forwards."""

    def __init__(self, process=None, kind="eps"):
        super().__init__(process or VP("cosine"), kind)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = FlatNet((2,), 4, 16, 2)
        self.calls, self.seen = 0, []
        self.requires_grad_(False)

    def forward(self, x_t, t, cond, features=False):
        self.calls += 1
        self.seen.append((x_t.detach(), t, cond["label"]))
        raw = self.net(x_t, t, cond)
        return (raw, [raw]) if features else raw


NULL = {"label": torch.tensor([-1.0])}
COND = {"label": torch.arange(16).float() % 4}


def rule(name, **settings):
    teacher = Counting()
    critic = None
    if "critic" in OPERATORS[name].reads:
        model = Model(teacher, (2,), Identity(), lambda p: {}, "net")
        critic = Critic.of(CriticConfig(kind="full"), model, NULL, CPU)
        with torch.no_grad():
            for p in critic.denoiser.parameters():
                p.mul_(1.3)
    shift = AsdShift(0.1, True, 0.02)
    given = {"guidance": 3.0, "critic": critic, "shift": shift, "negative": {"label": torch.tensor([3.0])}} | settings
    return Residual(name, teacher, NULL, OPERATORS[name], law(Uniform(lo=0.02, hi=0.98)), **given)


# --- the rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "f_distill"])
def test_one_forward_of_the_teacher_and_no_gradient_to_it(name):
    one = rule(name)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    one(ctx(), x, COND).backward()
    assert one.teacher.calls == 1
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in one.teacher.parameters())
    assert one.critic is None or all(p.grad is None for p in one.critic.denoiser.parameters())
    assert not any(seen[0].requires_grad for seen in one.teacher.seen)


def test_the_gradient_is_the_operators_residual_times_its_weight():
    one = rule("vsd")
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(one(ctx(), x, COND), x)
    with torch.no_grad():
        t, branches = one.branches(ctx(), x, COND)
        expected = one.teacher.process.sigma(t)[:, None] ** 2 * (branches["teacher"].eps - branches["critic"].eps) / 16
    assert torch.allclose(gradient, expected.float(), atol=1e-7)
    (mean,) = torch.autograd.grad(replace(one, mean=True)(ctx(), x, COND), x)
    assert torch.allclose(2 * mean, gradient, atol=1e-7)


def test_each_sample_has_its_own_t():
    shared = law(Uniform(lo=0.02, hi=0.98), group=16)
    assert len(rule("sds").branches(ctx(), torch.zeros(16, 2), COND)[0].unique()) == 16
    fault = replace(rule("sds"), times=shared)
    assert len(fault.branches(ctx(), torch.zeros(16, 2), COND)[0].unique()) == 1  # what a batch-shared t looks like


def test_asd_asks_at_a_larger_t_with_the_same_noise_without_guidance():
    one = rule("asd")
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    t, branches = one.branches(ctx(), x, COND)
    x_t, times, label = one.teacher.seen[0]
    t2 = times[32:]
    assert torch.equal(times[:16], t) and torch.equal(times[16:32], t)
    assert (t2 >= t).all() and (t2 <= t + 0.1 * (t - 0.02) + 1e-6).all() and (t2 > t).float().mean() > 0.9
    alpha, sigma = one.teacher.process.coefficients(t2, x)
    assert torch.allclose((x_t[32:] - alpha * x) / sigma, branches["eps"], atol=1e-4)
    assert torch.equal(label[32:], COND["label"]) and (label[16:32] == 3).all()  # the negative prompt
    assert torch.allclose(OPERATORS["asd"].on(branches), branches["teacher"].eps - branches["later"].eps)


def test_views_of_a_group_share_both_times_of_asd():
    grouped = AsdShift(0.1, True, 0.02, 4)
    one = replace(rule("asd", shift=grouped), times=law(Uniform(lo=0.02, hi=0.98), 4))
    _, branches = one.branches(ctx(), torch.zeros(16, 2), COND)
    for name in ("teacher", "later"):
        t = branches[name].t.reshape(4, 4)
        assert (t == t[:, :1]).all() and len(t.unique()) == 4


def test_numbers_of_a_loss_move_with_the_step():
    sets = ["teacher.labels=true", f"{LOSS}.kind=score", f"{LOSS}.operator=bsd", f"{LOSS}.t_group=4"]
    _, objective = build(*sets, f"{LOSS}.scale=[[0, 18.0], [100, 2.0]]", f"{LOSS}.shift=[[0, 0.1], [10, 0.3]]")
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    found = [objective.rule(replace_step(step), x, COND) for step in (0, 100)]
    _, plain = build(*sets, f"{LOSS}.scale=2.0")
    assert torch.equal(found[1], plain.rule(replace_step(100), x, COND)) and not torch.equal(*found)
    with pytest.raises(BadInput, match="at most 1"):
        build(*sets, f"{LOSS}.shift=[[0, 0.1], [10, 3.0]]")


def replace_step(step):
    return Context(step, "s", Draws(0, 0, 16), 1, 0, CPU)


def test_two_critics_in_a_stage_are_refused():
    recipe = load("toy/ring4", ["batch=16"])
    stage = recipe.stages[0].model_copy(update={"losses": recipe.stages[0].losses * 2})
    with pytest.raises(BadInput, match="a critic each"):
        Build(recipe).objective(stage)


def test_asd_at_the_end_of_the_process_stays_inside():
    shift = AsdShift(1.0, False, 0.0)
    assert shift(ctx(), "a", torch.tensor([0.9, 0.2]), VP("cosine")).tolist() == pytest.approx([0.999, 0.4])


def test_the_negative_prompt_is_nfsds_third_branch_and_bsds_unconditional_one():
    labels = {name: rule(name) for name in ("nfsd", "bsd", "sds")}
    for one in labels.values():
        one.branches(ctx(), torch.zeros(16, 2), COND)
    assert labels["nfsd"].teacher.seen[0][2][16:].tolist() == [-1.0] * 16 + [3.0] * 16
    assert labels["bsd"].teacher.seen[0][2][16:].tolist() == [3.0] * 16
    assert labels["sds"].teacher.seen[0][2][16:].tolist() == [3.0] * 16


@pytest.mark.parametrize("name", ["sds", "csd", "nfsd", "vsd"])
def test_a_key_without_null_value_is_kept_by_every_branch(name):
    one, seen = rule(name), []
    nets = [one.teacher] + ([one.critic.denoiser] if one.critic else [])
    for net in nets:
        net.register_forward_pre_hook(lambda m, args: seen.append(args[2]["camera"]))
    if one.critic:
        one.critic.config = CriticConfig(guidance="same")
    camera = torch.arange(16.0)
    one.branches(ctx(), torch.zeros(16, 2), COND | {"camera": camera})
    assert len(seen) == len(nets) and all(len(c) > 16 for c in seen)
    assert all(torch.equal(c, camera.repeat(len(c) // 16)) for c in seen)


def test_swiftbrush_guides_teacher_and_critic_alike_and_dmd_does_not():
    same_scale = rule("vsd")
    same_scale.critic.config = CriticConfig(guidance="same")
    plain = rule("vsd")
    for one, branches in ((same_scale, 2), (plain, 1)):
        seen = []
        one.critic.denoiser.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(len(args[0])))
        one.branches(ctx(), torch.zeros(16, 2), COND)
        assert seen == [16 * branches]
    assert SwiftBrush().critic.guidance == "same" and Score().critic is None


def implicit(process=None):
    teacher = Counting(process or EDM(), "x0")
    model = Model(teacher, (2,), Identity(), lambda p: {}, "net")
    critic = Critic.of(CriticConfig(kind="full"), model, NULL, CPU)
    with torch.no_grad():
        for p in critic.denoiser.parameters():
            p.mul_(1.3)
    critic.denoiser.requires_grad_(False)  # the trainer's toggle in the student's phase
    return Implicit("sim", teacher, NULL, law(Uniform(lo=0.2, hi=0.6)), 1.0, critic, 0.5, "one")


def test_sim_goes_through_the_inputs_of_both_nets_and_leaves_their_weights():
    one = implicit()
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (whole,) = torch.autograd.grad(one(ctx(), x, COND), x)
    assert one.teacher.calls == 1 and whole.abs().sum() > 0
    assert all(p.grad is None for p in (*one.teacher.parameters(), *one.critic.denoiser.parameters()))
    for net in (one.teacher, one.critic.denoiser):
        handle = net.register_forward_hook(lambda m, args, out: out.detach())
        (cut,) = torch.autograd.grad(one(ctx(), x, COND), x)
        handle.remove()
        assert (cut - whole).norm() > 0.01 * whole.norm()


def test_sim_has_one_norm_per_sample():
    """Doubling the dimensions by repeating a sample keeps d'(y) a unit vector of the whole sample when c is small."""
    from limbeck.core.diffusion.denoiser import Prediction
    from limbeck.core.distillation.matching import implicit_loss

    y = torch.randn(3, 5, dtype=torch.float64)
    x, t = torch.zeros(3, 5, dtype=torch.float64), torch.full((3,), 0.5)
    teacher, critic = (Prediction(d, x, t, EDM(), "x0") for d in (torch.zeros_like(y), y))
    assert torch.allclose(implicit_loss(x, teacher, critic, 1e-9), -y.norm(dim=1))


# --- order, cadence, sharing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_student_then_critic_on_one_sample(method):
    made, objective = build(f"{LOSS}.kind={method}", *([f"{LOSS}.operator=vsd"] if method == "score" else []))
    context = ctx()
    phases = list(objective.phases(context))
    assert [phase.players for phase in phases] == [("student",), ("critic",)]
    phases[0].loss()
    x, _ = objective.source.sample(context)
    phases[1].loss()
    assert objective.source.sample(context)[0] is x


def test_critic_trains_every_step_and_the_student_every_fifth():
    run = trainer(f"{LOSS}.optim.every=5")
    student, critic = run.objective.players["student"], run.objective.players["critic"]
    moved = []
    for _ in range(7):
        before = weights(student), weights(critic)
        run.one_step()
        moved.append((not same(before[0], weights(student)), not same(before[1], weights(critic))))
    assert moved == [(step % 5 == 0, True) for step in range(7)]


def test_warm_steps_train_the_critic_alone_and_steps_per_repeats_it():
    recipe = load("toy/ring4", ["batch=16", f"{LOSS}.critic.warm=2", f"{LOSS}.critic.steps_per=3"])
    objective = Build(recipe).objective(recipe.stages[0])
    names = [[phase.players[0] for phase in objective.phases(ctx(step))] for step in range(3)]
    assert names == [["critic"] * 3, ["critic"] * 3, ["student"] + ["critic"] * 3]


def test_the_students_phase_leaves_critic_and_head_and_the_critics_phase_leaves_the_student():
    run = trainer()
    student, critic = run.objective.players["student"], run.objective.players["critic"]
    context = ctx()
    phases = run.objective.phases(context)
    run.toggle(("student",))
    sum(next(phases).loss().values()).backward()
    assert all(p.grad is None for p in critic.tensors) and all(p.grad is not None for p in student.tensors)
    student.optim.zero_grad()
    run.toggle(("critic",))
    sum(next(phases).loss().values()).backward()
    assert all(p.grad is None for p in student.tensors) and all(p.grad is not None for p in critic.tensors)


@pytest.mark.parametrize("method", METHODS)
def test_two_losses_share_the_student(method):
    more = ["stages.0.losses.1.kind=score", "stages.0.losses.1.operator=sds", "stages.0.losses.1.weight=0.1"]
    sets = [f"{LOSS}.kind={method}", f"{LOSS}.optim.lr=1e-3", *more]
    if method == "score":
        sets += [f"{LOSS}.operator=vsd"]
    recipe = load("toy/ring4", [*sets, "batch=16"])
    shared = recipe.stages[0].losses[0].optim.model_dump()
    assert shared["lr"] == 1e-3
    for key, value in shared.items():
        text = list(value) if isinstance(value, tuple) else "null" if value is None else value
        sets.append(f"stages.0.losses.1.optim.{key}={text}")
    made, objective = build(*sets)
    first, second = (part.players["student"] for part in objective.objectives)
    assert first is second
    run = Trainer(objective, Team("cpu"), 0, "match", 4, 16)
    run.one_step()
    assert {"student/matching", "student/matching.1"} <= set(run.pending)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "f_distill"])
def test_every_operator_trains_from_the_recipe(name):
    sets = [f"{LOSS}.kind=score", f"{LOSS}.operator={name}", f"{LOSS}.negative='3'", f"{LOSS}.guidance=2.0"]
    run = trainer(*sets, "teacher.labels=true")
    before = weights(run.objective.players["student"])
    run.one_step()
    run.one_step()
    assert not same(before, weights(run.objective.players["student"]))


@pytest.mark.parametrize("name", ["csd", "nfsd", "bsd", "auto_bsd"])
def test_operators_of_the_classifier_direction_refuse_an_unconditional_teacher(name):
    with pytest.raises(BadInput, match="needs a conditional teacher"):
        build(f"{LOSS}.kind=score", f"{LOSS}.operator={name}")


def test_a_wrong_operator_or_scale_is_refused():
    with pytest.raises(BadInput, match='did you mean "vsd"'):
        build(f"{LOSS}.kind=score", f"{LOSS}.operator=vsdd")
    with pytest.raises(BadInput, match="has no scale"):
        build(f"{LOSS}.kind=score", f"{LOSS}.operator=sds", f"{LOSS}.scale=3.0")
    with pytest.raises(BadInput, match="kind: f-distill"):
        build(f"{LOSS}.kind=score", f"{LOSS}.operator=f_distill")
    with pytest.raises(BadInput, match="set `negative`"):
        build(f"{LOSS}.kind=score", f"{LOSS}.operator=nfsd", "teacher.labels=true")
    with pytest.raises(BadInput, match="features"):
        build(f"{LOSS}.kind=f-distill", f"{LOSS}.adversary.features=critic")


def test_groups_and_clamps_that_cannot_be_are_refused():
    with pytest.raises(BadInput, match="t_group: 5"):
        trainer(f"{LOSS}.t_group=5").one_step()
    with pytest.raises(BadInput, match="not below hi"):
        build(f"{LOSS}.kind=f-distill", f"{LOSS}.ratio.lo=30.0")


def test_an_adversary_without_data_is_refused():
    run = trainer("data=null")
    with pytest.raises(BadInput, match="adversary: null"):
        run.one_step()
    trainer("data=null", f"{LOSS}.adversary=null").one_step()


@pytest.mark.parametrize("method", ["dmd2", "f-distill"])
def test_resume_is_bit_for_bit_with_the_ratio_and_the_head(method):
    straight = trainer(f"{LOSS}.kind={method}")
    for _ in range(4):
        straight.one_step()
    half = trainer(f"{LOSS}.kind={method}")
    half.one_step()
    half.one_step()
    state = {key: value.clone() for key, value in half.state().items()}
    again = trainer(f"{LOSS}.kind={method}")
    again.load(state, 2, {})
    again.one_step()
    again.one_step()
    assert set(again.state()) == set(straight.state())
    assert all(torch.equal(value, again.state()[key]) for key, value in straight.state().items())
    assert ("objective/ratio/means" in state) == (method == "f-distill")


def test_defaults_of_a_method_survive_an_override():
    recipe = load("toy/ring4", [f"{LOSS}.kind=swiftbrush", f"{LOSS}.critic.width=8"])
    loss = recipe.stages[0].losses[0]
    assert loss.critic.guidance == "same" and loss.critic.whole_batch and loss.critic.alpha == 108.0
    assert Sim().optim.betas == (0.0, 0.999) and Sim().critic.kind == "full"


# --- several steps --------------------------------------------------------------------------------------------------


class Adds(Denoiser):
    """A student that answers x0 = x_t + 1 and remembers what it was asked."""

    def __init__(self, process):
        super().__init__(process, "x0")
        self.one, self.asked = torch.nn.Parameter(torch.ones(())), []

    def forward(self, x_t, t, cond, features=False):
        self.asked.append((x_t.detach().clone(), t.clone()))
        return x_t + self.one


def few_step(data=None):
    teacher = Model(Counting(Flow()), (2,), Identity(), lambda p: {"label": torch.zeros(len(p))}, "net")
    student = FewStep(Adds(Flow()), (1.0, 0.75, 0.5, 0.25))
    return Source(teacher, student, data, NULL)


def test_backward_simulation_equals_the_renoised_answer_of_the_student():
    ks = set()
    for step in range(12):
        source, context = few_step(), ctx(step)
        x, _ = source.sample(context)
        asked = source.student.denoiser.asked
        k = len(asked) - 1
        ks.add(k)
        draws = Draws(0, step, 16)
        expected = draws.normal("student.noise", (2,))
        for i in range(k):
            t = torch.full((16,), source.student.times[i + 1])
            expected = Flow().add_noise(expected + 1, draws.normal(f"student.renoise{i}", (2,)), t)
        assert torch.allclose(asked[-1][0], expected, atol=1e-6)
        assert (asked[-1][1] == source.student.times[k]).all()  # one k for the whole batch
        assert torch.allclose(x, expected + 1, atol=1e-6)
        (gradient,) = torch.autograd.grad(x.sum(), source.student.denoiser.one)
        assert gradient == x.numel()  # only the last of the k + 1 steps has a graph
    assert ks == {0, 1, 2, 3}


def test_backward_simulation_never_sees_real_data():
    class Forbidden(Ring4Set):
        def batch(self, n, gen, rows):
            raise AssertionError("real data was read")

    with_data, without = few_step(Forbidden()), few_step()
    for step in range(4):
        assert torch.equal(with_data.sample(ctx(step))[0], without.sample(ctx(step))[0])


def test_ranks_share_the_step_and_split_the_batch():
    whole, _ = few_step().sample(ctx(3))
    parts = [Context(3, "s", Draws(0, 3, 16, rank, 2), 2, rank, CPU) for rank in range(2)]
    assert torch.equal(torch.cat([few_step().sample(part)[0] for part in parts]), whole)


def test_a_perfect_net_is_inverted_at_the_terminal_step():
    """SwiftBrush's one-step reading: eps = (z - alpha_T x*)/sigma_T must give x* back, at alpha_T = .0064."""
    target = torch.randn(16, 2, generator=torch.Generator().manual_seed(4))

    class Perfect(Denoiser):
        def forward(self, x_t, t, cond, features=False):
            alpha, sigma = self.process.coefficients(t, x_t)
            return ((x_t.double() - alpha.double() * target) / sigma.double()).double()

    student = FewStep(Perfect(VP("scaled_linear", 1000, 0.00085, 0.012), "eps"), (1.0,))
    assert torch.allclose(student.sample(torch.randn(16, 2), {}).x.float(), target, atol=1e-5)


# --- real nets as teacher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_net_teacher_with_its_own_critic_trains_a_few_step_student(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, own = (Preconditioned(FlatNet((2,), 4, 16, 2), EDM(), 1.6) for _ in range(2))
    labels = lambda p: {"label": torch.tensor([float(x or -1) for x in p])}  # noqa: E731
    teacher = Model(net.requires_grad_(False), (2,), Identity(), labels, "net")
    source = Source(teacher, FewStep(own, (0.6, 0.4)), Ring4Set(), NULL)
    critic = Critic.of(CriticConfig(kind=kind, rank=2), teacher, NULL, CPU)
    times = law(Uniform(lo=0.2, hi=0.6))
    one = Residual("dmd", net, NULL, OPERATORS["dmd"], times, 2.0, critic)
    from limbeck.core.run.config import OptimConfig
    from limbeck.core.run.players import Player

    players = Player("student", source.student, OptimConfig(), 4), Player("critic", critic.denoiser, OptimConfig(), 4)
    matching = Matching(source, one, players[0], critic, players[1])
    before = weights(players[0]), weights(players[1]), [p.clone() for p in net.parameters()]
    run = Trainer(matching, Team("cpu"), 0, "s", 4, 16)
    run.run()
    assert not same(before[1], weights(players[1])) and same(before[2], list(net.parameters()))
    assert not same(before[0], weights(players[0]))


def test_flipped_sign_diverges_on_ring4():
    """The end-to-end test of the sign: steps in the wrong direction leave the plane's centre for good."""
    sets = ["steps=1", f"{LOSS}.critic.warm=0", f"{LOSS}.adversary=null", f"{LOSS}.optim.lr=1e-2"]
    made, run = checks.train_ring4(*sets)
    objective = run.objective
    right = objective.rule
    objective.rule = lambda c, x, cond: -right(c, x, cond)
    for _ in range(150):
        run.one_step()
    assert checks.draw(made, 500, 0).abs().mean() > 5


# --- pictures: a diffusers net as teacher, its copy as student ------------------------------------------------------


class Pictures:
    """Random pictures with prompts."""

    def prompts(self, n, gen, rows):
        return ["red", "blue"] * (n // 2)

    def batch(self, n, gen, rows):
        from limbeck.core.run.build import Batch

        return Batch(torch.randn(n, 3, 8, 8, generator=gen)[rows], self.prompts(n, gen, rows))


def unet_build(critic):
    """What a recipe with a small diffusers teacher builds, without a domain."""
    import copy

    from diffusers import UNet2DConditionModel

    from limbeck.core.diffusion.denoiser import Network
    from limbeck.core.run import registry as pieces_of
    from limbeck.core.run.players import Player

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            8, 3, 3, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=4, norm_num_groups=4,
            attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    call = lambda net, x, time, cond: net(x, time, cond["text"], return_dict=False)[0]  # noqa: E731
    denoiser = Network(unet, Flow(), "flow", call, 1000.0, taps=("mid_block",))
    words = {"": 0.0, "red": 1.0, "blue": -1.0}
    encode = lambda prompts: {"text": torch.tensor([words[p] for p in prompts])[:, None, None].expand(-1, 2, 4)}  # noqa: E731
    model = Model(denoiser, (3, 8, 8), Identity(), encode, "unet")
    pieces = {"teacher": model, "student": FewStep(copy.deepcopy(denoiser), (0.99, 0.5)), "data": Pictures()}

    class Made:
        recipe = type("R", (), pieces)()
        device, players = CPU, {}
        registry = pieces_of.registry()

        def piece(self, slot):
            return pieces[slot]

        def has(self, slot):
            return slot in pieces

        def player(self, name, params, config):
            return self.players.setdefault(name, Player(name, params, config, 4))

    return Made()


@pytest.mark.parametrize("critic", ["lora", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_diffusers_net(method, critic):
    from limbeck.core.distillation import config, matching

    kinds = {"swiftbrush": config.SwiftBrush, "dmd2": config.Dmd2, "sim": config.Sim, "f-distill": config.FDistill}
    made = unet_build(critic)
    if method == "score":
        asked = config.Score(operator="vsd", critic={"kind": critic, "rank": 2})
        objective = matching.build_score(asked, made)
    else:
        asked = kinds[method](critic={"kind": critic, "rank": 2}, guidance=2.0)
        factory = matching.build_sim if method == "sim" else matching.build_residual
        objective = factory(asked, made)
    teacher = made.piece("teacher").denoiser
    before = [p.clone() for p in teacher.parameters()]
    moving = {name: weights(player) for name, player in objective.players.items()}
    run = Trainer(objective, Team("cpu"), 0, "s", 2, 4)
    run.run()
    assert same(before, list(teacher.parameters())) and all(p.grad is None for p in teacher.parameters())
    assert all(not same(moving[name], weights(player)) for name, player in objective.players.items())
