"""MMSplice's nets in plain torch: known numbers, windows inside a longer sequence, gradient, errors."""

import pytest
import torch

from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.sequence import sites, splice, tokens
from limbeck.domains.sequence.config import Splice, SpliceSites
from limbeck.domains.sequence.text import DNA

DONOR = "AACAGGTAAGTATTTTCA"
ACCEPTOR = "TGACTAACATTTGCTCTTTCTGTTTCTTTTCTTTCCTTTTTTTTCTGCAGGTG"  # a branch point, pyrimidines, CAG|GTG: made up
ACCEPTOR = "T" * (53 - len(ACCEPTOR)) + ACCEPTOR


def reward(**config):
    class Here:
        device = torch.device("cpu")

    return splice.splice(Splice(**config), Here())


def value(text: str, **config) -> float:
    return float(reward(**config)(tokens.onehot(tokens.encode([text], DNA), 4), {}))


def test_donor_has_the_authors_numbers() -> None:
    assert value(DONOR, site="donor", position=6) == pytest.approx(0.9996, abs=1e-3)
    assert value("AACAGCCAAGTATTTTCA", site="donor", position=6) == pytest.approx(0.35, abs=5e-3)


def test_acceptor_knows_a_site_from_none() -> None:
    assert ACCEPTOR[48:50] == "AG" and value(ACCEPTOR, site="acceptor", position=50) > 0.999
    noise = torch.randint(4, (500, 53), generator=generator(0, "t", 0))
    found = reward(site="acceptor", position=50)(tokens.onehot(noise, 4), {})
    assert float(found.median()) < 0.05


@pytest.mark.parametrize(("site", "text", "place"), [("donor", DONOR, 6), ("acceptor", ACCEPTOR, 50)])
def test_a_site_inside_a_longer_sequence_is_the_same_site(site: str, text: str, place: int) -> None:
    alone, inside = (
        value(text, site=site, position=place),
        value("C" * 11 + text + "C" * 9, site=site, position=place + 11),
    )
    assert alone == pytest.approx(inside, abs=1e-6)
    assert abs(value("C" * 11 + text + "C" * 9, site=site, position=place + 10) - alone) > 0.1
    assert value(text, site=site, position=place, scale="logit") == pytest.approx(
        float(torch.logit(torch.tensor(alone, dtype=torch.float64))), rel=1e-2
    )


def test_soft_rows_have_a_gradient_that_repairs_the_site() -> None:
    x = tokens.onehot(tokens.encode(["CC" + "AACAGCTAAGTATTTTCA"], DNA), 4).requires_grad_(True)
    reward(site="donor", position=8, scale="logit")(x, {}).sum().backward()
    assert int(x.grad[0, 7].argmax()) == 2 and float(x.grad[0, :2].abs().sum()) == 0  # G; nothing outside the window


def test_a_place_too_near_an_end_says_which_fit() -> None:
    with pytest.raises(BadInput, match="choose 6 to 8"):
        value("A" * 20, site="donor", position=9)
    with pytest.raises(BadInput, match="reads 53 bases"):
        value("A" * 20, site="acceptor", position=9)
    with pytest.raises(BadInput, match="reads DNA or RNA"):
        reward(site="donor", position=6)(torch.zeros(1, 18, 20), {})


def planted(**config) -> sites.Planted:
    class Here:
        device, seed = torch.device("cpu"), 0
        note = staticmethod(lambda text: None)

    return sites.build(SpliceSites(regions=16, least=0.6, **config), Here())


def test_natural_sites_stand_at_their_places_in_natural_windows() -> None:
    data = planted(donor=21, acceptor=170)
    x = data.batch(64, generator(0, "t", 0), slice(0, 64)).x
    for site, place, letters in (("donor", 21, (2, 3)), ("acceptor", 170, (0, 2))):
        found = reward(site=site, position=place)(tokens.onehot(x, 4), {})
        beside = reward(site=site, position=place - 1)(tokens.onehot(x, 4), {})
        assert float(found.min()) >= 0.6 and float(beside.median()) < 0.5
        first = place - 1 if site == "donor" else place - 2
        assert x[:, first : first + 2].unique(dim=0).tolist() == [list(letters)]
    assert len(x.unique(dim=0)) == 64
    halves = [data.batch(64, generator(0, "t", 0), rows).x for rows in (slice(0, 20), slice(20, 64))]
    assert torch.equal(torch.cat(halves), x)


def test_sites_that_cannot_be_had_say_so() -> None:
    with pytest.raises(BadInput, match="overlaps; move them apart"):
        planted(donor=100, acceptor=140)
    with pytest.raises(BadInput, match="sequence.splice: acceptor at position 199 of 200"):
        planted(acceptor=199)
