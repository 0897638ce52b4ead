"""The measures against closed forms and planted faults, and on the committed reference."""

import functools
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from limbeck.core import fidelity
from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import FewStep, Model
from limbeck.core.diffusion.mixture import GaussianMixture
from limbeck.core.diffusion.process import Flow
from limbeck.core.lite0 import Lite0
from limbeck.core.run.errors import BadInput
from limbeck.core.run.rng import generator
from limbeck.domains.image import quality
from limbeck.domains.image.config import Quality
from limbeck.domains.image.data import EVAL_NAMES, FluentData
from limbeck.domains.image.quality import Reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(width: int, seed: int) -> Tensor:
    half = normal(width, width, seed=seed)
    return half @ half.T / width + 0.1 * torch.eye(width)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return quality.load_reference()


# Frechet distance


def test_frechet_of_diagonal_gaussians() -> None:
    a, b = torch.rand(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    shift = normal(8)
    want = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert fidelity.frechet(shift, a.diag(), torch.zeros(8), b.diag()) == pytest.approx(float(want), abs=1e-12)


def test_frechet_of_gaussians_that_do_not_commute() -> None:
    """In two dimensions tr (AB)^1/2 = (tr AB + 2 (det AB)^1/2)^1/2."""
    a, b = spd(2, 1), spd(2, 2)
    assert (a @ b - b @ a).abs().max() > 0.01
    cross = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    want = float(a.trace() + b.trace() - 2 * cross)
    assert fidelity.frechet(torch.zeros(2), a, torch.zeros(2), b) == pytest.approx(want, abs=1e-12)


def test_frechet_distance_of_samples() -> None:
    x, y = normal(20000, 4), 2 * normal(20000, 4, seed=1) + 1
    assert fidelity.frechet_distance(x, y) == pytest.approx(4 + 4, rel=0.03)
    assert fidelity.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_sees_a_shift_and_a_sign() -> None:
    x = normal(2048, 8) + 1
    assert fidelity.frechet_distance(x, x + 0.5) == pytest.approx(8 * 0.25, abs=1e-9)
    assert fidelity.frechet_distance(x, -x) == pytest.approx(float((2 * x.mean(0)).square().sum()), abs=1e-9)


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(BadInput, match="at least 1024 pictures"):
        fidelity.frechet_distance(normal(1023, 4), normal(4096, 4))
    with pytest.raises(BadInput, match="at least two pictures"):
        fidelity.spread(normal(8, 1, 4), normal(8, 4, 4))


# Kernel distance


def test_kernel_distance_by_explicit_sums() -> None:
    x, y = normal(4, 3), normal(5, 3, seed=1)

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    own_x = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (4 * 3)
    own_y = sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (5 * 4)
    between = sum(kernel(a, b) for a in x for b in y) / (4 * 5)
    assert fidelity.kernel_distance(x, y) == pytest.approx(own_x + own_y - 2 * between, abs=1e-12)


def test_kernel_distance_is_unbiased_and_sees_shift_and_scale() -> None:
    same = [fidelity.kernel_distance(normal(200, 8, seed=2 * i), normal(200, 8, seed=2 * i + 1)) for i in range(50)]
    mean, deviation = torch.tensor(same).mean(), torch.tensor(same).std() / math.sqrt(50)
    assert abs(mean) < 3 * deviation
    assert fidelity.kernel_distance(normal(200, 8), normal(200, 8, seed=1) + 0.5) > 10 * torch.tensor(same).std()
    assert fidelity.kernel_distance(normal(200, 8), normal(200, 8, seed=1) * 2) > 10 * torch.tensor(same).std()


# Retrieval


def captions(count: int, pictures: int, seed: int, nuisance: float = 30.0) -> Tensor:
    """[C,M,16]: captions differ in eight directions, pictures of one caption mostly in one other direction."""
    x = normal(count, 1, 16) + 0.1 * normal(count, pictures, 16, seed=seed)
    x[..., 8:] = 0.1 * normal(count, pictures, 8, seed=seed + 100)
    x[..., -1] = nuisance * normal(count, pictures, seed=seed + 200)
    return x


def test_retrieval_needs_and_has_whitening(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ref = captions(256, 4, seed=1), captions(256, 8, seed=2)
    monkeypatch.setattr(fidelity, "SHRINK", 1e-4)
    assert fidelity.retrieval(x, ref) > 0.99
    monkeypatch.setattr(fidelity, "whitener", lambda reference: torch.eye(16, dtype=torch.float64))
    assert fidelity.retrieval(x, ref) < 0.2


def test_whitener_makes_the_covariance_within_captions_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "SHRINK", 0.0)
    ref = captions(64, 8, seed=1)
    white = (ref - ref.mean(1, keepdim=True)).flatten(0, 1) @ fidelity.whitener(ref)
    assert torch.allclose(white.T @ white / (64 * 7), torch.eye(16, dtype=torch.float64), atol=1e-8)


# Spread, precision and recall


def test_spread_is_scale_against_scale() -> None:
    assert fidelity.spread(0.5 * normal(256, 4, 16), normal(256, 8, 16, seed=1)) == pytest.approx(0.5, rel=0.03)
    far_apart = 100 * normal(256, 1, 16) + normal(256, 4, 16, seed=1)  # captions far apart are no spread within them
    assert fidelity.spread(far_apart, normal(256, 8, 16, seed=2)) == pytest.approx(1, rel=0.03)
    assert fidelity.spread(normal(256, 1, 16).expand(-1, 4, -1), normal(256, 8, 16)) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_of_lost_modes_and_of_junk() -> None:
    centres = 20 * normal(64, 1, 8)
    real, fake = centres + normal(64, 8, 8, seed=1), centres + normal(64, 8, 8, seed=2)
    precision, recall = fidelity.precision_recall(fake, real)
    assert min(precision, recall) > 0.5
    assert fidelity.precision_recall(fake[:32], real)[1] < 0.6 * recall  # half the modes
    assert fidelity.precision_recall(fake + 100, real) == (0, 0)
    junk = torch.cat([fake[:, :4], fake[:, 4:] + 100], 1)
    assert fidelity.precision_recall(junk, real)[0] == pytest.approx(precision / 2, abs=0.1)


def test_ball_of_a_known_radius() -> None:
    line = torch.arange(10.0)[:, None]  # the second neighbour of every inner point is one away, of the ends two
    inside = [fidelity.coverage(torch.tensor([[place]]), line, 2) for place in (-2.0, -2.1, 4.5)]
    assert inside == [1, 0, 1]


# The committed reference


def test_ceiling_and_floor_of_real_pictures(reference: Reference) -> None:
    found = quality.row("data", 0, reference.floor[:, :4], reference, Quality(), None)
    assert found["retrieval@1"] >= 0.97
    assert found["spread"] == pytest.approx(1, abs=0.05)
    assert found["FD-lite0"] == found["floor"] < 0.5
    assert found["KD"] == pytest.approx(0, abs=0.05)
    assert min(found["precision"], found["recall"]) > 0.9


def test_components_have_mean_variance_one_and_no_covariance(reference: Reference) -> None:
    covariance = fidelity.covariance(fidelity.flat(reference.real))[:64, :64]
    assert covariance.diagonal().mean() == pytest.approx(1, abs=1e-2)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-2
    assert fidelity.flat(reference.real).mean(0).abs().max() < 1e-3


def test_faulty_generators_are_caught(reference: Reference) -> None:
    good = reference.floor[:, :4]
    judge = functools.partial(quality.row, steps=1, reference=reference, config=Quality(), took=None)
    shuffled = judge("shuffled", found=good[torch.randperm(256, generator=torch.Generator().manual_seed(0))])
    assert shuffled["retrieval@1"] < 4 / 256 and shuffled["FD-lite0"] == pytest.approx(shuffled["floor"])
    collapsed = judge("collapsed", found=good[:, :1].expand(-1, 4, -1))
    assert collapsed["spread"] == pytest.approx(0, abs=1e-6)
    assert collapsed["retrieval@1"] > 0.9 and collapsed["recall"] == 0
    one = judge("one picture", found=good[:1].expand(256, -1, -1))
    assert one["FD-lite0"] > 50 * one["floor"] and one["retrieval@1"] == pytest.approx(1 / 256, abs=0.01)
    assert judge("shifted", found=good + 0.5)["FD-lite0"] > 0.9 * 64 * 0.25
    negative = judge("negative", found=-good)  # same mean and covariance: only the kernel and the captions see it
    assert negative["FD-lite0"] == pytest.approx(negative["floor"], abs=1e-3)
    assert negative["KD"] > 0.03 and negative["retrieval@1"] < 0.05


def test_retrieval_asks_what_is_shown(reference: Reference) -> None:
    """Pictures with a little noise or blur are still told by what they show, thanks to such examples."""
    pictures = quality.degrade(quality.real_pictures("floor").view(256, 8, 3, 32, 32)[:, :2].flatten(0, 1))
    found = reference.project(Lite0().features(pictures))
    with_examples = [fidelity.retrieval(found[:, i : i + 1], reference.examples()) for i in (0, 1)]
    without = [fidelity.retrieval(found[:, i : i + 1], reference.real) for i in (0, 1)]
    assert min(with_examples) > 0.88
    assert without[0] < with_examples[0] - 0.1 and without[1] < with_examples[1] - 0.03


def test_a_stale_or_missing_reference_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="limbeck assets build reference"):
        quality.load_reference(tmp_path / "none.safetensors")
    monkeypatch.setattr(quality, "fingerprint", lambda: "other pictures")
    with pytest.raises(BadInput, match="older than the embedded pictures"):
        quality.load_reference()


