"""Oracles: their measures, their gradient, and learning a rule end to end."""

from pathlib import Path

import pytest
import torch

from limbeck.core.run import job
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import config, oracle, tokens


def test_auroc_by_hand_and_with_ties() -> None:
    score, y = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert oracle.auroc(score, y) == pytest.approx(0.75)
    assert oracle.auroc(torch.zeros(4), y) == pytest.approx(0.5)
    score, y = torch.rand(200, generator=generator(0, "t", 0)).mul(9).round(), (torch.arange(200) % 3 == 0).float()
    pairs = (score[y > 0][:, None] > score[y < 1]).double() + (score[y > 0][:, None] == score[y < 1]).double() / 2
    assert oracle.auroc(score, y) == pytest.approx(float(pairs.mean()))


@pytest.fixture(scope="module")
def assay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 random sequences whose value is the number of TATA words, with a little noise."""
    gen = generator(0, "assay", 0)
    x = torch.randint(4, (300, 40), generator=gen)
    x[::2, 10:14] = torch.tensor([3, 0, 3, 0])
    texts = tokens.decode(x, oracle.ALPHABETS["dna"])
    noise = 0.1 * torch.randn(300, generator=gen)
    rows = [f"{text},{text.count('TATA') + float(n):.4f}" for text, n in zip(texts, noise, strict=True)]
    path = tmp_path_factory.mktemp("assay") / "assay.csv"
    path.write_text("\n".join(["sequence,value", *rows]))
    return path


TINY = [
    "steps=300",
    "batch=32",
    "student.members=2",
    "student.of.width=32",
    "student.of.dropout=0.0",
    "eval.0.curve=[0.3]",
]


def test_an_assay_is_learned_and_is_a_reward_at_once(assay: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = recipes.load("sequence/oracle", TINY, {"table": str(assay)})
    assert job.run(recipe, folder, device="cpu", quiet=True) == 0
    import json

    whole, part = json.loads((folder / "eval.json").read_text())["sequence.oracle"]
    assert whole["Pearson"] > 0.6 and part["learned from"] < whole["learned from"]
    assert {"spread", "spread against error", "RMSE"} <= whole.keys()
    build = Build(recipe, folder=folder)
    reward = oracle.build(config.Oracle(model=str(folder)), build)
    x = tokens.onehot(torch.randint(4, (4, 40), generator=generator(1, "t", 0)), 4).requires_grad_(True)
    reward(x, {"prompt": [""] * 4}).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    mean = oracle.build(config.Oracle(model=str(folder), rule="mean"), build)(x, {"prompt": [""] * 4})
    assert bool((reward(x, {"prompt": [""] * 4}) <= mean).all())  # the lower bound pays for no disagreement


def test_both_strands_score_a_sequence_and_its_complement_alike(assay: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = recipes.load("sequence/oracle", [*TINY, "steps=2", "eval=[]"], {"table": str(assay)})
    assert job.run(recipe, folder, device="cpu", quiet=True) == 0
    ids = torch.randint(4, (5, 40), generator=generator(2, "t", 0))
    x, turned = tokens.onehot(ids, 4), tokens.onehot(3 - ids.flip(1), 4)
    found = {s: oracle.build(config.Oracle(model=str(folder), strands=s), Build(recipe)) for s in ("given", "both")}
    cond = {"prompt": [""] * 5}
    assert torch.allclose(found["both"](x, cond), found["both"](turned, cond), atol=1e-5)
    assert not torch.allclose(found["given"](x, cond), found["given"](turned, cond), atol=1e-3)


def test_a_wrong_name_is_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no oracle"):
        oracle.opened("no-such", torch.device("cpu"))
