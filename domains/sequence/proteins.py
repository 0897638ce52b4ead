"""Proteins on a given backbone: ProteinMPNN as the teacher, its likelihood and ProtParam as rewards, threaded designs.

Legend: B sequences, L designed residues, V = 20 letters.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.diffusion.denoiser import Encoded, Model
from limbeck.core.diffusion.discrete import NEVER, MaskProcess, TokenNetwork
from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence import export, fasta, models, mpnn, tokens
from limbeck.domains.sequence.structure import Structure, load, thread
from limbeck.domains.sequence.text import PROTEIN

LEAST = 2  # residues of a backbone
NLL = "-NLL"  # how the names of likelihoods as rewards begin
PROPERTIES = {
    "instability": "instability_index",
    "gravy": "gravy",
    "isoelectric": "isoelectric_point",
    "aromaticity": "aromaticity",
}


class Residues(tokens.Letters):
    """The codec of a backbone's sequences; it keeps the backbone."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(PROTEIN)
        self.structure = structure

    @property
    def native(self) -> str:
        """The designed chain's own sequence, X where unknown."""
        return self.structure.native

    def records(self, name: str, text: str) -> list[fasta.Record]:
        """A design in FASTA files: one record, or where the backbone has several chains NAME_CHAIN for each."""
        found = self.structure.by_chain(text)
        if len(found) == 1:
            return super().records(name, text)
        return [fasta.Record(f"{name}_{chain}", letters) for chain, letters in found.items()]


class Templates:
    """Prompts as conditions: `fixed` [B,L] has the native residues that are kept, and the letters of a prompt."""

    def __init__(self, structure: Structure, fixed: list[int], omit: str, device: torch.device) -> None:
        self.own = models.Templates(PROTEIN, structure.designed, device)
        native = structure.native
        self.kept = "".join(native[i] if i in set(fixed) else "X" for i in range(len(native)))
        self.omit = omit

    def __call__(self, prompts: list[str]) -> Encoded:
        return self.own([self.joined(prompt) for prompt in prompts])

    def place(self, x: Tensor, cond: Encoded) -> Tensor:
        """A first state x [B,L] with what is fixed."""
        return self.own.place(x, cond)

    def joined(self, prompt: str) -> str:
        """A prompt of L letters (X is free), or an empty one, with the residues that are kept."""
        text = self.own.text(prompt) or self.kept
        for i, (asked, kept) in enumerate(zip(text, self.kept, strict=True), 1):
            if asked in "BZJ":
                raise BadInput(f"the prompt's {asked} at position {i} stands for several residues; write one, or X")
            if asked in self.omit and kept == "X":
                raise BadInput(f"the prompt asks for {asked} at position {i}, which teacher.omit rules out")
            if "X" not in (asked, kept) and asked != kept:
                raise BadInput(f"the prompt asks for {asked} at position {i}, where teacher.fixed keeps {kept}")
        return "".join(kept if asked == "X" else asked for asked, kept in zip(text, self.kept, strict=True))


def teacher(config: settings.Mpnn, build: Build) -> Model:
    """Factory of sequence.mpnn: the masked denoiser of one backbone; a prompt is a template of its length, or empty."""
    structure = checked(load(config.structure, config.chain, config.tied))
    fixed = kept(structure, config.fixed)
    net = mpnn.Designer(mpnn.load(config.weights), structure, biases(config.bias, config.omit), config.temperature)
    denoiser = TokenNetwork(net.to(build.device), MaskProcess(PROTEIN.size), mpnn.call, timed=False)
    encode = Templates(structure, fixed, config.omit, build.device)
    name = f"{structure.name} {config.weights}"
    return Model(denoiser, (structure.designed,), Residues(structure), encode, name, place=encode.place)


def kept(structure: Structure, text: str) -> list[int]:
    """Where the residues with the numbers of `10-20,35` lie; BadInput where the native letter is not known or not one.

    Tied chains may differ in nature: what is kept must be the same in all of them.
    """
    found, size = structure.places(text, "teacher.fixed"), structure.designed
    for i in found:
        natives = {structure.text[copy * size + i] for copy in range(structure.copies)}
        if "X" in natives:
            raise BadInput(f"teacher.fixed: nobody knows what residue {structure.numbers[i]} is; leave it out")
        if len(natives) > 1:
            who = f"residue {structure.numbers[i]} is {', '.join(sorted(natives))} in the tied chains"
            raise BadInput(f"teacher.fixed: {who}; leave it out")
    return found


def biases(given: dict[str, float], omit: str) -> Tensor:
    """Nats that are added to each letter's logit [V], -1e6 for those that may not occur."""
    out = tokens.biases(given, PROTEIN, "teacher.bias")
    out[tokens.biases(dict.fromkeys(omit, 1.0), PROTEIN, "teacher.omit") > 0] = NEVER
    if bool((out == NEVER).all()):
        raise BadInput("teacher.omit leaves no residue; admit one")
    return out


