"""Complexes: tied chains get one letter a residue, partner chains are heard and kept, files hold all of them."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.core.run import recipe as recipes
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import contacts, export, fasta, mpnn, proteins, space, structure, tokens
from limbeck.domains.sequence.config import Contacts, Designs, Mpnn, MpnnNll
from limbeck.domains.sequence.structure import Structure
from limbeck.domains.sequence.text import PROTEIN

L = 70
CPU = torch.device("cpu")
ZERO = torch.zeros(20)
MASK = tokens.rows(torch.tensor([[20]]), 20)


def turned(atoms: Tensor, shift: tuple[float, float, float]) -> Tensor:
    """The copy by half a turn about z and a translation."""
    return atoms * torch.tensor([-1.0, -1.0, 1.0]) + torch.tensor(shift)


def dimer() -> Structure:
    """1A8O twice, tied, with a twofold axis along z beside its outermost atom, so that the chains touch."""
    one = structure.load("1A8O")
    x, y, _ = max(one.atoms.flatten(0, 1).tolist())
    atoms = torch.cat([one.atoms, turned(one.atoms, (2 * x + 1.0, 2 * y, 0.0))])
    chains = ["A"] * L + ["B"] * L
    return Structure("dimer", one.text * 2, atoms, one.numbers * 2, [""] * 2 * L, chains, L, 2)


@pytest.fixture(scope="module")
def trimer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dimer with a third chain above it that has letters of its own, as a PDB file without chains tied."""
    pair = dimer()
    atoms = torch.cat([pair.atoms, pair.atoms[:L] + torch.tensor([0.0, 0.0, 40.0])])
    chains, text = [*pair.chains, *"C" * L], pair.text + pair.native[::-1]
    whole = Structure("trimer", text, atoms, pair.numbers[:L] * 3, [""] * 3 * L, chains, 3 * L)
    return structure.thread(whole, text, [1.0] * 3 * L, tmp_path_factory.mktemp("complex") / "trimer.pdb")


def designer(found: Structure) -> mpnn.Designer:
    return mpnn.Designer(mpnn.load("v_48_020"), found, ZERO, 1.0)


def build(**pieces: Any) -> Any:
    return SimpleNamespace(device=CPU, has=pieces.__contains__, piece=pieces.__getitem__)


def native() -> Tensor:
    return tokens.encode([structure.load("1A8O").native], PROTEIN)


