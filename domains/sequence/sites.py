"""The slot `data` of splicing: natural windows that have a natural donor and a natural acceptor site at their places.

Legend: R regions, L length of a design, M sites of one kind, W bases that a net reads of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from limbeck.core.run.build import Batch, Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import config as settings
from limbeck.domains.sequence import fly, splice, tokens
from limbeck.domains.sequence.data import Pool

INTRON = {"donor": (2, 3), "acceptor": (0, 2)}  # GT begins it, AG ends it
CHUNK = 16384


@dataclass
class Planted(Pool):
    """Natural windows in which sites [M,W] stand from a place on."""

    sites: list[tuple[int, Tensor]] = field(default_factory=list)

    def batch(self, n: int, gen: Generator, rows: slice) -> Batch:
        """x [b,L]: rows of a batch of n."""
        drawn = super().batch(n, gen, rows)
        assert drawn.x is not None
        for start, sites in self.sites:
            some = sites[torch.randint(len(sites), (n,), generator=gen)[rows]].long()
            drawn.x[:, start : start + some.shape[1]] = some
        return drawn


def build(config: settings.SpliceSites, build: Build) -> Planted:
    """The slot `data`: sites of the fly's own regions that the nets are sure of, in other windows of these regions."""
    places = {"donor": config.donor, "acceptor": config.acceptor}
    starts = {site: place - 1 - splice.SITES[site].before for site, place in places.items()}
    if starts["donor"] + splice.Donor.width > starts["acceptor"]:
        raise BadInput("data: what the nets read of donor and acceptor overlaps; move them apart")
    for site, place in places.items():
        splice.window(torch.zeros(1, fly.WINDOW, 4), site, place)  # says which places fit
    bases = fly.regions().of(config.role).bases
    some = bases[torch.randperm(len(bases), generator=generator(build.seed, "sites.regions", 0))[: config.regions]]
    build.note(f"splice sites of {len(some)} regions")
    sites = [(starts[site], sure(some, site, config.least, build)) for site in places]
    return Planted(fly.windows(config.role), fly.windows("test"), config.template, sites=sites)


@torch.no_grad()
def sure(bases: Tensor, site: str, least: float, build: Build) -> Tensor:
    """What the net reads [M,W] of every site of regions [R,...] that it gives at least this probability."""
    kind, net, (first, second) = splice.SITES[site], splice.load(site, build.device), INTRON[site]
    tiles = bases.unfold(1, kind.width, 1)  # [R, places, W], a view
    at = kind.before if site == "donor" else kind.before - 1
    here = ((tiles[..., at] == first) & (tiles[..., at + 1] == second)).nonzero()
    kept = []
    for part in torch.split(here, CHUNK):
        read = tiles[part[:, 0], part[:, 1]]
        score = net(tokens.onehot(read.long(), 4).float().to(build.device)).sigmoid()
        kept.append(read[(score >= least).cpu()])
    found = torch.cat(kept)
    if not len(found):
        raise BadInput(f"data.least: no {site} site of {len(bases)} regions has a probability of {least:g}; lower it")
    return found
