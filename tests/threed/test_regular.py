"""Regularisers: each on values computed by hand, what is computed when, and what densification is told."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Sample
from limbeck.core.distillation.config import Score
from limbeck.core.distillation.matching import build_score
from limbeck.core.distillation.source import Source
from limbeck.core.run.build import Build
from limbeck.core.run.config import OptimConfig
from limbeck.core.run.context import Context
from limbeck.core.run.errors import BadInput
from limbeck.core.run.players import Player, compose
from limbeck.core.run.rng import Draws
from limbeck.domains.threed import config as settings
from limbeck.domains.threed import posed, regular, volume
from limbeck.domains.threed.cameras import ring
from limbeck.domains.threed.scene import SceneStudent

ALPHA = torch.tensor([[[[0.0, 1.0], [0.3, 0.6]]]], dtype=torch.float64)


def context(step: int = 0, batch: int = 2) -> Context:
    return Context(step, "make", Draws(0, step, batch, 0, 1), 1, 0, torch.device("cpu"))


def test_opacity() -> None:
    found = sum(math.sqrt(a * a + 0.01) for a in (0.0, 1.0, 0.3, 0.6)) / 4
    assert regular.opacity(ALPHA).item() == pytest.approx(found)


def test_opaque_is_the_entropy_and_its_whole_gradient() -> None:
    """With a constant target the gradient of p log p + (1-p) log(1-p) loses log(1-p) - log p, all that there is."""
    alpha = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    value = regular.opaque(alpha)
    assert value.item() == pytest.approx(-sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in (0.3, 0.6)) / 2)
    (slope,) = torch.autograd.grad(value, alpha)
    assert slope.tolist() == pytest.approx([math.log((1 - p) / p) / 2 for p in (0.3, 0.6)])
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    (slope,) = torch.autograd.grad(regular.opaque(ends), ends)
    assert torch.isfinite(slope).all()


def test_orientation() -> None:
    """Only what looks away counts, weights are constants, and rays that show nothing do not dilute it."""
    weights = torch.tensor([[0.5, 0.25], [0.0, 0.0], [0.2, 0.4]], requires_grad=True)
    facing = torch.tensor([[0.8, -0.9], [1.0, 1.0], [-1.0, 0.5]], requires_grad=True)
    value = regular.orientation(weights, facing, weights.sum(1))
    assert value.item() == pytest.approx((0.5 * 0.64 + 0.4 * 0.25) / 2)
    slope, none = torch.autograd.grad(value, (facing, weights), allow_unused=True)
    assert none is None
    assert torch.allclose(slope, torch.tensor([[0.4, 0.0], [0.0, 0.0], [0.0, 0.2]]))
    empty = torch.zeros(2, 3)
    assert regular.orientation(empty, empty, empty.sum(1)) == 0


def test_distortion_is_the_double_sum() -> None:
    gen = torch.Generator().manual_seed(0)
    weights, widths = (torch.rand(3, 7, generator=gen, dtype=torch.float64) for _ in range(2))
    places = widths.cumsum(1) - widths / 2
    found = 0.0
    for w, m, d in zip(weights.tolist(), places.tolist(), widths.tolist(), strict=True):
        found += sum(w[i] * w[j] * abs(m[i] - m[j]) for i in range(7) for j in range(7))
        found += sum(w[i] ** 2 * d[i] / 3 for i in range(7))
    assert regular.distortion(weights, places, widths).item() == pytest.approx(found / 3)


def test_variance() -> None:
    weights = torch.tensor([[0.4, 0.4, 0.0], [0.1, 0.1, 0.1], [0.0, 0.9, 0.0]])
    places = torch.tensor([[1.0, 2.0, 3.0]]).expand(3, 3)
    assert regular.variance(weights, places).item() == pytest.approx(0.25 / 2)  # the second ray is too faint


def test_variance_with_nothing_in_view_is_finite() -> None:
    """The plain formula is NaN there (threestudio 110); what masks after it has divided has NaN gradients still."""
    places = torch.tensor([[1.0, 2.0]])

    def late(weights: Tensor) -> Tensor:
        share = weights / weights.sum(1, keepdim=True)
        middle = (share * places).sum(1, keepdim=True)
        return torch.where(weights.sum(1) > 0.5, (share * (places - middle).square()).sum(1), 0.0).sum()

    for law, good in ((lambda w: regular.variance(w, places), True), (late, False)):
        weights = torch.zeros(1, 2, requires_grad=True)
        value = cast(Tensor, law(weights))
        (slope,) = torch.autograd.grad(value, weights)
        assert value == 0 and bool(torch.isfinite(slope).all()) == good


def test_variation() -> None:
    picture = torch.tensor([[[[0.0, 1.0], [3.0, 3.0]]], [[[0.0, 0.0], [0.0, 2.0]]]])
    assert regular.picture_variation(picture).item() == pytest.approx(((1 + 9 + 4) + (4 + 4)) / 2)
    grid = torch.zeros(1, 3, 3, 3)
    grid[0, 1, 1, 1] = 2.0  # six of the 3 * 18 pairs differ by 2
    assert regular.variation(grid).item() == pytest.approx(3 * 2 * 4 / 18)
    channels = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1).expand(2, 3, 3, 3)
    assert regular.variation(channels) == 0  # channels are no neighbours


class Splats(nn.Module):
    """Stands for a scene of splats: all that a term may read."""

    channels, radius = 3, 1.0

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).log())

    def living(self) -> tuple[SimpleNamespace, None]:
        return SimpleNamespace(scales=self.log), None


def losses(scene: nn.Module, aux: dict[str, Tensor], **weights: Any) -> regular.Regular:
    student = SimpleNamespace(particle=lambda cond: scene)
    source = SimpleNamespace(student=student, sampled=lambda ctx: Sample(aux["alpha"], {}, aux))
    player = Player("student", scene, OptimConfig(), 1)
    return regular.Regular(cast(Source, source), settings.Regular(**weights), player)


def terms(made: regular.Regular, step: int = 0) -> dict[str, Tensor]:
    ctx = context(step)
    (phase,) = made.phases(ctx)
    return phase.loss()


def test_a_term_of_no_weight_is_not_computed() -> None:
    aux = {"alpha": ALPHA.clone().requires_grad_()}  # neither weights nor an image
    found = terms(losses(Splats(), aux, opacity=2.0, size=10.0))
    assert set(found) == {"opacity", "size"}
    assert found["opacity"].item() == pytest.approx(2 * regular.opacity(ALPHA).item())
    assert found["size"].item() == pytest.approx(3.5)
    ramp = losses(Splats(), aux, opaque=[(10, 0.0), (20, 4.0)])
    assert set(terms(ramp, 5)) == {"none"} and terms(ramp, 5)["none"].requires_grad
    assert terms(ramp, 15)["opaque"].item() == pytest.approx(2 * regular.opaque(ALPHA).item())


@pytest.mark.parametrize(
    ("name", "words"),
    [("distortion", "rays"), ("orientation", "rays"), ("smooth", "smooth_image"), ("variance", "rays")],
)
def test_a_term_that_the_scene_cannot_give(name: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        terms(losses(Splats(), {"alpha": ALPHA}, **{name: 1.0}))


def test_size_is_for_splats_and_orientation_needs_normals() -> None:
    scene = volume.scene(settings.Nerf(field=settings.Voxels(size=4), sampling=settings.Sampling(samples=4)), 3)
    views = scene.render(ring(2, 4), torch.ones(2, 3))
    aux = {"alpha": views.alpha, "image": views.image, "depth": views.depth, **views.aux}
    with pytest.raises(BadInput, match="splats"):
        terms(losses(scene, aux, size=1.0))
    with pytest.raises(BadInput, match="oriented"):
        terms(losses(scene, aux, orientation=1.0))
    scene.oriented = True
    views = scene.render(ring(2, 4), torch.ones(2, 3))
    aux = {"alpha": views.alpha, "image": views.image, "depth": views.depth, **views.aux}
    every = {name: 1.0 for name in regular.TERMS if name not in ("size", "laplacian")}
    found = terms(losses(scene, aux, **every))
    assert set(found) == set(every)
    torch.stack(list(found.values())).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in scene.parameters())


def test_densification_is_told_what_is_not_distillation() -> None:
    """The gradient on the screen of both losses together, less what is told, is that of the other loss alone."""
    screen = torch.zeros(2, 3, 2, requires_grad=True)
    alpha = (screen.sum(2) + torch.tensor([0.2, 0.5, 0.7])).view(2, 3, 1, 1)
    aux = {"alpha": alpha, "screen": screen, "image": alpha.expand(2, 3, 3, 1)}
    made = losses(Splats(), aux, opacity=3.0, smooth_image=0.5, weight=0.1)
    ctx = context()
    own = compose([made], [0.1])
    (phase,) = own.phases(ctx)
    other = (alpha * torch.arange(3.0).view(3, 1, 1)).sum()
    total = torch.stack(list(phase.loss().values())).sum() + other
    (whole,) = torch.autograd.grad(total, screen, retain_graph=True)
    (wanted,) = torch.autograd.grad(other, screen)
    told = ctx.once("threed.other_screen", list)
    assert len(told) == 1 and not torch.allclose(whole, wanted)
    assert torch.allclose(whole - told[0], wanted, atol=1e-6)


def test_nothing_is_told_where_screens_do_not_matter() -> None:
    aux = {"alpha": ALPHA.clone().requires_grad_(), "screen": torch.zeros(1, 2, 2, requires_grad=True)}
    ctx = context()
    (phase,) = losses(Splats(), aux, opacity=1.0).phases(ctx)
    phase.loss()
    assert ctx.once("threed.other_screen", list) == []


def built() -> Build:
    """As much of a run as these losses ask for: the closed-form teacher and a small voxel scene."""
    recipe = SimpleNamespace(seed=0, student=object(), data=object(), steps=10)
    build = Build(cast(Any, recipe))
    build._pieces["teacher"] = model = posed.build(settings.Solids(size=8), build)
    nerf = settings.Nerf(field=settings.Voxels(size=6), sampling=settings.Sampling(samples=6, proposal=0))
    build._pieces["student"] = volume.build(nerf, build)
    cond = {"camera": ring(2, 8).rows(), "background": torch.ones(2, 3)}
    data = SimpleNamespace(prompts=lambda n, gen, rows: [posed.PROMPTS[0]] * n, ask=lambda ctx, p: (p, cond))
    build._pieces["data"] = data
    assert model.shape == (3, 8, 8)
    return build


def test_it_trains_the_student_of_the_distillation_loss() -> None:
    build = built()
    optim = OptimConfig(lr=0.1, rates={"scenes.0.body.colour": 0.5})
    score = build_score(Score(guidance=1.0, optim=optim), build)
    own = regular.build(settings.Regular(opacity=5.0, optim=optim), build)
    both = compose([score, own], [1.0, 1.0])
    assert list(both.players) == ["student"]
    (phase,) = both.phases(context())
    found = phase.loss()
    assert set(found) == {"matching", "opacity"}
    torch.stack(list(found.values())).sum().backward()
    student = build.piece("student")
    assert isinstance(student, SceneStudent)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    with pytest.raises(BadInput, match="different optimisers"):
        regular.build(settings.Regular(opacity=5.0), build)


def test_a_latent_scene_has_the_teacher_s_channels() -> None:
    build = built()
    build._pieces["teacher"] = replace(build.piece("teacher"), shape=(4, 8, 8))
    latent = volume.build(settings.Nerf(field=settings.Voxels(size=4), latent=True, particles=2), build)
    assert len(latent.scenes) == 2 and not latent.encodes
    assert [scene.channels for scene in latent.scenes] == [4, 4]
