"""Randomness is a function of (seed, stream, step) and of nothing else."""

import pytest
import torch

from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import Draws, derive, generator


def test_streams_steps_and_seeds_differ_and_repeat() -> None:
    draws = {
        key: torch.randn(8, generator=generator(*key)) for key in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    }
    assert len({tuple(x.tolist()) for x in draws.values()}) == 4
    assert torch.equal(draws[0, "a", 0], torch.randn(8, generator=generator(0, "a", 0)))


def test_the_hash_is_the_same_in_another_process(python) -> None:
    code = "from limbeck.core.run.rng import derive; print(derive(7, 'x', 3))"
    assert int(python.run(["-c", code], check=True).stdout) == derive(7, "x", 3)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_slice_one_global_draw(world: int) -> None:
    whole = Draws(3, 5, 8)
    parts = [Draws(3, 5, 8, rank, world) for rank in range(world)]
    for name, draw in {
        "n": lambda d: d.normal("n", (2, 3)),
        "u": lambda d: d.uniform("u", (), -1, 2),
        "i": lambda d: d.integers("i", 10, (4,)),
    }.items():
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts])), name
    assert [part.rows for part in parts][1].start == 8 // world


def test_a_stream_is_used_once_and_the_global_generator_never() -> None:
    before = torch.random.get_rng_state()
    draws = Draws(0, 0, 4)
    draws.normal("a", (2,), torch.float64)
    with pytest.raises(ValueError, match='"a" was already drawn'):
        draws.gen("a")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(BadInput, match="multiple of 3"):
        Draws(0, 0, 4, 0, 3)
