"""Players: rates, cadence, EMA, exact state; composed objectives."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.run import guard
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Objective, Phase, Player, compose
from limbeck.core.run.rng import Draws


def context(step: int = 0) -> Context:
    return Context(step, "main", Draws(0, step, 4), 1, 0, torch.device("cpu"))


def update(player: Player, step: int) -> None:
    for p in player.tensors:
        p.grad = torch.full_like(p, 0.1 * (step + 1))
    player.step(step)


def test_learning_rate_is_schedule_times_warmup_times_decay() -> None:
    config = OptimConfig(lr=[(0, 1.0), (10, 0.0)], warmup=4, decay="cosine")
    player = Player("p", nn.Linear(1, 1), config, 20)
    assert player.lr(1) == pytest.approx(0.9 * 2 / 4 * 0.5 * (1 + math.cos(math.pi / 20)))
    assert Player("p", nn.Linear(1, 1), OptimConfig(lr=1.0, decay="linear"), 20).lr(5) == 0.75
    assert [player.due(s) for s in range(3)] == [True] * 3


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_updates_agree_with_torch(kind: str) -> None:
    net = nn.Linear(3, 2)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(net.state_dict())
    player = Player("p", net, OptimConfig(kind=kind, lr=0.1, weight_decay=0.01, betas=(0.5, 0.9)), 10)
    law = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(kind)
    optim = (
        law(twin.parameters(), lr=0.1, betas=(0.5, 0.9), weight_decay=0.01)
        if law
        else torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01)
    )
    for step in range(3):
        update(player, step)
        for p in twin.parameters():
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        optim.step()
    torch.testing.assert_close(net.weight, twin.weight)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "muon"])
def test_rates_move_parameters_by_their_factor(kind: str) -> None:
    """The first update of Adam has the size of its learning rate; momentum's is in proportion to it."""
    names = ("scene.means", "scene.means_fine", "scene.colours")
    params = {name: nn.Parameter(torch.zeros(3)) for name in names}
    rates = {".means": 0.1, "means_fine": 3.0}
    player = Player("p", params, OptimConfig(kind=kind, lr=0.5, rates=rates), 10)  # type: ignore[arg-type]
    for param in params.values():
        param.grad = torch.full((3,), 2.0)
    player.step(0)
    moved = {name: float(-param.detach()[0]) for name, param in params.items()}
    assert moved["scene.means"] == pytest.approx(0.1 * moved["scene.colours"], rel=1e-5)
    assert moved["scene.means_fine"] == pytest.approx(3.0 * moved["scene.colours"], rel=1e-5)
    again = Player("p", {name: nn.Parameter(torch.ones(3)) for name in names}, player.config, 10)
    again.load(player.state())
    assert all(torch.equal(again.state()[key], value) for key, value in player.state().items())


def test_moments_come_back_laid_out_as_their_parameter() -> None:
    """Sums and fused kernels follow the layout: a moment laid out otherwise gives other bits."""
    layout = torch.arange(12.0).view(3, 4).T
    player = Player("p", {"w": nn.Parameter(layout.clone())}, OptimConfig(kind="adam", lr=0.1), 10)
    assert not player.params["w"].is_contiguous()
    player.params["w"].grad = torch.ones(4, 3)
    player.step(0)
    saved = {key: value.contiguous() for key, value in player.state().items()}
    again = Player("p", {"w": nn.Parameter(layout.clone())}, player.config, 10)
    again.load(saved)
    moment = again.state()["optim/w/exp_avg"]
    assert moment.stride() == layout.stride() and torch.equal(moment, saved["optim/w/exp_avg"])


def test_a_rate_for_no_parameter_is_refused() -> None:
    params = {"means": nn.Parameter(torch.zeros(3))}
    with pytest.raises(BadInput, match='has no mean_.*"means"'):
        Player("p", params, OptimConfig(rates={"mean_": 2.0}), 10)


def test_ema_follows_its_ramp_and_swaps_exactly() -> None:
    net = nn.Linear(2, 2)
    player = Player("p", net, OptimConfig(lr=0.1, ema=0.5), 10)
    expected = net.weight.detach().clone()
    for step in range(12):
        update(player, step)
        expected = expected.lerp(net.weight.detach(), 1 - min(0.5, (1 + step) / (10 + step)))
    trained = net.weight.detach().clone()
    with player.ema_weights():
        torch.testing.assert_close(net.weight, expected)
    assert torch.equal(net.weight, trained)


