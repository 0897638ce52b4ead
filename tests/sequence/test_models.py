"""Masked models: soft rows, ESM's own forward, files, templates, and own sequences learned end to end."""

import json
from pathlib import Path

import pytest
import torch

from limbeck.core.run import job
from limbeck.core.run import recipe as recipes
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import esm, models, teacher, tokens
from limbeck.domains.sequence.text import DNA, PROTEIN

CNN = {"alphabet": "dna", "length": 12, "net": {"kind": "cnn", "width": 16, "kernel": 3, "dilations": [1, 2]}}


NET = {"kind": "cnn", "width": 8, "kernel": 3, "dilations": [1]}


def test_one_hot_rows_and_ids_are_the_same_input_and_rows_carry_a_gradient() -> None:
    net, x = models.network(CNN), torch.randint(5, (3, 12), generator=generator(0, "t", 0))
    rows = tokens.rows(x, 4).requires_grad_(True)
    assert torch.equal(net(x), net(rows)) and net(x).shape == (3, 12, 4)
    net(rows).sum().backward()
    assert float(rows.grad.abs().sum()) > 0


def test_esm_reads_masks_as_its_own_class_does() -> None:
    net = esm.fresh({"width": 32, "layers": 2, "heads": 2}).eval()
    x = torch.randint(21, (3, 17), generator=generator(0, "t", 0))
    names = [*PROTEIN.letters, "<mask>"]
    whole = torch.tensor([[0, *(esm.VOCABULARY.index(names[i]) for i in row), 2] for row in x.tolist()])
    with torch.no_grad():
        want = net.esm(whole, attention_mask=torch.ones_like(whole)).logits[:, 1:-1, net.place[:20]]
        assert torch.allclose(net(x), want, atol=1e-5) and torch.allclose(net(tokens.rows(x, 20)), want, atol=1e-5)


def test_a_checkpoint_of_esm_loads_from_its_folder(tmp_path: Path) -> None:
    net = esm.fresh({"width": 32, "layers": 1, "heads": 2}).eval()
    net.esm.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(esm.VOCABULARY))
    again, meta = models.load(str(tmp_path))
    x = torch.full((1, 9), 20)
    assert meta["alphabet"] == "protein" and torch.allclose(again(x), net(x), atol=1e-6)
    models.save(again, tmp_path / "ours", meta)  # what `limbeck export --format masked` writes of a tuned one
    assert torch.allclose(models.load(str(tmp_path / "ours"))[0](x), net(x), atol=5e-2)
    (tmp_path / "vocab.txt").write_text("A C")
    with pytest.raises(BadInput, match="not those of ESM-2"):
        models.load(str(tmp_path))


def test_a_model_is_saved_and_found_again(tmp_path: Path) -> None:
    net = models.network(CNN)
    models.save(net, tmp_path / "m", {**net.meta, "length": 12})
    again, meta = models.load(str(tmp_path / "m"))
    x = torch.full((1, 12), 4)
    assert meta["length"] == 12 and torch.allclose(again(x), net(x), atol=2e-2)  # bf16 at rest
    with pytest.raises(BadInput, match="no sequence model"):
        models.load(str(tmp_path / "none"))


def test_a_template_is_kept_by_every_sample() -> None:
    from limbeck.core.diffusion.manystep import ManyStep

    model = models.model(models.network(CNN), CNN, None, "tiny")
    student = ManyStep(model, model.denoiser, 6, 1.0)
    noise = torch.randn(student.draws, 20, 12, generator=generator(0, "t", 0))
    x = student.sample(noise[0], model.encode(["ACGTNNNNNNNN"] * 20), list(noise[1:])).x
    found = tokens.decode(x, DNA)
    assert all(text.startswith("ACGT") and "_" not in text for text in found) and len(set(found)) > 10
    again = student.sample(noise[0], model.encode(["ACGTNNNNNNNN"] * 20), list(noise[1:])).x
    assert torch.equal(x, again)  # a walk is a function of its noise
    with pytest.raises(BadInput, match="template of 3 letters"):
        model.encode(["ACG"])


def test_a_net_learns_what_belongs_to_which_place(tmp_path: Path) -> None:
    """At first nothing changes; what a place has learned is kept in the folder, and nets with places refuse them."""
    net = models.network({"alphabet": "dna", "net": NET})
    model = models.model(net, {**net.meta, "length": 12}, None, "x")
    ids = torch.full((2, 12), DNA.size)
    before = net(ids)
    teacher.placed(model.denoiser, 12)
    assert torch.equal(net(ids), before)
    with torch.no_grad():
        net.places[0, 1] = 5.0  # one channel of the second place
    changed = (net(ids) - before).detach().abs().sum((0, 2))
    assert int(changed.argmax()) == 1 and float(changed[1]) > 2 * float(changed[4:].max())  # its mean moves all others
    models.save(net, tmp_path, {**net.meta, "length": 12})
    again, meta = models.load(str(tmp_path))
    assert meta["net"]["places"] == 12 and torch.equal(again.places, net.places)
    with pytest.raises(BadInput, match="student.places"):
        teacher.placed(torch.nn.Identity(), 12)


def test_own_sequences_are_learned_from_a_fasta_file(tmp_path: Path) -> None:
    gen = generator(0, "own", 0)
    body = torch.randint(4, (300, 6), generator=gen)
    texts = tokens.decode(torch.cat([body, 3 - body.flip(1)], 1), DNA)  # palindromes: the second half is certain
    path = tmp_path / "own.fasta"
    path.write_text("".join(f">r{i}\n{text}\n" for i, text in enumerate(texts)))
    sets = ["steps=500", "batch=64", "teacher.net.width=32", "eval.0.count=32", "eval.0.steps=12", "eval.0.kmer=2"]
    recipe = recipes.load("sequence/pretrain", sets, {"fasta": str(path), "length": "12"})
    assert job.run(recipe, tmp_path / "run", device="cpu", quiet=True) == 0
    row = json.loads((tmp_path / "run" / "eval.json").read_text())["sequence.likelihood"][0]
    assert row["nats a letter"] < 0.9 * row["independent letters"]
    built = job.open_run(tmp_path / "run")
    from limbeck.domains.sequence.teacher import export

    export(built, tmp_path / "model")
    assert models.load(str(tmp_path / "model"))[1]["length"] == 12