# From pictures to the table


def test_the_reference_is_of_todays_pictures(reference: Reference) -> None:
    net = Lite0()
    for half in ("floor", "real"):
        features = net.features(quality.real_pictures(half)[: 4 * quality.HALF])
        found = fidelity.project(features, reference.mean, reference.components, 4)
        assert torch.allclose(found, getattr(reference, half)[:4], atol=1e-3)


def test_prompts_are_grouped_by_name() -> None:
    assert quality.prompts(2)[:4] == [EVAL_NAMES[0]] * 2 + [EVAL_NAMES[1]] * 2
    assert len(quality.prompts(4)) == 1024 == Quality().count


def oracle(pictures: FluentData, renderings: int, name: str = "oracle") -> Model:
    """A teacher known in closed form: each evaluation name has a few equally likely pictures."""
    index = torch.tensor([pictures.index[n] for n in EVAL_NAMES]).repeat_interleave(renderings)
    means = pictures.batch(index, generator(7, "oracle", 0), "name")[0]
    classes = torch.arange(len(EVAL_NAMES)).repeat_interleave(renderings)
    label = {name: i for i, name in enumerate(EVAL_NAMES)}
    denoiser = GaussianMixture(means, 0.02, Flow(), classes=classes)
    return Model(
        denoiser, (3, 32, 32), Identity(), lambda texts: {"label": torch.tensor([label[t] for t in texts])}, name
    )


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_table_of_a_closed_form_teacher(tmp_path: Path) -> None:
    """Two pictures a name: four steps find each of them (spread 1/2); one step gives their mean (spread 0)."""
    model, path = oracle(FluentData(), 2, "fluent-32"), tmp_path / "features.safetensors"
    config = Quality(teacher_steps=[4], guidance=1.0, timed=32)
    assert quality.cached(model, config, path) == {}
    quality.write_cache(model, config, path)
    rows = quality.table(model, FewStep(model.denoiser, (1.0,)), config, cache=path)
    assert [(row["generator"], row["steps"]) for row in rows] == [("data", 0), ("student", 1), ("teacher", 4)]
    _, student, teacher = rows
    assert teacher["retrieval@1"] > 0.95 and student["retrieval@1"] < teacher["retrieval@1"]
    assert teacher["spread"] == pytest.approx(0.5, abs=0.06) and student["spread"] < 0.05
    assert student["FD-lite0"] > 2 * teacher["FD-lite0"] > 2 * teacher["floor"]
    assert 0 < student["seconds a picture"] < teacher["seconds a picture"]
    assert quality.cached(model, config.model_copy(update={"guidance": 2.0}), path) == {}
    model.denoiser.means[0, 0, 0, 0] += 0.01
    assert quality.cached(model, config, path) == {}


def test_too_small_a_count_is_refused() -> None:
    for count in (512, 1025):
        with pytest.raises(ValidationError):
            Quality(count=count)


def test_a_recipe_without_a_student_measures_its_teacher_alone() -> None:
    """As in `image/teacher`, at the price of one row of features."""
    config = Quality(teacher_steps=[], timed=1)
    assert [row["generator"] for row in quality.table(oracle(FluentData(), 1), None, config)] == ["data"]


def test_larger_pictures_are_measured_at_the_references_size() -> None:
    small = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert quality.sized(small) is small
    torch.testing.assert_close(quality.sized(small.repeat_interleave(2, 2).repeat_interleave(2, 3)), small)


def test_student_and_teacher_start_from_the_same_noise() -> None:
    """With one step each, student and teacher of one network make the same pictures."""
    model = oracle(FluentData(), 1)
    student = quality.student_sampler(model, FewStep(model.denoiser, (1.0,)))
    teacher = quality.teacher_sampler(model, 1, None)
    names = list(EVAL_NAMES[:3])
    made = [sampler(generator(0, "quality", 0), names) for sampler in (student, teacher)]
    assert torch.allclose(*made, atol=1e-5)
