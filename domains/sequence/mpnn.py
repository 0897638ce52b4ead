"""ProteinMPNN in plain torch, and as a masked denoiser of the residues of one backbone.

Dauparas et al. 2022 (Robust deep learning-based protein sequence design using ProteinMPNN). The weights are the
authors' own (assets/proteinmpnn). Legend: B sequences, L residues, K = min(48, L) nearest residues, H = 128 channels,
V = 20 letters; the mask is letter V.

What a residue is told. The net was trained to read residues in a random order: residue i hears of each neighbour j
either its sequence and decoder state (j comes before i) or its encoder state alone. A masked state says which residues
are known, not in which order they became so. Here a masked residue hears of every known one, and a known residue of
those known ones that come before it along the chain: as if the known ones had been read from the first to the last,
then i. So each answer is one that the authors' net gives at an order that it was trained on, and all masked residues
are answered in one pass, since none hears of another. Partner chains are read before all others, as the authors read
what is not designed. On 1A8O and 1QNJ a random order among the known ones moves an answer by .01 to .03 in total
variation (a quarter to all but a twentieth known), about as much as random orders differ from each other; the native
residues are .01 nats more or less likely.

Tied chains (homo-oligomers) are one chain to the outside: a letter is written into all copies, and the logits of a
residue's copies are averaged, as the authors do. Copies are read at once, so none hears of its own letter; in the
authors' loop a copy hears of the state, without the letter, of those before it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.diffusion.denoiser import Encoded
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.domains.sequence import tokens
from limbeck.domains.sequence.structure import Structure
from limbeck.domains.sequence.text import PROTEIN

ASSET = Path(__file__).parent / "assets" / "proteinmpnn"
H, NEAR, FAR, BINS = 128, 48, 32, 16  # channels, neighbours, residues along the chain, bins of a distance
SCALE = 30  # the authors' divisor of a sum over neighbours
AT_ONCE = 256  # residues on a CPU without gradients: larger arrays are taken from the system anew every time
V = PROTEIN.size
Told = tuple[Tensor, Tensor, Tensor]  # letters embedded [B,L,H], known [B,L,1], who hears of a neighbour [B or 1,L,K,1]
# Pairs of atoms in the order of the authors' features: A is the alpha carbon, B the beta one.
PAIRS = "AA NN CC OO BB AN AC AO AB NC NO NB BC BO OC NA CA OA BA CN ON BN CB OB CO".split()


def gather(nodes: Tensor, near: Tensor) -> Tensor:
    """The rows of nodes [...,L,C] at neighbours near [L,K], [...,L,K,C].

    Not by indexing with `near`, whose gradient is summed by several threads in no fixed order: runs would not repeat.
    """
    rows = nodes.index_select(-2, near.flatten())
    return rows.view(*nodes.shape[:-2], *near.shape, nodes.shape[-1])


class FeedForward(nn.Module):
    """Two layers on each residue."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(H, 4 * H), nn.Linear(4 * H, H)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.outer(F.gelu(self.inner(x)))
        return found


