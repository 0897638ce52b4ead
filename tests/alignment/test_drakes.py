"""DRAKES on letters and words with known answers; the known faults of published code, planted and seen caught."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from limbeck.core.alignment import backprop, config, drakes_checks, relaxed
from limbeck.core.diffusion.discrete import MaskProcess, TokenKernel, argmax_rows, first_hitting, soft_rows
from limbeck.core.diffusion.sampling import mask
from limbeck.core.rewards.toy import LENGTH, MASK, VOCAB, Shifted, Words, Writer, soft_letters
from limbeck.core.run.build import Build
from limbeck.core.run.context import Context
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import of
from limbeck.core.run.rng import Draws, generator
from limbeck.core.run.trainer import Trainer

CPU = torch.device("cpu")
TIMES = torch.linspace(1, 0, 9)


def context(step: int = 0, batch: int = 32) -> Context:
    return Context(step, "s", Draws(0, step, batch), 1, 0, CPU)


def failed(checks) -> list[str]:
    return [check.name for check in checks if not check.passed]


def words(writer: Writer | None = None):
    """A tuning of words, from a writer that is not its teacher."""
    return drakes_checks.tuning(writer or drakes_checks.perturbed(), Words().teacher(), soft_letters(), LENGTH)


def gradient(made, terms: dict[str, Tensor]) -> Tensor:
    found = torch.autograd.grad(sum(terms.values()), made.player.tensors, allow_unused=True)
    return torch.cat([torch.zeros(1) if g is None else g.flatten() for g in found])


def soft_walk(last: int, kl_steps: str = "last", n: int = 64):
    """The steps of a walk of eight."""
    settings = config.Drakes(last=last, kl_steps=kl_steps)
    x, gen = torch.full((n, LENGTH), MASK), generator(0, "walk", 0)
    return list(relaxed.walk(context(), settings, drakes_checks.perturbed(), mask(), x, TIMES, {}, gen, last))


@pytest.mark.parametrize("check", [drakes_checks.path_kl, drakes_checks.gradient])
def test_checks_pass(check) -> None:
    assert failed(check()) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_reward_against_kl_by_its_price() -> None:
    assert failed(drakes_checks.trade_off()) == []


def test_fault_the_kl_without_dt(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MaskProcess.divergence

    def no_dt(self: MaskProcess, a: Tensor, b: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return plain(self, a, b, x, t, s) * (t / (t - s))[:, None]

    monkeypatch.setattr(MaskProcess, "divergence", no_dt)
    path, exact = drakes_checks.letter_kl(16, 2000)
    assert path > 3 * exact and len(failed(drakes_checks.path_kl())) == 2


def test_fault_the_kl_at_revealed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def revealed(self: MaskProcess, a: Tensor, b: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        rows, gap = soft_rows(x, self.vocab), a.exp() * (a - b) - a.exp() + b.exp()
        return (1 - rows[..., -1]) * (rows[..., :-1] * gap).sum(-1)

    monkeypatch.setattr(MaskProcess, "divergence", revealed)
    assert drakes_checks.letter_kl(16, 2000)[0] == 0.0 and drakes_checks.words_kl(500) == 0.0
    assert len(failed(drakes_checks.path_kl())) == 3


def test_fault_a_detached_soft_part_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxed, "letters", lambda x: argmax_rows(x.detach(), x.shape[-1] - 1) + 0 * x[..., :-1])
    assert drakes_checks.slope(1.0, batch=100)[1] == 0.0
    assert len(failed(drakes_checks.gradient())) == 6 + 1


def test_fault_straight_through_at_every_step_counts_a_choice_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TokenKernel.propose

    def hard(self: TokenKernel, *args: object) -> Tensor:
        x = plain(self, *args)  # type: ignore[arg-type]
        return x if self.tau is None else F.one_hot(x.argmax(-1), x.shape[-1]).to(x) + x - x.detach()

    monkeypatch.setattr(TokenKernel, "propose", hard)
    assert drakes_checks.slope(1.0, 16, 2000)[1] > 10
    assert failed(drakes_checks.gradient()) == ["ratio of norms through sixteen steps"]


def test_hard_steps_have_no_graph_and_soft_ones_keep_theirs() -> None:
    steps = soft_walk(3)
    hard, soft = steps[:5], steps[5:]
    assert [float(step.t[0]) for step in steps] == TIMES[:-1].tolist()
    assert all(not step.x_next.is_floating_point() and not step.pred.raw.requires_grad for step in hard)
    assert all(step.x_next.requires_grad and step.x_next.shape == (64, LENGTH, VOCAB + 1) for step in soft)
    for step in soft:
        torch.testing.assert_close(step.x_next.sum(-1), torch.ones(64, LENGTH, dtype=step.x_next.dtype))


def test_with_a_kl_over_all_steps_the_draws_are_the_same_and_every_prediction_has_a_graph() -> None:
    steps, short = soft_walk(3, "all"), soft_walk(3)
    assert all(step.pred.raw.requires_grad for step in steps)
    assert all(torch.equal(a.x_next, b.x_next) for a, b in zip(steps, short, strict=True))


def test_walks_may_be_soft_from_the_first_step_on() -> None:
    assert all(step.x_next.requires_grad for step in soft_walk(8))


def test_words_at_the_end_are_whole_and_carry_the_gradient_of_their_rows() -> None:
    for last in (1, 8):
        rows = soft_walk(last)[-1].x_next
        found = relaxed.letters(rows)
        left = rows[..., -1].detach()
        assert float(left.max()) <= (0.25 if last > 1 else 0.0)  # m (1 - m) of the soft mask mass m
        torch.testing.assert_close(found, F.one_hot(rows[..., :-1].argmax(-1), VOCAB).to(rows), rtol=0, atol=1e-12)
        weights = torch.randn(found.shape, generator=generator(0, "w", 0), dtype=found.dtype)
        slope = torch.autograd.grad((found * weights).sum(), rows)[0]
        assert torch.equal(slope[..., :-1], weights) and float(slope[..., -1].abs().max()) == 0.0


def test_the_loss_is_the_reward_and_the_price_of_the_kl_and_the_kl_is_logged() -> None:
    made, ctx = words(), context()
    terms = backprop.backpropagate(made, drakes_checks.drakes(kl=0.5), ctx)
    assert float(terms["kl"].detach()) == pytest.approx(0.5 * float(ctx.logged["kl"])) and float(ctx.logged["kl"]) > 0
    assert float(terms["reward"].detach()) == pytest.approx(-float(ctx.logged["reward/train"]))


def test_the_price_may_warm_up() -> None:
    made, settings = words(), drakes_checks.drakes(kl=[(0, 0.0), (2, 1.0)], last=2)
    found = [backprop.backpropagate(made, settings, context(step)) for step in range(3)]
    assert [set(terms) for terms in found] == [{"reward"}, {"reward", "kl"}, {"reward", "kl"}]
    assert float(found[2]["kl"].detach()) > 1.2 * float(found[1]["kl"].detach())


def test_the_kl_over_all_steps_is_more_and_reaches_the_hard_ones() -> None:
    made = words()
    kinds = [drakes_checks.drakes(last=1, kl=1.0, kl_steps=kind) for kind in ("last", "all")]
    last, every = (drakes_checks.terms(made, kind, 200) for kind in kinds)
    assert float(every["kl"].detach()) > 3 * float(last["kl"].detach()) > 0
    slopes = [gradient(made, {"kl": terms["kl"]}).norm() for terms in (last, every)]
    assert float(slopes[1]) > 2 * float(slopes[0]) > 0


def test_kept_graphs_give_the_gradient_of_rematerialised_ones() -> None:
    made = words()
    found = [gradient(made, drakes_checks.terms(made, drakes_checks.drakes(remat=r), 64)) for r in (True, False)]
    torch.testing.assert_close(found[0], found[1])
    assert float(found[0].norm()) > 0


def test_the_whole_gradient_of_the_kl_is_that_of_its_value() -> None:
    """Against a finite difference in the weights, with the draws held; without the reference's share it is another."""
    made = words()
    whole, part = (drakes_checks.drakes(last=3, kl=1.0, kl_through=through) for through in (True, False))
    slopes = [gradient(made, {"kl": drakes_checks.terms(made, kind, 64)["kl"]}) for kind in (whole, part)]
    direction, values = slopes[0] / slopes[0].norm(), []
    for sign in (1, -1):
        shift(made, 1e-6 * sign * direction)
        values.append(float(drakes_checks.terms(made, whole, 64)["kl"].detach()))
        shift(made, -1e-6 * sign * direction)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(slopes[0].norm()), rel=1e-3)
    assert float((slopes[1] - slopes[0]).norm()) > 0.02 * float(slopes[0].norm())


