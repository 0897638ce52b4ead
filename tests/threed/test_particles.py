"""Particles: what VSD keeps apart and SDS does not, by an exact critic; a critic that lacks something is caught."""

import pytest
import torch
from torch import Tensor

from limbeck.domains.threed import particle_checks as checks
from limbeck.domains.threed.cameras import Cameras, ring
from limbeck.domains.threed.scene import SceneStudent


class Blind(checks.Points):
    """A critic whose camera is withheld: it knows what the particles look like from anywhere."""

    def means(self, cond: dict[str, Tensor]) -> Tensor:
        around = [ring(8, 4, elevation=degrees) for degrees in (-40.0, -15.0, 15.0, 40.0)]
        pictures = torch.cat([checks.seen(self.points(), cameras).flatten(0, 1) for cameras in around])
        return pictures[None].expand(len(cond["camera"]), -1, -1)


class Alone(checks.Points):
    """A critic that knows the step's particle and no other."""

    def means(self, cond: dict[str, Tensor]) -> Tensor:
        own = int(float(cond["particle"][0]) * checks.PARTICLES)
        return checks.seen(self.points()[own : own + 1], Cameras.of(cond["camera"]))


def test_vsd_keeps_the_teachers_law_and_sds_falls_into_a_point() -> None:
    assert [check.name for check in checks.vsd() if not check.passed] == []


def test_fault_a_critic_without_the_other_particles_is_sds() -> None:
    """So is VSD with one particle: what is left of the critic is the noise that was drawn."""

    def alone(student: SceneStudent) -> Alone:
        return Alone(lambda: checks.places(student), 0.0)

    one, other = checks.particles("vsd", alone, steps=50), checks.particles("sds", checks.exact, steps=50)
    assert (one.within, one.between) == pytest.approx((other.within, other.between), abs=1e-4)


def test_fault_a_critic_without_the_camera() -> None:
    found = checks.particles("vsd", lambda student: Blind(lambda: checks.places(student), 0.0))
    assert found.within < 0.2 and found.between > 2.8
