"""A batch in parts, one after the other, is the whole batch: the same gradient, log and judgement, with less memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from two import Two, trainer

from limbeck.core.run import checkpoint, recipe
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Phase
from limbeck.core.run.rng import Draws


class Late(Two):
    """Draws in its losses, as parts want it."""

    def phases(self, ctx: Context) -> Iterator[Phase]:
        def z() -> Tensor:
            return ctx.once("z", lambda: ctx.draws.normal("z", (2,), torch.float64))

        def fake() -> Tensor:
            return ctx.once("x", lambda: self.g(z()))

        def judge() -> dict[str, Tensor]:
            return {"judge": self.c(fake().detach()).square().mean(), "_note": z().mean()}

        yield Phase(("g",), lambda: {"fool": -self.c(fake()).tanh().mean()})
        yield Phase(("c",), judge)


def trained(parts: int, steps: int = 3) -> tuple[Late, dict[str, float]]:
    made = Late()
    made.g.double(), made.c.double()
    for player, net in (("g", made.g), ("c", made.c)):
        made.players[player].bind(dict(net.named_parameters()))
    runner = trainer(made, steps)
    runner.parts = parts
    logged = {}
    runner.cadence.log = lambda step, numbers: logged.update(numbers)
    runner.run()
    return made, logged


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_give_the_whole_batch_s_gradients_and_log(parts: int) -> None:
    (whole, said), (made, heard) = trained(1), trained(parts)
    for player in ("g", "c"):
        for one, two in zip(whole.players[player].tensors, made.players[player].tensors, strict=True):
            torch.testing.assert_close(two, one, rtol=0, atol=1e-12)
    assert {"g/fool", "c/judge", "c/note", "norm/c", "loss/g"} <= said.keys() == heard.keys()
    assert all(heard[name] == pytest.approx(said[name], rel=1e-6, abs=1e-9) for name in said)


def test_what_draws_before_its_turn_is_refused() -> None:
    runner = trainer(Two(), 1)
    runner.parts = 2
    with pytest.raises(BadInput, match="accumulate: this loss draws before its turn"):
        runner.run()


def test_what_compares_the_whole_batch_is_refused() -> None:
    ctx = Context(0, "s", Draws(0, 0, 4), 1, 0, torch.device("cpu"), 2)
    for _ in ctx.each():
        with pytest.raises(BadInput, match="accumulate: this loss compares the whole batch"):
            ctx.gathered(torch.zeros(2))


@pytest.mark.parametrize("world", [1, 2])
def test_parts_share_out_a_process_s_rows(world: int) -> None:
    for rank in range(world):
        mine = Draws(3, 5, 8, rank, world)
        parts = mine.split(2)
        assert torch.equal(mine.normal("n"), torch.cat([part.normal("n") for part in parts]))
        assert torch.equal(mine.of(6).normal("n"), Draws(3, 6, 8, rank, world).normal("n"))


def test_a_batch_that_cannot_be_taken_in_parts_is_refused() -> None:
    with pytest.raises(BadInput, match="batch: 9 is no multiple of accumulate: 2"):
        recipe.load("toy/ring4", ["batch=9", "accumulate=2"])


def test_a_run_in_parts_ends_where_the_whole_one_does(tmp_path: Path, python) -> None:
    small = ["--set", "steps=4", "--set", "batch=32", "--set", "eval=[]", "--device", "cpu", "--out", str(tmp_path)]
    for parts in (1, 2):
        python.run(
            ["-m", "limbeck", "run", "toy/ring4", *small, "--name", str(parts), "--set", f"accumulate={parts}"],
            check=True,
        )
    one, two = (checkpoint.latest(tmp_path / name / "checkpoints").tensors for name in "12")
    assert all(torch.allclose(value, two[key], atol=1e-5) for key, value in one.items() if "/param/" in key)
