"""One loop for every objective: toggling, cadence, the guard before updates, signals."""

import os
import signal

import pytest
import torch
from torch import Tensor, nn
from two import Two, trainer

from limbeck.core.run import guard
from limbeck.core.run.build import Build
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.distributed import Team
from limbeck.core.run.errors import BadInput, LimbeckError, NonFinite
from limbeck.core.run.players import Player
from limbeck.core.run.trainer import Cadence, Stopped, Trainer


def snapshot(player: Player) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in player.state().items()}


def test_only_the_phase_s_players_require_grad_and_resting_ones_are_skipped() -> None:
    two = Two(every=3)
    trainer(two).run()
    phases = [(0, "g", True, False), (0, "c", False, True), (1, "c", False, True), (2, "c", False, True)]
    assert two.seen == [*phases, (3, "g", True, False), (3, "c", False, True)]
    assert two.c.weight.grad is None and two.g.weight.requires_grad and two.c.weight.requires_grad


def test_the_update_is_the_plain_loop_s() -> None:
    mine, plain = Two(), Two()
    trainer(mine, steps=3).run()
    from limbeck.core.run.rng import Draws, derive

    optims = [torch.optim.AdamW(n.parameters(), lr=1e-4, weight_decay=0.0) for n in (plain.g, plain.c)]
    for step in range(3):
        z = Draws(derive(0, "main"), step, 4).normal("z", (2,))
        x = plain.g(z)
        plain.c.requires_grad_(False)
        (-plain.c(x).mean()).backward()
        torch.nn.utils.clip_grad_norm_(plain.g.parameters(), 1.0)
        optims[0].step()
        plain.c.requires_grad_(True)
        plain.c(x.detach()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.c.parameters(), 1.0)
        optims[1].step()
        [optim.zero_grad() for optim in optims]
    torch.testing.assert_close(mine.g.weight, plain.g.weight, rtol=0, atol=1e-7)
    torch.testing.assert_close(mine.c.weight, plain.c.weight, rtol=0, atol=1e-7)


def test_a_player_that_rests_for_long_is_still_in_every_log_line() -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    trainer(Two(every=4), 8, Cadence(log_every=4, log=lambda s, n: rows.append((s, n)))).run()
    assert [step for step, _ in rows] == [4, 8]
    assert all({"g/fool", "c/judge", "c/note", "norm/g", "lr/c"} <= set(row) for _, row in rows)


@pytest.mark.parametrize("player", ["generator", "critic"])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_nan_stops_before_the_update_and_is_named(load, player: str, fault: str) -> None:
    sets = [f"stages.0.losses.0.{key}={value}" for key, value in dict(fault=fault, player=player, at=4).items()]
    build = Build(load(*sets, "student.depth=2"))
    objective = build.objective("main")
    run = Trainer(objective, Team("cpu"), 0, "main", 20, 8)
    for _ in range(4):
        run.one_step()
    before = {name: snapshot(p) for name, p in objective.players.items()}
    with pytest.raises(NonFinite) as error:
        run.one_step()
    tensor = "last.bias" if fault == "gradient" else "fool" if player == "generator" else "judge"
    assert error.value.player == player and error.value.step == 4 and tensor in error.value.tensor
    after = snapshot(objective.players[player])
    assert all(torch.equal(after[name], tensor) for name, tensor in before[player].items())
    assert run.step == 4 and all(p.grad is None for p in objective.players[player].tensors)


def test_without_the_guard_nan_would_reach_the_weights(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "check", lambda players, *rest: [0.0 for _ in players])
    build = Build(load("stages.0.losses.0.fault=loss", "stages.0.losses.0.at=0"))
    run = Trainer(build.objective("main"), Team("cpu"), 0, "main", 20, 8)
    run.one_step()
    assert run.objective.players["critic"].tensors[0].isnan().any()


def test_clipping_limits_the_global_norm() -> None:
    player = Player("p", nn.Linear(4, 4), OptimConfig(clip=0.5), 1)
    for p in player.tensors:
        p.grad = torch.ones_like(p)
    guard.clip(player, float(torch.nn.utils.get_total_norm([p.grad for p in player.tensors])), 0)
    assert float(torch.nn.utils.get_total_norm([p.grad for p in player.tensors])) == pytest.approx(0.5, rel=1e-5)


def test_fp16_overflow_skips_the_update_and_halves_the_scale() -> None:
    player = Player("p", {"w": nn.Parameter(torch.ones(2))}, OptimConfig(), 1)
    scale = guard.LossScale(2.0**16)
    player.tensors[0].grad = torch.tensor([1.0, float("inf")])
    assert guard.check([player], {}, torch.tensor(1.0), 0, scale) is None
    assert scale.value == 2.0**15 and player.tensors[0].grad is None
    player.tensors[0].grad = torch.full((2,), 3.0 * scale.value)
    assert guard.check([player], {}, torch.tensor(1.0), 0, scale) == [pytest.approx(18**0.5)]
    player.tensors[0].grad = torch.ones(2)
    with pytest.raises(NonFinite, match='loss "a"'):
        guard.check([player], {"a": torch.tensor(float("nan"))}, torch.tensor(float("nan")), 0, scale)


def test_a_loss_without_gradient_or_that_is_no_scalar_is_explained() -> None:
    with pytest.raises(LimbeckError, match="does not depend on the parameters of g"):
        guard.total(["g"], {"a": torch.ones(())})
    with pytest.raises(BadInput, match="must be scalar"):
        guard.total(["g"], {"a": torch.ones(2, requires_grad=True)})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_stops(number: int, code: int) -> None:
    saved: list[int] = []
    two = Two()
    run = trainer(two, 50, Cadence(log_every=1, log=lambda s, n: s == 3 and os.kill(os.getpid(), number)))
    run.cadence.save = lambda t: saved.append(t.step)
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop:
        run.run()
    assert stop.value.code == code and saved == [3] and run.step == 3
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once() -> None:
    saved: list[int] = []
    kill = lambda s, n: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]  # noqa: E731
    run = trainer(Two(), 50, Cadence(log_every=1, log=kill))
    run.cadence.save = lambda t: saved.append(t.step)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert saved == []


def test_bf16_goes_through_autocast_and_fp16_needs_a_gpu() -> None:
    team = Team("cpu", "bf16")
    with team.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="fp16 needs a GPU"):
            Team("cpu", "fp16")
    two = Two()
    Trainer(two, team, 0, "main", 2, 4).run()
    assert two.g.weight.dtype == torch.float32