def state(ids: Tensor, share: float = 0.6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids with masks, and what is known."""
    known = torch.rand(ids.shape[1], generator=generator(seed, "k", 0)) < share
    return torch.where(known, ids, 20), known


def by_hand(net: mpnn.Designer, ids: Tensor, hears: Any) -> tuple[Tensor, Tensor]:
    """Both chains' logits [L,V] of a dimer, where hears(i, j) says of places along the chain who hears of whom."""
    table = torch.tensor([[float(hears(i % L, j % L)) for j in range(2 * L)] for i in range(2 * L)])
    rows = tokens.onehot(torch.cat([ids, ids], 1), 20)
    found = net.decoder(net.nodes, net.edges, net.near, rows, table[None])[0, :, :20]
    return found[:L], found[L:]


@torch.no_grad()
def test_tied_logits_are_the_average_of_the_chains() -> None:
    net, ids = designer(dimer()), native()
    x, known = state(ids)
    a, b = by_hand(net, x, lambda i, j: known[j] and (j < i if known[i] else j != i))
    found = net(x)
    assert found.shape == (1, L, 20) and torch.allclose(found[0], (a + b) / 2, atol=1e-5)
    assert torch.allclose(a, b, atol=1e-3)  # the axis makes the chains alike, and neither is read before the other
    alone = designer(structure.load("1A8O"))(x)
    assert float((found - alone).abs().max()) > 0.3  # each chain hears the other one
    bent = dataclasses.replace(dimer(), atoms=torch.cat([dimer().atoms[:L], 1.02 * dimer().atoms[L:]]))
    net = designer(bent)
    a, b = by_hand(net, x, lambda i, j: known[j] and (j < i if known[i] else j != i))
    assert float((a - b).abs().max()) > 0.1 and torch.allclose(net(x)[0], (a + b) / 2, atol=1e-5)


@torch.no_grad()
def test_a_masked_residue_of_a_tied_chain_is_told_what_an_order_of_the_net_tells() -> None:
    """All masks: nothing is known, and any order will do. One residue left: the order's last, in both chains."""
    net, ids = designer(dimer()), native()
    single = mpnn.Designer(mpnn.load("v_48_020"), dataclasses.replace(dimer(), designed=2 * L, copies=1), ZERO, 1.0)
    blank = single.decode(tokens.onehot(torch.full((1, 2 * L), 20), 20), mpnn.read_in(torch.arange(2 * L)))
    assert torch.allclose(net(torch.full((1, L), 20)), (blank[:, :L] + blank[:, L:]) / 2, atol=1e-5)
    x = torch.where(torch.arange(L) == 30, 20, ids)
    order = torch.tensor([i for i in range(2 * L) if i % L != 30] + [30, L + 30])
    rows = tokens.onehot(torch.cat([x, x], 1), 20)
    exact = single.decode(rows, mpnn.read_in(order))[0]
    gap = net(x)[0, 30].softmax(-1) - ((exact[30] + exact[L + 30]) / 2).softmax(-1)
    assert float(gap.abs().sum() / 2) < 0.1  # chain after chain, or both at once: much the same


def test_no_tied_residue_hears_its_own_letter_in_another_chain() -> None:
    net, ids = designer(dimer()), native()
    other = ids.clone()
    other[0, L - 1] = (ids[0, L - 1] + 1) % 20  # the last one read
    with torch.no_grad():
        assert torch.allclose(net(ids)[0, L - 1], net(other)[0, L - 1], atol=1e-5)
    half = torch.tensor([0.0] * 40 + [0.5] + [0.0] * (L - 41))[:, None]  # a residue half known, all others masked
    with torch.no_grad():
        one, two = (net(half * tokens.rows(x, 20)[0] + (1 - half) * MASK)[0] for x in (ids, (ids + 1) % 20))
    assert torch.allclose(one[40], two[40], atol=1e-5) and float((one[41] - two[41]).abs().max()) > 1e-2


def test_the_likelihood_of_tied_chains_reads_both_at_once() -> None:
    found, ids = dimer(), native()
    order = torch.randperm(L, generator=generator(1, "o", 0))
    place = order.argsort()
    net = designer(found)
    with torch.no_grad():
        a, b = by_hand(net, ids, lambda i, j: place[j] < place[i])
        logp = ((a + b) / 2).log_softmax(-1)
        want = -logp.gather(1, ids[0][:, None]).mean()
        assert float(net.nll(tokens.onehot(ids, 20), order)) == pytest.approx(float(want), abs=1e-5)
    model = SimpleNamespace(codec=proteins.Residues(found))
    reward = proteins.likelihood(MpnnNll(orders=2), build(teacher=model))
    rows = tokens.onehot(torch.cat([ids, ids.flip(1)]), 20).requires_grad_(True)
    values = reward(rows, {})
    assert float((values[0] - values[1]).detach()) > 0.5
    values.sum().backward()
    assert rows.grad is not None and float(rows.grad.abs().sum()) > 0


def test_gradients_of_tied_chains_repeat() -> None:
    net, (x, _) = designer(dimer()).requires_grad_(True), state(native().expand(3, -1))

    def slopes() -> list[Tensor]:
        return list(torch.autograd.grad(net(x).log_softmax(-1).square().sum(), list(net.parameters())))

    assert all(a.equal(b) for a, b in zip(slopes(), slopes(), strict=True))


@torch.no_grad()
def test_partners_are_read_before_what_is_designed(trimer: Path) -> None:
    found = structure.read(trimer, "B,A,C")
    assert (found.designed, found.copies, found.by_chain("G" * L)["B"]) == (L, 1, "G" * L)
    assert found.partners == structure.load("1A8O").native + structure.load("1A8O").native[::-1]
    net, ids = designer(found), native()
    x, known = state(ids)
    answers, partners = net(x)[0], torch.arange(L, 3 * L)
    place, hidden = known.nonzero()[:, 0], (~known).nonzero()[:, 0]
    rows = net.whole(tokens.onehot(ids, 20))
    for i in hidden[:4].tolist():
        order = torch.cat([partners, place, torch.tensor([i]), hidden[hidden != i]])
        assert torch.allclose(answers[i], net.decode(rows, mpnn.read_in(order))[0, i], atol=1e-4)
    order = torch.randperm(L, generator=generator(0, "o", 0))
    logp = net.decode(rows, mpnn.read_in(torch.cat([partners, order]))).log_softmax(-1)
    want = -logp[0].gather(1, ids[0][:, None]).mean()
    assert float(net.nll(tokens.onehot(ids, 20), order)) == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "order", "copies"),
    [
        ({"tied": "A,B"}, "AB", 2),
        ({"tied": "B,A"}, "BA", 2),
        ({"tied": "A,B,C"}, "ABC", 3),
        ({"tied": ["A", "B"], "chain": "B,C"}, "BAC", 2),
        ({"tied": "A, B", "chain": "A,C,B"}, "ABC", 2),
        ({"chain": "C,A"}, "CA", 1),
    ],
)
def test_designed_tied_and_partner_chains(config: dict[str, Any], order: str, copies: int, trimer: Path) -> None:
    read = Mpnn(structure=str(trimer), **config)
    found = structure.load(read.structure, read.chain, read.tied)
    assert ("".join(dict.fromkeys(found.chains)), found.copies, found.designed) == (order, copies, L)