def shift(made, by: Tensor) -> None:
    """Add a flat vector to all weights."""
    with torch.no_grad():
        for weight, part in zip(made.player.tensors, by.split([p.numel() for p in made.player.tensors]), strict=True):
            weight += part.view_as(weight)


def twins(frozen: bool = True):
    """A student of one letter and a reference with weights of its own, which might be trained by mistake."""
    made = drakes_checks.tuning(
        drakes_checks.coin(torch.tensor([1.0, 0, 0, 0])), drakes_checks.coin(torch.zeros(4)),
        drakes_checks.linear(torch.tensor([0.0, 1, 0, 0])), 1)  # fmt: skip
    made.reference.requires_grad_(not frozen)
    return made


def reference_slope(made) -> float:
    terms = drakes_checks.terms(made, drakes_checks.drakes(kl=1.0), 64)
    (slope,) = torch.autograd.grad(terms["kl"], list(made.reference.parameters()), allow_unused=True)
    return 0.0 if slope is None else float(slope.norm())


def test_no_gradient_reaches_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where somebody forgot to freeze its weights; the fault, a reference in the graph, is seen."""
    assert reference_slope(twins(frozen=False)) == 0.0

    def open_divergence(tuning, ctx, config, step, cond) -> Tensor:
        fixed = tuning.reference.predict(step.x, step.t, cond)
        return mask().kl(step.pred, fixed, step.x, step.t, step.s).mean()

    monkeypatch.setattr(backprop, "_divergence", open_divergence)
    assert reference_slope(twins(frozen=False)) > 0.01


def test_fault_a_reference_that_is_the_student_costs_nothing() -> None:
    made = twins()
    before = drakes_checks.terms(made, drakes_checks.drakes(kl=1.0), 64)["kl"]
    made.source.model.denoiser = made.student
    after = drakes_checks.terms(made, drakes_checks.drakes(kl=1.0), 64)["kl"]
    assert float(before.detach()) > 0.1 and float(after.detach()) == 0.0


def test_training_moves_the_student_alone() -> None:
    made = twins()
    settings = drakes_checks.drakes(kl=0.0)
    objective = backprop.Ascent(made, lambda ctx: backprop.backpropagate(made, settings, ctx))
    Trainer(objective, Team("cpu"), 0, "s", 30, 256).run()
    assert float(next(made.reference.parameters()).detach().abs().max()) == 0.0
    moved = next(made.student.parameters()).detach() - torch.tensor([1.0, 0, 0, 0])
    assert float(moved[1]) > 0.02 and float(moved.argmax()) == 1


def test_the_extended_reward_is_the_tables_on_words_and_linear_in_each_letter() -> None:
    toy = Words()
    torch.testing.assert_close(toy.extended(toy.states), toy.reward, rtol=0, atol=1e-5)
    rows = F.one_hot(toy.states[[5, 40]], VOCAB).double()
    mixed = rows[:1].clone()
    mixed[0, 0] = torch.tensor([0.2, 0.5, 0.3])
    first = F.one_hot(torch.arange(VOCAB), VOCAB).double()
    parts = [toy.extended(torch.cat([letter[None, None], rows[:1, 1:]], 1)) for letter in first]
    torch.testing.assert_close(toy.extended(mixed), 0.2 * parts[0] + 0.5 * parts[1] + 0.3 * parts[2])


def recipe(**more: object):
    rewards = {split: [{"kind": "toy.letters_soft"}] for split in ("train", "held_out")}
    loss = {"kind": "drakes", "walk": {"steps": 8}, "last": 4}
    return of({
        "name": "d", "job": "train", "steps": 2, "batch": 16, "rewards": rewards, "teacher": {"kind": "toy.words"},
        "student": {"kind": "toy.writer"}, "stages": [{"name": "tune", "losses": [loss]}]
    } | more)  # fmt: skip


def test_a_recipe_tunes_words() -> None:
    build = Build(recipe())
    settings = build.recipe.stages[0].losses[0]
    made = backprop.build_walk(config.Drakes(walk=config.TokenWalk(steps=8), last=4), build)
    assert settings.kind == "drakes"
    Trainer(made, Team("cpu"), 0, "tune", 2, 16).run()
    assert made.state()["judge/sums"][0, 2] == 32


def test_what_drakes_cannot_follow_is_refused_by_name() -> None:
    hard = {split: [{"kind": "toy.letters"}] for split in ("train", "held_out")}
    with pytest.raises(BadInput, match="drakes follows the gradient of its reward and toy.letters has none; use ddpo"):
        backprop.build_walk(config.Drakes(), Build(recipe(rewards=hard)))
    made = words()
    made.source.model.kernel = first_hitting()
    with pytest.raises(BadInput, match="own sampler has none; use ddpo"):
        relaxed.needed_tokens(made)
    made.source.model.denoiser, made.source.model.kernel = Shifted(), None
    with pytest.raises(BadInput, match="teacher is continuous; use draft"):
        relaxed.needed_tokens(made)


def test_walks_on_tokens_have_no_guidance_unless_they_ask_for_it() -> None:
    assert config.Drakes.model_validate({"walk": {"steps": 8}}).walk.guidance == 1.0
    assert config.Drakes.model_validate({"walk": {"steps": 8, "guidance": 2.0}}).walk.guidance == 2.0
    for wrong in ({"tau": 0.0}, {"kl": -1.0}, {"last": 0}, {"kl_steps": "some"}):
        with pytest.raises(ValidationError):
            config.Drakes.model_validate(wrong)