def test_decay_clip_and_ema_move_with_the_step() -> None:
    """Pairs for each of them: after the last pair all is as with the constant of that pair."""
    moving = OptimConfig(
        lr=0.1, weight_decay=[(0, 0.0), (1, 0.5)], clip=[(0, 1.0), (1, 0.1)], ema=[(0, 0.0), (1, 0.1)]
    )  # fmt: skip
    still = OptimConfig(lr=0.1, weight_decay=0.5, clip=0.1, ema=0.1)
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    nets[1].load_state_dict(nets[0].state_dict())
    players = [Player("p", net, config, 10) for net, config in zip(nets, (moving, still), strict=True)]
    for player in players:
        update(player, 1)
        for p in player.tensors:
            p.grad = torch.ones_like(p)
        guard.clip(player, 3.0, 1)
    assert torch.equal(nets[0].weight, nets[1].weight) and torch.equal(nets[0].weight.grad, nets[1].weight.grad)
    assert all(torch.equal(a, b) for a, b in zip(*(p.ema.values() for p in players), strict=True))
    guard.clip(players[0], 3.0, 0)
    assert float(nets[0].weight.grad[0, 0]) == pytest.approx(0.1 / 9)
    for wrong in ("weight_decay=-1", "clip=0", "ema=1"):
        key, value = wrong.split("=")
        with pytest.raises(ValueError, match="must be"):
            OptimConfig(**{key: [(0, float(value))]})


def test_state_comes_back_bit_for_bit() -> None:
    def make() -> Player:
        torch.manual_seed(0)
        return Player("p", nn.Linear(3, 2), OptimConfig(lr=0.1, ema=0.9), 10)

    whole, first, second = make(), make(), make()
    for step in range(4):
        update(whole, step)
    for step in range(2):
        update(first, step)
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    for step in range(2, 4):
        update(second, step)
    assert whole.state().keys() == second.state().keys()
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in whole.state().items())


def test_another_shape_or_no_parameters_is_refused() -> None:
    state = Player("p", nn.Linear(3, 2), OptimConfig(), 1).state()
    with pytest.raises(BadInput, match=r'player "p": weight has shape \[2, 3\] in the checkpoint, \[2, 4\] is needed'):
        Player("p", nn.Linear(4, 2), OptimConfig(), 1).load(state)
    with pytest.raises(BadInput, match="no parameters to train"):
        Player("p", nn.Linear(4, 2).requires_grad_(False), OptimConfig(), 1)


class Pull:
    """Pulls a shared weight to a target; the second phase has a player of its own."""

    def __init__(self, shared: Player, own: str, target: float) -> None:
        self.own = Player(own, {"w": nn.Parameter(torch.zeros(1))}, OptimConfig(), 1)
        self.players = {"shared": shared, own: self.own}
        self.target, self.order, self.kept = target, [], torch.zeros(1)

    def phases(self, ctx: Context) -> Iterator[Phase]:
        w, own = self.players["shared"].tensors[0], self.own.tensors[0]
        after = lambda: self.order.append("after")  # noqa: E731
        yield Phase(("shared",), lambda: {"pull": (w - self.target).sum(), "_seen": w.sum()}, after)
        self.order.append("between")
        yield Phase((self.own.name,), lambda: {"own": own.sum()})

    def state(self) -> dict[str, Tensor]:
        return {"kept": self.kept}

    def load(self, state: dict[str, Tensor]) -> None:
        self.kept = state["kept"]


def test_composition_sums_phases_of_the_same_players_into_one_backward() -> None:
    shared = Player("shared", {"w": nn.Parameter(torch.ones(1))}, OptimConfig(), 1)
    a, b = Pull(shared, "a", 3.0), Pull(shared, "b", 5.0)
    both: Objective = compose([a, b], [2.0, [(0, 0.0), (10, 1.0)]])
    phases = both.phases(context(step=5))
    first = next(phases)
    terms = first.loss()
    assert first.players == ("shared",) and set(terms) == {"pull", "_seen", "pull.1", "_seen.1"}
    sum(v for k, v in terms.items() if not k.startswith("_")).backward()
    assert shared.tensors[0].grad.item() == pytest.approx(2.0 + 0.5)
    first.after_backward()
    assert [next(phases).players for _ in range(2)] == [("a",), ("b",)] and next(phases, None) is None
    assert a.order == ["after", "between"]


def test_composed_state_goes_back_to_its_part_and_one_plain_loss_stays_itself() -> None:
    shared = Player("shared", {"w": nn.Parameter(torch.ones(1))}, OptimConfig(), 1)
    a, b = Pull(shared, "a", 3.0), Pull(shared, "b", 5.0)
    both = compose([a, b], [1.0, 1.0])
    both.load({"0/kept": torch.tensor([1.0]), "1/kept": torch.tensor([2.0])})
    assert (a.kept.item(), b.kept.item()) == (1.0, 2.0) and set(both.state()) == {"0/kept", "1/kept"}
    assert compose([a], [1.0]) is a and compose([a], [0.5]) is not a


def test_two_players_of_one_name_are_refused() -> None:
    make = lambda: Player("shared", {"w": nn.Parameter(torch.ones(1))}, OptimConfig(), 1)  # noqa: E731
    with pytest.raises(BadInput, match="share it through build.player"):
        compose([Pull(make(), "a", 0.0), Pull(make(), "b", 0.0)], [1.0, 1.0])