def test_the_command_line_ties_chains() -> None:
    for name in ("sequence/drakes-protein", "sequence/best-of-n-protein"):
        assert recipes.load(name, inputs={"tied": "A,B"}).teacher.tied == "A,B"
        assert recipes.load(name, ["teacher.tied=[A, B]"]).teacher.tied == "A,B"


def cut(path: Path, folder: Path, *gone: str) -> Path:
    """The file without residues such as `B 155`."""
    lines = [line for line in path.read_text().splitlines(True) if f"{line[21:22]} {line[22:27].strip()}" not in gone]
    (folder / "cut.pdb").write_text("".join(lines))
    return folder / "cut.pdb"


@pytest.mark.parametrize(
    ("config", "gone", "message"),
    [
        ({"tied": "A"}, [], "tied names the chain A alone; name two or more"),
        ({"tied": "A,Z"}, [], "no protein chain Z; it has A, B, C"),
        ({"tied": "A,A"}, [], "A,A is named twice"),
        ({"tied": "A,B", "chain": "C"}, [], "the designed chain C is not among the tied ones"),
        ({"tied": "A,B"}, ["B 155"], "chains A and B cannot be tied: B has no residue 155;"),
        ({"tied": "A,B"}, ["A 151", "A 152"], r"A has no residue 151 \(2 such residues\); model it"),
        ({"tied": "A,B"}, ["A 151", "B 220"], "B has no residue 220 .2 such"),
        ({"tied": "A,C", "fixed": "152"}, [], "teacher.fixed: residue 152 is D, Q in the tied chains; leave it out"),
    ],
)
def test_what_cannot_be_tied_gets_one_line(
    config: dict[str, Any], gone: list[str], message: str, trimer: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        proteins.teacher(Mpnn(structure=str(cut(trimer, tmp_path, *gone)), **config), build())
    assert "\n" not in str(caught.value)


def run_of(config: Mpnn) -> Any:
    model = proteins.teacher(config, build())
    run = build(teacher=model)
    run.recipe = SimpleNamespace(seed=0, sample=SimpleNamespace(prompts=["", ""], count=2), rewards=None, sampler=None)
    pieces = {"teacher": model, "space": space.build(Designs(steps=4), run)}
    run.has, run.piece = pieces.__contains__, pieces.__getitem__
    return run


def test_exported_files_hold_every_chain_and_tied_ones_are_alike(trimer: Path, tmp_path: Path) -> None:
    run = run_of(Mpnn(structure=str(trimer), tied="A,B", chain="A,C", fixed="151-153", temperature=0.5))
    model, sequence = run.piece("teacher"), structure.load("1A8O").native
    drawn = space.draw(model, space.teacher_walk(model, 4), ["", ""], 0, CPU)
    texts = tokens.decode(drawn, PROTEIN)
    assert model.shape == (L,) and texts[0] != texts[1] and all(text.startswith(sequence[:3]) for text in texts)
    for write, suffix in ((proteins.export_pdb, ".pdb"), (proteins.export_cif, ".cif")):
        for path, text in zip(write(run, tmp_path), texts, strict=True):
            back = {chain: structure.read(path, chain).native for chain in "ABC"}
            assert path.suffix == suffix and back == {"A": text, "B": text, "C": sequence[::-1]}
            assert torch.allclose(structure.read(path, "A,B,C").atoms, structure.read(trimer, "A,B,C").atoms, atol=1e-3)
            assert factors(path, "A") == factors(path, "B") and set(factors(path, "C")) == {100.0}
    (path,) = run.piece("space").export(run, tmp_path, "fasta")
    records = {record.id: record.text for record in fasta.read(path, PROTEIN)}
    assert list(records) == [f"design-000{i}_{chain}" for i in (1, 2) for chain in "ABC"]
    assert [records[f"design-000{i}_{chain}"] for i in (1, 2) for chain in "AB"] == [texts[0]] * 2 + [texts[1]] * 2
    assert records["design-0002_C"] == sequence[::-1]
    scored = export.designs(model, drawn, ["", ""], {"reward": [0.25, 0.5]})
    heads = [line for line in export.as_fasta(scored, tmp_path).read_text().splitlines() if line.startswith(">")]
    assert [line.split("reward=")[1] for line in heads] == ["0.25"] * 3 + ["0.5"] * 3


def factors(path: Path, chain: str) -> list[float]:
    """B-factors of a chain's alpha carbons."""
    found = structure.parsed(path.read_text(), path.name)[chain]
    return [residue["CA"].get_bfactor() for residue in found]


def test_a_single_chain_is_written_under_the_designs_name(tmp_path: Path) -> None:
    (path,) = (run := run_of(Mpnn())).piece("space").export(run, tmp_path, "fasta")
    assert [record.id for record in fasta.read(path, PROTEIN)] == ["design-0001", "design-0002"]


def test_contacts_of_tied_chains_count_both_and_what_lies_between() -> None:
    pair = dimer()
    near, every = contacts.pairs(pair, 8.0)
    place = mpnn.beta(pair.atoms)
    gap = (place[:, None] - place[None]).norm(dim=-1)
    between = gap[:L, L:] < 8.0
    single, alone = contacts.pairs(structure.load("1A8O"), 8.0)
    assert int(between.sum()) > 5 and near.equal(2 * single + between.float())
    assert every.equal(2 * alone + 1)
    reward = contacts.contacts(Contacts(), build(teacher=SimpleNamespace(codec=proteins.Residues(pair))))
    same = tokens.onehot(torch.arange(20)[:, None].expand(-1, L), 20)
    assert float(reward(same, {}).abs().max()) < 1e-5
    assert not reward(tokens.onehot(native(), 20), {}).equal(
        contacts.contacts(Contacts(structure="1A8O"), build())(tokens.onehot(native(), 20), {})
    )
