"""The adversary's losses and the density ratio it gives f-distill."""

import json

import pytest
import torch
from torch.nn import functional as F

from limbeck.core.diffusion.denoiser import Denoiser
from limbeck.core.diffusion.process import VP
from limbeck.core.distillation.adversarial import Adversary, Head, Ratio, head_for
from limbeck.core.distillation.config import AdversaryConfig, RatioConfig
from limbeck.core.distillation.operators import DIVERGENCES
from limbeck.core.run.context import Context
from limbeck.core.run.rng import Draws

torch.set_num_threads(1)
CPU = torch.device("cpu")


def ctx(step=0, batch=64):
    return Context(step, "s", Draws(0, step, batch), 1, 0, CPU)


class Tapped(Denoiser):
    """A net with one weight whose features are its input; with positions when the input has them."""

    def __init__(self):
        super().__init__(VP("cosine"), "eps")
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, x_t, t, cond, features=False):
        raw = self.gain * x_t
        return (raw, [raw, raw]) if features else raw


def adversary(features="critic", shape=(3, 4, 4), **settings):
    net = Tapped().requires_grad_(features == "critic")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = head_for(net, shape, {}, 16, CPU)
    return Adversary(AdversaryConfig(features=features, generator=1.0, discriminator=1.0, **settings), net, head)


def test_a_head_reads_any_taps_and_gives_one_logit_a_sample():
    head = Head([8, 4], 16)
    features = [torch.randn(5, 8, 3, 3), torch.randn(5, 4)]
    assert head(features).shape == (5,)
    shuffled = features[0].flatten(2)[:, :, torch.randperm(9)].view(5, 8, 3, 3)
    assert torch.allclose(head([shuffled, features[1]]), head(features), atol=1e-6)  # a mean over positions


def test_the_generators_term_is_softplus_of_minus_the_logit_and_reaches_the_sample():
    one, x = adversary(), torch.randn(64, 3, 4, 4).requires_grad_(True)
    context = ctx()
    loss = one.fool(context, x, {})
    draws = Draws(0, 0, 64)
    t = one.times.sample(64, draws.gen("fool.t"), one.denoiser.process)
    x_t = one.denoiser.process.add_noise(x, draws.normal("fool.eps", (3, 4, 4)), t)
    assert torch.allclose(loss, F.softplus(-one.head([x_t, x_t])).mean())
    loss.backward()
    assert x.grad.abs().sum() > 0


def test_a_step_against_the_generators_term_makes_the_sample_look_real():
    one, x = adversary(), torch.randn(64, 3, 4, 4).requires_grad_(True)
    before = one.fool(ctx(), x, {})
    (gradient,) = torch.autograd.grad(before, x)
    assert one.fool(ctx(), x - 5.0 * gradient, {}) < before


@pytest.mark.parametrize("features", ["critic", "teacher"])
def test_the_discriminators_term_trains_the_head_and_the_critic_but_never_the_teacher(features):
    one = adversary(features)
    fake, real = torch.randn(64, 3, 4, 4), torch.randn(64, 3, 4, 4) + 1
    loss = one.tell(ctx(), "tell", (fake, {}), (real, {}))
    loss.backward()
    assert all(p.grad is not None for p in one.head.parameters())
    assert (one.denoiser.gain.grad is not None) == (features == "critic")


def test_the_head_learns_to_tell_and_the_losses_have_the_right_sign():
    one = adversary("teacher", shape=(2,), time={"kind": "uniform", "lo": 0.02, "hi": 0.3})
    optim = torch.optim.Adam(one.head.parameters(), lr=1e-2)
    for step in range(150):
        context = ctx(step)
        loss = one.tell(context, "tell", (torch.randn(64, 2) - 1, {}), (torch.randn(64, 2) + 1, {}))
        optim.zero_grad()
        loss.backward()
        optim.step()
    assert loss < 1.0  # 2 log 2 = 1.39 when it cannot tell
    assert context.logged["gan/real"] > 0 > context.logged["gan/fake"]
    assert one.fool(ctx(), torch.randn(64, 2) + 1, {}) < one.fool(ctx(), torch.randn(64, 2) - 1, {})


def test_real_and_fake_share_t_but_not_the_noise():
    seen = []
    one = adversary()
    one.denoiser.register_forward_pre_hook(lambda m, args: seen.append(args))
    one.tell(ctx(), "tell", (torch.zeros(64, 3, 4, 4), {}), (torch.zeros(64, 3, 4, 4), {}))
    x_t, t, *_ = seen[0]
    assert torch.equal(t[:64], t[64:]) and not torch.equal(x_t[:64], x_t[64:])


