"""The benchmarks of memory and of particles, small: their tables come, their bars hold, and faults miss them."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from limbeck.core.diffusion.codec import Autoencoder
from limbeck.core.diffusion.sampling import Step
from limbeck.core.steering.particles import Steering

SMALL = ["--channels", "32", "32", "--last", "1", "3", "5"]


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch):
    """A module of the folder benchmarks, by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def particles(load_benchmark) -> ModuleType:
    return load_benchmark("particles")


def test_the_meter_counts_what_lives_at_the_same_time(load_benchmark) -> None:
    def work() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        torch.empty(700)
        del second

    assert load_benchmark("meter").peak(work) == 6000
    assert load_benchmark("meter").peak(lambda: None) == 0


def test_reward_memory_holds_its_bar(load_benchmark, capsys) -> None:
    assert load_benchmark("reward_memory").main(SMALL) == 0
    said = capsys.readouterr().out
    assert said.count("\n| ") == 1 + 3 and said.endswith("pass\n")


def test_fault_graphs_that_are_kept(load_benchmark) -> None:
    benchmark = load_benchmark("reward_memory")
    walk = benchmark.Walk.of((32, 32), 1, 3)
    kept = [benchmark.cost(walk, last, False, 1.0)[0] for last in (1, 2, 3)]
    assert len(benchmark.missed(walk, (1, 2, 3), kept, kept[2] - kept[1])) == 2


def test_fault_whoever_holds_on_to_the_steps_pays_for_it(load_benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, kept = load_benchmark("reward_memory"), []
    walk, plain = benchmark.Walk.of((32, 32), 1, 5), Step.__init__

    def hoard(self: Step, *args: object) -> None:
        plain(self, *args)
        if self.pred.raw.requires_grad:
            kept.append((self.x, self.x_next, self.pred.raw))

    monkeypatch.setattr(Step, "__init__", hoard)
    peaks = [benchmark.cost(walk, last, True, 1.0)[0] for last in (3, 5)]
    assert "bytes a step at the end" in benchmark.missed(walk, (3, 5), peaks, 1e9)[0]


def test_the_same_scheme_comes_as_near_as_the_transcription(particles, capsys) -> None:
    assert [line for line in particles.tilts([16], 1600, 3) if "error" in line] == []
    assert capsys.readouterr().out.count("\n| ") == 3


def test_fault_potentials_of_the_wrong_sign_miss_the_bar(particles, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Steering.log_potential
    monkeypatch.setattr(Steering, "log_potential", lambda *args: -plain(*args))
    problem = particles.words(True)
    found = particles.compare(problem, 16, 1600, 2)
    assert found["the same scheme"][0] > found["transcription"][0] + particles.MORE


def test_chunks_bound_the_memory_of_decoding(particles, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert particles.decodes([8, 24], 16) == []
    assert capsys.readouterr().out.count("\n| ") == 3

    def at_once(self: Autoencoder, function, x: Tensor) -> Tensor:
        return function(x)

    monkeypatch.setattr(Autoencoder, "_chunked", at_once)
    assert len(particles.decodes([8, 24], 16)) == 1


def test_drakes_has_the_gradient_of_the_transcription_for_less_memory(load_benchmark) -> None:
    benchmark = load_benchmark("drakes_step")
    case = benchmark.Case.of(16, 4, 40, 6, 6).double()
    steps = {"ours": lambda: benchmark.ours(case, "last", True), "published": lambda: benchmark.published(case)}
    assert benchmark.difference(case, *steps.values()) < benchmark.ALIKE
    found = benchmark.measure(case, steps, 1)
    assert found["ours"][1] < benchmark.SMALLER * found["published"][1]


def test_fault_drakes_that_draws_hard_to_the_last_step(load_benchmark) -> None:
    benchmark = load_benchmark("drakes_step")
    case = benchmark.Case.of(16, 4, 40, 6, 6).double()
    short = benchmark.Case(case.student, case.reference, case.motif, 4, 40, 6, 1)
    error = benchmark.difference(case, lambda: benchmark.ours(short, "last"), lambda: benchmark.published(case))
    assert error > 1000 * benchmark.ALIKE


def test_a_slow_or_large_step_misses_the_bar_of_drakes(load_benchmark, capsys) -> None:
    benchmark = load_benchmark("drakes_step")
    even = {name: (1.0, 100) for pair in benchmark.PAIRS for name in pair}
    assert benchmark.compared(even) == ["as each comes: 1.00 times faster, 1.000 of the memory"]
    assert benchmark.compared(even | {benchmark.PAIRS[0][1]: (0.5, 50)}) == []