def checked(structure: Structure) -> Structure:
    """Itself; BadInput for a backbone on which nothing can be designed."""
    if structure.designed < LEAST:
        raise BadInput(f"{structure.name}: chain {structure.chains[0]} has one residue; give a protein")
    return structure


def structure_of(build: Build, config: settings.MpnnNll | settings.Contacts | None = None) -> Structure:
    """The backbone that a reward names, else the teacher's."""
    if config is not None and config.structure is not None:
        return checked(load(config.structure, config.chain, config.tied))
    codec: Any = build.piece("teacher").codec if build.has("teacher") else None
    if not isinstance(codec, Residues):
        raise BadInput("which backbone? the recipe's teacher has none: set the reward's structure, such as 1A8O")
    return codec.structure


def likelihood(config: settings.MpnnNll, build: Build) -> Reward:
    """Factory of the reward sequence.mpnn_nll: minus the nats a residue by other weights, a mean over fixed orders.

    Partner chains are read first, tied residues at once. The judge is a sibling of the teacher: the same net, trained
    on the same chains with other noise or a part of them. What both are wrong about it does not see.
    """
    structure = structure_of(build, config)
    net = mpnn.Designer(mpnn.load(config.weights), structure, torch.zeros(PROTEIN.size), 1.0).to(build.device)
    net.requires_grad_(False)
    size = structure.designed
    drawn = [torch.randperm(size, generator=generator(config.seed, "mpnn.order", k)) for k in range(config.orders)]
    orders = [order.to(build.device) for order in drawn]

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        if x.shape[1:] != (size, PROTEIN.size):
            raise BadInput(f"sequence.mpnn_nll reads the {size} residues of {structure.name}")
        return -torch.stack([net.nll(x.float(), order) for order in orders]).mean(0)

    name = f"{NLL} {config.weights} (sibling model)"
    return Reward(score, name, "onehot", differentiable=True, accepts_soft=True, chunk=32)


def protparam(config: settings.ProtParam, build: Build) -> Reward:
    """Factory of the reward sequence.protparam: a property by Biopython's ProtParam, or how near it is to a target.

    Instability (Guruprasad et al. 1990) counts as minus itself where no target is given: above 40 is called unstable.
    """
    analysis = fasta.biopython("SeqUtils.ProtParam").ProteinAnalysis
    sign = -1.0 if config.property == "instability" else 1.0

    def one(text: str) -> float:
        value = float(getattr(analysis(text), PROPERTIES[config.property])())
        return sign * value if config.target is None else -abs(value - config.target)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        return torch.tensor([one(text) for text in tokens.decode(x, PROTEIN)], device=x.device)

    return Reward(score, f"{config.property} (ProtParam, proxy)", "tokens")


def export_pdb(build: Build, path: Path) -> list[Path]:
    """Exporter sequence.pdb: every design threaded on the backbone, as PDB."""
    return threaded(build, path, ".pdb")


def export_cif(build: Build, path: Path) -> list[Path]:
    """Exporter sequence.cif: every design threaded on the backbone, as mmCIF."""
    return threaded(build, path, ".cif")


def threaded(build: Build, path: Path, suffix: str) -> list[Path]:
    """The recipe's designs on the backbone, one file each; B-factors from the net.

    The confidence is p(residue | all but an eighth of the others) at temperature 1, whatever the walk's is.
    """
    structure = structure_of(build)
    model: Model = build.piece("teacher")
    space = build.piece("space")
    prompts = space.prompts(build, build.recipe.sample.count * space.config.n)
    found = export.designs(model, space.result(build, prompts, build.recipe.seed), prompts, {})
    denoiser: Any = copy.deepcopy(build.piece("student").denoiser if build.has("student") else model.denoiser)
    denoiser.network.net.temperature = 1.0
    probs = torch.cat(list(export.conditional(model, denoiser, found)))
    sure = probs.gather(2, found.ids[..., None])[..., 0].tolist()
    rows = zip(found.names, found.texts, sure, strict=True)
    return [thread(structure, text, row, path / f"{name}{suffix}") for name, text, row in rows]


def export_weights(build: Build, path: Path) -> list[Path]:
    """Exporter sequence.mpnn: the tuned net as one file that `weights` takes."""
    model: Model = build.piece("teacher")
    tuned: Any = build.piece("student").denoiser if build.has("student") else model.denoiser
    net = tuned.network.net
    if not isinstance(net, mpnn.Designer):
        raise BadInput("sequence.mpnn writes ProteinMPNN weights; this recipe's teacher is another net (try masked)")
    path.mkdir(parents=True, exist_ok=True)
    return [mpnn.save(net, path / "proteinmpnn.safetensors")]