class Message(nn.Module):
    """Three layers on a residue, an edge and what is known of the neighbour, in parts of H channels each."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(parts * H, H), nn.Linear(H, H), nn.Linear(H, H)

    def part(self, number: int, x: Tensor) -> Tensor:
        """The share [...,H] that part `number` of the input has in the first layer: it is linear."""
        return F.linear(x, self.first.weight[:, number * H : (number + 1) * H])

    def hidden(self, total: Tensor) -> Tensor:
        """What lies before the third layer, for the sum of all parts [...,H]."""
        found: Tensor = F.gelu(self.second(F.gelu(total + self.first.bias)))
        return found

    def mean(self, total: Tensor) -> Tensor:
        """The message of all neighbours [...,L,H], from [...,L,K,H]; the third layer is linear and comes last."""
        weight, bias = self.third.weight, self.third.bias
        return F.linear(self.hidden(total).sum(-2), weight, bias * total.shape[-2]) / SCALE


class EncoderLayer(nn.Module):
    """Residues hear of their neighbours, then edges of both residues."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(H), nn.LayerNorm(H), nn.LayerNorm(H)
        self.nodes, self.edges, self.dense = Message(3), Message(3), FeedForward()

    def forward(self, v: Tensor, e: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        v = self.norm1(v + self.nodes.mean(self._total(self.nodes, v, e, near)))
        v = self.norm2(v + self.dense(v))
        hidden = self.edges.hidden(self._total(self.edges, v, e, near))
        return v, self.norm3(e + self.edges.third(hidden))

    def _total(self, message: Message, v: Tensor, e: Tensor, near: Tensor) -> Tensor:
        return message.part(0, v)[:, None] + message.part(1, e) + gather(message.part(2, v), near)


class DecoderLayer(nn.Module):
    """Residues hear of their neighbours' letters and states, or of their encoder states alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.nodes, self.dense = Message(4), FeedForward()

    def forward(self, v: Tensor, still: Tensor, e: Tensor, near: Tensor, told: Told) -> Tensor:
        """New states [B,L,H] of v [B,L,H], the encoder's states still [L,H] and edges e [L,K,H]."""
        letters, known, hears = told
        part = self.nodes.part
        news = part(2, letters) + known * part(3, v - still)  # what a neighbour adds for those who hear of it
        old = part(1, e) + gather(part(3, still), near)
        v = self.norm1(v + self.nodes.mean(part(0, v)[..., None, :] + old + hears * gather(news, near)))
        out: Tensor = self.norm2(v + self.dense(v))
        return out


class Encoder(nn.Module):
    """Backbones to residues' and edges' states."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.edges = nn.Linear(2 * FAR + 2, BINS), nn.Linear(BINS + 25 * BINS, H, bias=False)
        self.norm, self.lift = nn.LayerNorm(H), nn.Linear(H, H)
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(3))

    def forward(self, structure: Structure) -> tuple[Tensor, Tensor, Tensor]:
        """States of residues [L,H] and of edges [L,K,H], and the neighbours [L,K]."""
        atoms = structure.atoms.to(self.lift.weight)
        near = neighbours(atoms[:, 1])
        features = torch.cat([self.places(self._places(structure, near)), distances(atoms, near)], -1)
        e = self.lift(self.norm(self.edges(features)))
        v = e.new_zeros(len(atoms), H)
        for layer in self.layers:
            v, e = layer(v, e, near)
        return v, e, near

    def _places(self, structure: Structure, near: Tensor) -> Tensor:
        """How far each neighbour lies along the chain, one-hot [L,K,66]; the last column is another chain."""
        index, chain = (torch.tensor(x, device=near.device) for x in (structure.index, structure.chain_numbers))
        offset = (index[:, None] - index[near] + FAR).clamp(0, 2 * FAR)
        offset = torch.where(chain[:, None] == chain[near], offset, 2 * FAR + 1)
        return F.one_hot(offset, 2 * FAR + 2).to(self.lift.weight)


class Decoder(nn.Module):
    """Letters of known residues to logits of every residue."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(V + 1, H)
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(3))
        self.out = nn.Linear(H, V + 1)

    def forward(self, v: Tensor, e: Tensor, near: Tensor, rows: Tensor, hears: Tensor) -> Tensor:
        """Logits [B,L,21] (the last is X) of rows [B,L,V], whose sum says how far a residue is known.

        `hears` [B or 1,L,L] is 1 where residue i hears of j as far as j is known.
        """
        known, still = rows.sum(-1, keepdim=True), v
        some = hears.gather(2, near.expand(len(hears), -1, -1))[..., None]
        told = rows @ self.letters.weight[:V], known, some
        v = still.expand(len(rows), -1, -1)
        for layer in self.layers:
            v = layer(v, still, e, near, told)
        logits: Tensor = self.out(v)
        return logits


