"""The benchmark of shared bases and of tiled decodes, small: its bars hold, and faults miss them."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

SMALL = ["--nets", "small", "--base", "4", "--decodes", "2", "4", "2", "6"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("video_memory")


def test_the_bars_hold(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(SMALL) == 0
    said = capsys.readouterr().out
    assert said.count("\n| ") == 2 + 1 + 2 and said.endswith("pass\n")


def test_fault_a_critic_of_its_own_and_a_decode_without_tiles(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, decode = benchmark.CriticConfig, benchmark.decode
    monkeypatch.setattr(benchmark, "CriticConfig", lambda kind, rank: config(kind="full", rank=rank))
    _, missed = benchmark.share("small", torch.float32)
    assert len(missed) == 2 and "of the copies' bytes" in missed[1]
    monkeypatch.setattr(benchmark, "decode", lambda vae, frames, side, tiled: decode(vae, frames, side, False))
    assert len(benchmark.tiling(4, [(2, 6)])[1]) == 1
