"""A contact potential over a backbone, as a reward that says it is a proxy: no model of stability comes with limbeck.

Legend: B sequences, L residues, V = 20 letters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.rewards.base import Condition, Reward
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.sequence.config import Contacts
from limbeck.domains.sequence.mpnn import beta
from limbeck.domains.sequence.proteins import structure_of
from limbeck.domains.sequence.structure import Structure
from limbeck.domains.sequence.text import PROTEIN

# Hydropathy of Kyte & Doolittle 1982, from -4.5 to 4.5.
HYDROPATHY = {
    "A": 1.8, "C": 2.5, "D": -3.5, "E": -3.5, "F": 2.8, "G": -0.4, "H": -3.2, "I": 4.5, "K": -3.9, "L": 3.8,
    "M": 1.9, "N": -3.5, "P": -1.6, "Q": -3.5, "R": -4.5, "S": -0.8, "T": -0.7, "V": 4.2, "W": -0.9, "Y": -1.3,
}  # fmt: skip
CHARGE = {"D": -1.0, "E": -1.0, "K": 1.0, "R": 1.0}
APART = 3  # residues along the chain from which on a contact is one


def energies() -> Tensor:
    """The energy of a pair in contact [V,V]: minus the product of hydropathies on [0,1], plus that of the charges."""
    hydropathy = torch.tensor([(HYDROPATHY[letter] + 4.5) / 9 for letter in PROTEIN.letters])
    charge = torch.tensor([CHARGE.get(letter, 0.0) for letter in PROTEIN.letters])
    return torch.outer(charge, charge) - torch.outer(hydropathy, hydropathy)


def pairs(structure: Structure, cutoff: float) -> tuple[Tensor, Tensor]:
    """Pairs of designed residues [L,L]: how many are in contact, by their (virtual) beta carbons, and how many in all.

    i < j within a chain; of tied chains every pair of residues counts, whichever copies it joins. Partners do not.
    """
    copies, size = structure.copies, structure.designed
    place = beta(structure.atoms)[: copies * size]
    index, chain = (torch.tensor(x)[: copies * size] for x in (structure.index, structure.chain_numbers))
    within = (chain[:, None] == chain[None]) & (index[None] - index[:, None] >= APART)
    every = within | (chain[:, None] < chain[None])
    near = (place[:, None] - place[None]).norm(dim=-1) < cutoff
    folded = [x.float().view(copies, size, copies, size).sum((0, 2)) for x in (every & near, every)]
    return folded[0], folded[1]


def contacts(config: Contacts, build: Build) -> Reward:
    """Factory of the reward sequence.contacts: by how much pairs in contact are better than all pairs of the sequence.

    The mean energy of all pairs minus that of the pairs in contact. All pairs stand for the same composition in random
    places, so that nothing is gained by one letter everywhere.
    """
    structure = structure_of(build, config)
    near, every = pairs(structure, config.cutoff)
    if not bool(near.any()):
        raise BadInput(f"sequence.contacts: {structure.name} has no pair within {config.cutoff:g} A; raise cutoff")
    table = energies().to(build.device)
    weight = (every / every.sum() - near / near.sum()).to(build.device)

    def score(x: Tensor, cond: Condition, *, t: Tensor | None, gen: torch.Generator | None) -> Tensor:
        if x.shape[1:] != (structure.designed, PROTEIN.size):
            raise BadInput(f"sequence.contacts reads the {structure.designed} residues of {structure.name}")
        x = x.float()
        return torch.einsum("bip,pq,bjq,ij->b", x, table, x, weight)

    return Reward(score, "contacts (proxy)", "onehot", differentiable=True, accepts_soft=True)