class ProteinMPNN(nn.Module):
    """The whole net."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()


def neighbours(ca: Tensor) -> Tensor:
    """The nearest residues [L,K] by their alpha carbons [L,3], the residue itself first."""
    distance = ((ca[:, None] - ca[None]).square().sum(-1) + 1e-6).sqrt()
    return distance.topk(min(NEAR, len(ca)), largest=False).indices


def beta(atoms: Tensor) -> Tensor:
    """Where the beta carbon would be [L,3], from N, CA, C of atoms [L,4,3] in Angstrom."""
    n, ca, c = atoms[:, 0], atoms[:, 1], atoms[:, 2]
    b, d = ca - n, c - ca
    found: Tensor = -0.58273431 * torch.linalg.cross(b, d) + 0.56802827 * b - 0.54067466 * d + ca
    return found


def distances(atoms: Tensor, near: Tensor) -> Tensor:
    """Radial features [L,K,25*16] of the distances between N, CA, C, O and the virtual beta carbon."""
    points = dict(zip("NACOB", [*atoms.unbind(1), beta(atoms)], strict=True))
    means = torch.linspace(2, 22, BINS, device=atoms.device, dtype=atoms.dtype)
    found = []
    for pair in PAIRS:
        gap = (points[pair[0]][:, None] - points[pair[1]][near]).square().sum(-1)
        found.append(torch.exp(-(((gap + 1e-6).sqrt()[..., None] - means) / (20 / BINS)).square()))
    return torch.cat(found, -1)


class Designer(nn.Module):
    """The masked denoiser of one backbone: logits [B,L,V] of ids [B,L] or rows [B,L,V+1], L the designed residues.

    The encoder ran once; its output is constant, and only the decoder has parameters (to be tuned, or not). Letters are
    written into all tied chains and their logits averaged; partner chains are context whose sequence is known. `bias`
    [V] is added to the logits, then all are divided by the temperature. Soft rows: a residue is known as far as its row
    has no mass on the mask. L' counts the residues of all chains.
    """

    nodes: Tensor
    edges: Tensor
    near: Tensor
    bias: Tensor
    context: Tensor
    rank: Tensor

    def __init__(self, net: ProteinMPNN, structure: Structure, bias: Tensor, temperature: float) -> None:
        super().__init__()
        self.structure, self.temperature, self.decoder = structure, temperature, net.decoder
        with torch.no_grad():
            v, e, near = net.encoder(structure)
        context = tokens.onehot(tokens.encode([structure.partners], PROTEIN), V).to(v)
        kept = {"nodes": v, "edges": e, "near": near, "bias": bias.to(v), "context": context}
        kept["rank"] = self.ranked(torch.arange(structure.designed))
        for name, value in kept.items():
            self.register_buffer(name, value, persistent=False)
        self._frozen = [net.encoder]  # no part of what is tuned; exporters write it

    @property
    def encoder(self) -> Encoder:
        """The encoder that the states come from."""
        return self._frozen[0]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.is_cuda:
            return self.answer(x)
        return torch.cat([self.answer(part) for part in torch.split(x, max(1, AT_ONCE // len(self.nodes)))])

    def answer(self, x: Tensor) -> Tensor:
        """The logits of all rows in one pass."""
        rows = self.whole(tokens.rows(x, V).to(self.nodes)[..., :V])
        return (self.decode(rows, told_by(rows.sum(-1), self.rank)) + self.bias) / self.temperature

    def whole(self, rows: Tensor) -> Tensor:
        """Rows [B,L',V] of all chains, for those of the designed one [B,L,V]."""
        return torch.cat([rows.repeat(1, self.structure.copies, 1), self.context.expand(len(rows), -1, -1)], 1)

    def ranked(self, order: Tensor) -> Tensor:
        """When each residue is read [L'] if the designed ones are read in the order [L]: partners come first."""
        partners = torch.arange(len(self.structure.partners), device=order.device)
        return torch.cat([order.argsort().repeat(self.structure.copies) + len(partners), partners])

    def decode(self, rows: Tensor, hears: Tensor) -> Tensor:
        """The net's own logits [B,L,V] of rows [B,L',V] where hears [B or 1,L',L'] says who hears of whom.

        Those of tied residues are averaged (Dauparas et al. 2022).
        """
        copies, size = self.structure.copies, self.structure.designed
        logits: Tensor = self.decoder(self.nodes, self.edges, self.near, rows, hears)[:, : copies * size, :V]
        return logits.reshape(len(logits), copies, size, V).mean(1)

    def nll(self, rows: Tensor, order: Tensor) -> Tensor:
        """Mean negative log-likelihood [B] in nats a designed residue of rows [B,L,V], read in the order [L]."""
        logp = torch.log_softmax(self.decode(self.whole(rows), after(self.ranked(order))[None].to(rows)), -1)
        return -(rows * logp).sum(-1).mean(1)


def after(rank: Tensor) -> Tensor:
    """Which residues are read after which, bool [L,L], for when each is read [L]."""
    return rank[:, None] > rank[None]


def told_by(known: Tensor, rank: Tensor) -> Tensor:
    """Who hears of whom [B,L,L] for how far each is known [B,L] and when it is read [L]: see the module's convention.

    A known residue hears of those read before it, a masked one of all others, but for copies of itself.
    """
    apart = rank[:, None] != rank[None]
    return known[..., None] * after(rank).to(known) + (1 - known[..., None]) * apart.to(known)


def read_in(order: Tensor) -> Tensor:
    """Who hears of whom [1,L,L] where order [L] lists the residues as they are read: of those before."""
    return after(order.argsort()).float()[None]


def call(net: nn.Module, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """The number of masks says the time."""
    logits: Tensor = net(x)
    return logits


def load(weights: str) -> ProteinMPNN:
    """The net with embedded weights (v_48_020 …) or with those of a file of `limbeck export`, frozen."""
    path = ASSET / f"{weights}.safetensors" if weights in names() else Path(weights).expanduser()
    if not path.is_file():
        hint = did_you_mean(weights, names()) or f"; embedded ones: {', '.join(names())}"
        raise BadInput(f"there are no ProteinMPNN weights {clean(weights, 80)}{hint}")
    net = ProteinMPNN()
    try:
        net.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    except (RuntimeError, OSError, SafetensorError) as error:
        raise BadInput(f"{clean(path, 80)} holds no ProteinMPNN as limbeck writes it: {clean(error, 80)}") from None
    return net.eval().requires_grad_(False)


def save(net: Designer, path: Path) -> Path:
    """Writes a designer's weights, encoder and decoder, as one file that `weights` takes."""
    both = {"encoder": net.encoder, "decoder": net.decoder}
    state = {f"{part}.{name}": value for part, one in both.items() for name, value in one.state_dict().items()}
    save_file({name: value.detach().cpu().float().contiguous() for name, value in state.items()}, path)
    return path


def names() -> list[str]:
    """The embedded weights."""
    return sorted(path.stem for path in ASSET.glob("*.safetensors"))