def test_a_teacher_without_features_is_refused():
    from limbeck.core.diffusion.mixture import GaussianMixture

    with pytest.raises(ValueError, match="gives no features"):
        head_for(GaussianMixture(torch.zeros(1, 2), 1.0, VP()), (2,), {}, 8, CPU)


# --- the ratio ------------------------------------------------------------------------------------------------------


def test_h_has_mean_one_and_follows_the_divergence():
    logits, t = torch.linspace(-2, 2, 64), torch.full((64,), 0.55)
    for name in DIVERGENCES:
        h = Ratio(RatioConfig(divergence=name), CPU)(ctx(), logits, t)
        assert abs(float(h.mean()) - 1) < 1e-5
        r = logits.exp() / logits.exp().mean()
        expected = DIVERGENCES[name].h(r) / DIVERGENCES[name].h(r).mean()
        assert torch.allclose(h, expected, atol=1e-4), name


def test_inverted_logits_invert_the_order():
    logits, t = torch.linspace(-2, 2, 64), torch.full((64,), 0.55)
    right, wrong = (Ratio(RatioConfig(divergence="kl"), CPU)(ctx(), sign * logits, t) for sign in (1, -1))
    assert (right.diff() > 0).all() and (wrong.diff() < 0).all()  # more weight where the teacher is denser


def test_each_time_bin_has_its_own_mean():
    ratio = Ratio(RatioConfig(divergence="kl"), CPU)
    t = torch.cat([torch.full((32,), 0.05), torch.full((32,), 0.95)])
    logits = torch.cat([torch.full((32,), 1.0), torch.full((32,), -1.0)])
    assert torch.allclose(ratio(ctx(), logits, t), torch.ones(64), atol=1e-5)
    assert ratio.seen.tolist() == [True] + [False] * 8 + [True]
    assert ratio.means[[0, 9]].tolist() == pytest.approx([2.71828, 0.36788], rel=1e-4)


def test_the_ratio_is_clamped():
    ratio = Ratio(RatioConfig(divergence="kl"), CPU)
    h = ratio(ctx(), torch.tensor([50.0, -50.0] * 32), torch.full((64,), 0.5))
    assert torch.isfinite(h).all() and float(h.max() / h.min()) == pytest.approx(200.0, rel=1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_bins_average_over_batches_and_are_kept(rate):
    ratio, t = Ratio(RatioConfig(rate=rate), CPU), torch.full((64,), 0.5)
    ratio(ctx(), torch.zeros(64), t)
    ratio(ctx(), torch.full((64,), 1.0), t)
    assert float(ratio.means[5]) == pytest.approx(rate * 1 + (1 - rate) * 2.71828, rel=1e-4)
    again = Ratio(RatioConfig(rate=rate), CPU)
    again.load(ratio.state())
    assert torch.equal(again.means, ratio.means) and torch.equal(again.seen, ratio.seen)


PROCESS = """
import sys, torch, torch.distributed as dist
from limbeck.core.distillation.adversarial import Ratio
from limbeck.core.distillation.config import RatioConfig
from limbeck.core.run.context import Context
from limbeck.core.run.rng import Draws
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
ctx = Context(0, "s", Draws(0, 0, 64, rank, 2), 2, rank, torch.device("cpu"))
logits, t = torch.linspace(-2, 2, 64), torch.linspace(0, 0.99, 64)
ratio = Ratio(RatioConfig(divergence="kl"), torch.device("cpu"))
h = ratio(ctx, logits[ctx.draws.rows], t[ctx.draws.rows])
print(h.tolist())
dist.destroy_process_group()
"""


def test_two_processes_weigh_as_one(tmp_path, python):
    whole = Ratio(RatioConfig(divergence="kl"), CPU)(ctx(), torch.linspace(-2, 2, 64), torch.linspace(0, 0.99, 64))
    started = [python.start(["-c", PROCESS, rank, tmp_path / "meet"]) for rank in (0, 1)]
    parts = [json.loads(process.ended().stdout) for process in started]
    assert torch.allclose(torch.tensor(parts[0] + parts[1]), whole, rtol=1e-5)


def test_a_trained_head_gives_the_true_ratio():
    """Two unit Gaussians one apart: log r = x - 1/2 along the axis; the head, trained by its own loss, finds it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head([1], 32)
    optim, gen = torch.optim.Adam(head.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(400):
        fake, real = torch.randn(256, 1, generator=gen), torch.randn(256, 1, generator=gen) + 1
        loss = (F.softplus(head([fake])) + F.softplus(-head([real]))).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
    x = torch.linspace(-1, 2, 16)[:, None]
    assert (head([x]) - (x[:, 0] - 0.5)).abs().max() < 0.4
