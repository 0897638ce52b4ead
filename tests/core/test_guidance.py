"""Classifier-free guidance: the identity, counted forwards, scales per sample, interval, negative prompts, faults."""

import pytest
import torch

from limbeck.core.diffusion import checks
from limbeck.core.diffusion.checks import Counted, two_classes
from limbeck.core.diffusion.denoiser import Network, Prediction, predict
from limbeck.core.diffusion.guidance import blended, combine, guide, perp_neg, perpendicular, unpacked
from limbeck.core.diffusion.mixture import GaussianMixture
from limbeck.core.diffusion.process import EDM, VP, Flow
from limbeck.core.diffusion.sampling import ddim, sample, trajectory

torch.set_num_threads(1)
NULL = {"label": torch.tensor([-1])}


def batch(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, torch.linspace(0.1, 0.9, n), {"label": torch.arange(n) % 2}


def by_hand(teacher, x, t, label, g):
    cond, uncond = teacher.predict(x, t, label), teacher.predict(x, t, NULL)
    scale = g[:, None] if isinstance(g, torch.Tensor) else g
    return uncond.eps + scale * (cond.eps - uncond.eps)


def test_identity_holds_and_one_forward_is_enough():
    assert all(check.passed for check in checks.guidance())


def test_the_identity_catches_the_other_convention():
    """Papers that write g' = g - 1: passing their number as ours is off by one."""
    off_by_one = checks.guidance(lambda c, u, g: combine(c, u, g + 1))
    assert not off_by_one[0].passed
    swapped = checks.guidance(lambda c, u, g: combine(u, c, g))
    assert not swapped[0].passed


@pytest.mark.parametrize("process", [VP("cosine"), EDM(), Flow()], ids=["vp", "edm", "flow"])
def test_guided_denoiser_is_u_plus_g_times_the_difference(process):
    teacher = two_classes(process)
    x, t, label = batch()
    guided = guide(teacher, NULL, 3.0).predict(x, t, label)
    torch.testing.assert_close(guided.eps, by_hand(teacher, x, t, label, 3.0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guided.x0, combine(teacher.predict(x, t, label), teacher.predict(x, t, NULL), 3.0).x0)


def test_scale_one_is_conditional_bit_for_bit_and_scale_zero_unconditional():
    x, t, label = batch()
    counted = Counted(two_classes())
    out = guide(counted, NULL, 1.0).predict(x, t, label)
    assert torch.equal(out.raw, two_classes().predict(x, t, label).raw) and counted.rows == len(x)
    none = guide(two_classes(), NULL, 0.0).predict(x, t, label)
    torch.testing.assert_close(none.x0, two_classes().predict(x, t, NULL).x0)


def test_scale_per_sample_skips_the_rows_that_need_no_null():
    x, t, label = batch()
    g = torch.tensor([1.0, 2, 3, 4, 1, 7.5, 0, 1])
    counted = Counted(two_classes())
    out = guide(counted, NULL, g).predict(x, t, label)
    torch.testing.assert_close(out.eps, by_hand(two_classes(), x, t, label, g), rtol=1e-9, atol=1e-9)
    assert counted.calls == 1 and counted.rows == 8 + 5
    plain = two_classes().predict(x, t, label)
    assert torch.equal(out.raw[g == 1], plain.raw[g == 1])


def test_interval_is_conditional_outside():
    x, t, label = batch()
    counted = Counted(two_classes())
    out = guide(counted, NULL, 4.0, (0.3, 0.7)).predict(x, t, label)
    inside = (t >= 0.3) & (t <= 0.7)
    assert counted.calls == 1 and counted.rows == 8 + int(inside.sum())
    assert torch.equal(out.raw[~inside], two_classes().predict(x, t, label).raw[~inside])
    torch.testing.assert_close(out.eps[inside], by_hand(two_classes(), x, t, label, 4.0)[inside], rtol=1e-9, atol=1e-9)


def test_several_queries_with_per_sample_scale_are_one_forward():
    x, t, label = batch()
    g, counted = torch.arange(8.0), Counted(two_classes())
    first, second = predict(guide(counted, NULL, g), [(x, t, label), (x * 0.5, t, label)])
    assert counted.calls == 1
    torch.testing.assert_close(second.eps, by_hand(two_classes(), x * 0.5, t, label, g), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(first.eps, by_hand(two_classes(), x, t, label, g), rtol=1e-9, atol=1e-9)


def test_negative_prompt_and_kept_keys():
    """A negative prompt replaces the null; keys that the null lacks (a camera) keep the sample's own value."""
    seen = {}

    def call(net, x, time, cond):
        seen.update(cond)
        return x * cond["text"][:, :1] + cond["camera"][:, None]

    net = Network(torch.nn.Identity(), VP(), "eps", call)
    x, t = torch.ones(3, 4), torch.full((3,), 0.5)
    cond = {"text": torch.full((3, 2), 5.0), "camera": torch.tensor([1.0, 2.0, 3.0])}
    out = guide(net, {"text": torch.full((1, 2), 2.0)}, 3.0).predict(x, t, cond)
    assert seen["camera"].tolist() == [1, 2, 3, 1, 2, 3] and seen["text"][:, 0].tolist() == [5, 5, 5, 2, 2, 2]
    torch.testing.assert_close(out.eps, (2 + 3 * (5 - 2)) + cond["camera"][:, None].expand(3, 4))
    with pytest.raises(ValueError, match="'text' has 2 rows for a batch of 3"):
        guide(net, {"text": torch.zeros(2, 2)}, 3.0).predict(x, t, cond)


def test_features_are_those_of_the_conditional_branch():
    inner = torch.nn.Linear(4, 4)
    net = Network(inner, VP(), "eps", lambda n, x, time, cond: n(x + cond["label"][:, None]), taps=("",))
    x, t, label = batch()
    label = {"label": label["label"].float()}
    out = guide(net, {"label": torch.tensor([9.0])}, 2.0).predict(x.float(), t, label, features=True)
    assert len(out.features[0]) == 8
    torch.testing.assert_close(out.features[0], net.predict(x.float(), t, label).raw)


@pytest.mark.parametrize("convention,mean", [(3.0, 3.40), (4.0, 4.70)])
def test_guided_flow_ends_where_the_closed_form_says(convention, mean):
    """Card lcm: cond N(.8, s^2), uncond N(-.5, s^2): guided, N(-.5 + 1.3 w, s^2); w' = w - 1 lands off."""

    class Two(GaussianMixture):
        """Label 0 is N(.8, .4^2); -1 is N(-.5, .4^2)."""

        def forward(self, x_t, t, cond, features=False):
            return super().forward(x_t, t, {"label": torch.where(cond["label"] < 0, 1, 0)})

    teacher = Two(torch.tensor([[0.8], [-0.5]]), 0.4, VP("cosine"), classes=[0, 1])
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.linspace(0.999, 0, 401, dtype=torch.float64)
    x = sample(guide(teacher, NULL, convention), z, times, ddim(), cond={"label": torch.zeros(1, dtype=torch.long)})
    assert abs(float(x.mean()) - mean) < 0.04 and abs(float(x.std()) - 0.4) < 0.03


def test_scales_per_sample_follow_a_resampling():
    """Branching [0, 0, 1, 1] must not guide the copies of row 0 by the scale of row 1."""
    x, scale, index = batch(2)[0], torch.tensor([0.5, 4.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    cond, grid = {"label": torch.tensor([0, 1])}, torch.tensor([0.9, 0.6, 0.3])
    teacher = guide(two_classes(), {"label": torch.tensor([-1, 0])}, scale)

    def branch(step):
        return index if step.i == 0 else None

    first, second = trajectory(teacher, ddim(), x, grid, cond, on_step=branch)
    alone = guide(two_classes(), {"label": torch.tensor([-1, -1, 0, 0])}, scale[index])
    expected = alone.predict(first.x_next, torch.full((4,), 0.6), {"label": cond["label"][index]})
    assert torch.equal(second.pred.raw, expected.raw)


MEANS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WEIGHTS = torch.tensor([[-1.5, -0.4], [0.0, -2.0], [-0.7, 0.0]], dtype=torch.float64)


def perp_neg_of_gaussians(found=perp_neg, process=None, weights=WEIGHTS):
    """Four Gaussians of one deviation: wanted, two others, null. The answer is the Gaussian of one shifted mean."""
    process = process or VP("cosine")
    teacher = GaussianMixture(MEANS, 0.5, process, classes=range(4))
    x_t, t = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)).double(), torch.tensor([0.2, 0.5, 0.8])
    queries = [(x_t, t, {"label": torch.tensor([k])}) for k in range(4)]
    cond, one, two, null = predict(teacher, queries)
    wanted, *others = MEANS[:3] - MEANS[3]
    mean = wanted.expand(3, -1)
    for k, other in enumerate(others):
        mean = mean + WEIGHTS[:, k, None] * (other - (other @ wanted) / (wanted @ wanted) * wanted)
    exact = [GaussianMixture((MEANS[3] + 4.0 * m)[None], 0.5, process) for m in mean]
    right = torch.cat([g.predict(x_t[i : i + 1], t[i : i + 1], {}).eps for i, g in enumerate(exact)])
    return float((found(cond, null, [one, two], weights, 4.0).eps - right).abs().max())


@pytest.mark.parametrize("process", [VP("cosine"), EDM(), Flow()], ids=["vp", "edm", "flow"])
def test_perp_neg_of_gaussians_is_the_gaussian_of_the_shifted_mean(process):
    assert perp_neg_of_gaussians(process=process) < 1e-9


def read(like, eps):
    return Prediction(eps, like.x_t, like.t, like.process, "eps")


def onto_the_negative(c, u, others, w, g):
    e, away = c.eps - u.eps, 0
    for k, other in enumerate(others):
        away = away + w[:, k, None] * perpendicular(e, other.eps - u.eps)
    return read(u, u.eps + g * (e + away))


def without_the_null(c, u, others, w, g):
    away = sum(w[:, k, None] * perpendicular(o.eps, c.eps) for k, o in enumerate(others))
    return read(u, u.eps + g * (c.eps - u.eps + away))


def whole(c, u, others, w, g):
    away = sum(w[:, k, None] * (o.eps - u.eps) for k, o in enumerate(others))
    return read(u, u.eps + g * (c.eps - u.eps + away))


def test_wrong_perp_negs_are_caught():
    """Projected on the negative, the null not subtracted, the part in common taken away too, weights swapped."""
    for wrong in (onto_the_negative, without_the_null, whole):
        assert perp_neg_of_gaussians(wrong) > 0.1
    assert perp_neg_of_gaussians(weights=WEIGHTS.flip(1)) > 0.1


def test_a_negative_that_is_the_prompt_takes_nothing_away():
    x, t, label = batch()
    cond, null = predict(two_classes(), [(x, t, label), (x, t, NULL)])
    torch.testing.assert_close(perp_neg(cond, null, [cond], -torch.ones(8, 1), 3.0).raw, combine(cond, null, 3.0).raw)


def test_prompts_are_blended_and_what_they_are_not_to_be_is_packed():
    states, mask = torch.randn(3, 2, 5), torch.tensor([[1, 1], [1, 0], [0, 1]])
    asked = {"shares": torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]), "others": torch.tensor([[0, 2], [1, 0]])}
    asked |= {"against": -torch.ones(2, 2), "camera": torch.rand(2, 15)}
    cond, others, weights = unpacked(blended({"states": states, "mask": mask}, asked))
    torch.testing.assert_close(cond["states"], torch.stack([states[0] * 0.25 + states[1] * 0.75, states[2]]))
    assert torch.equal(cond["mask"], mask[[1, 2]]) and torch.equal(weights, asked["against"])
    assert [set(c) for c in (cond, *others)] == [{"states", "mask", "camera"}] * 3
    assert torch.equal(others[1]["states"], states[[2, 0]]) and torch.equal(others[1]["camera"], asked["camera"])
    plain, none, gone = unpacked(blended({"states": states}, {"camera": torch.rand(3, 15)}))
    assert torch.equal(plain["states"], states) and not none and gone is None
