"""The critic: LoRA on the shared teacher or a net of its own, trained on detached samples over the full range of t."""

import pytest
import torch
from torch import nn

from limbeck.core.diffusion.codec import Identity
from limbeck.core.diffusion.denoiser import Model, Network, predict
from limbeck.core.diffusion.process import VP
from limbeck.core.distillation.config import CriticConfig, Denoising, SwiftBrushCritic
from limbeck.core.distillation.critic import Critic
from limbeck.core.distillation.denoising import dropped, errors
from limbeck.core.distillation.lora import LoRA, Patched
from limbeck.core.run.context import Context
from limbeck.core.run.rng import Draws

torch.set_num_threads(1)
CPU = torch.device("cpu")


class Net(nn.Module):
    """A convolution, a linear on the channels, and the condition."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=1)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Conv2d(8, 3, 3, padding=1, bias=False)

    def forward(self, x, time, label):
        h = self.conv(x) + (time + label)[:, None, None, None]
        return self.out(torch.tanh(self.mix(h.movedim(1, -1)).movedim(-1, 1)))


def model(kind="eps"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Network(Net(), VP("cosine"), kind, taps=("mix",)).requires_grad_(False)
    labels = lambda prompts: {"label": torch.tensor([float(p or -1) for p in prompts])}  # noqa: E731
    return Model(denoiser, (3, 4, 4), Identity(), labels, "tiny")


def ctx(step=0, batch=8):
    return Context(step, "s", Draws(0, step, batch), 1, 0, CPU)


def critic_of(teacher, **settings):
    return Critic.of(CriticConfig(**settings), teacher, teacher.encode([""]), CPU)


def batch(n=8):
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 4, 4, generator=gen)
    return x, {"label": torch.arange(n).float()}


def train(critic, steps=5):
    params = [p for p in critic.denoiser.parameters() if p.requires_grad]
    optim = torch.optim.Adam(params, lr=1e-2)
    for step in range(steps):
        optim.zero_grad()
        critic.loss(ctx(step), "critic", *batch()).backward()
        optim.step()
    return params


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_fresh_critic_is_the_teacher_so_vsd_starts_at_zero(kind):
    teacher = model()
    critic = critic_of(teacher, kind=kind, rank=4)
    x, cond = batch()
    t = torch.rand(8)
    with torch.no_grad():
        own, theirs = critic.denoiser.predict(x, t, cond).eps, teacher.denoiser.predict(x, t, cond).eps
    assert torch.equal(own, theirs) if kind == "lora" else torch.allclose(own, theirs, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_the_critic_leaves_the_teacher_bit_for_bit(kind):
    teacher = model()
    x, cond = batch()
    t = torch.rand(8, generator=torch.Generator().manual_seed(3))
    before = teacher.denoiser.predict(x, t, cond).raw.clone()
    weights = {k: v.clone() for k, v in teacher.denoiser.state_dict().items()}
    critic = critic_of(teacher, kind=kind, rank=4)
    train(critic)
    assert not torch.equal(critic.denoiser.predict(x, t, cond).raw, before)
    assert torch.equal(teacher.denoiser.predict(x, t, cond).raw, before)
    assert list(teacher.denoiser.state_dict()) == list(weights)
    assert all(torch.equal(v, weights[k]) for k, v in teacher.denoiser.state_dict().items())
    assert all(p.grad is None for p in teacher.denoiser.parameters())


def test_lora_covers_every_layer_with_r_times_in_plus_out_parameters():
    lora = LoRA(model().denoiser, 2)
    counts = {k.removeprefix("down.").removesuffix(".weight"): v.numel() for k, v in lora.state_dict().items()}
    assert set(counts) >= {"net/conv", "net/mix", "net/out"}
    total = sum(p.numel() for p in lora.parameters())
    assert total == 2 * (3 * 9 + 8) + 2 * (8 + 8) + 2 * (8 * 9 + 3)


def test_lora_is_off_after_an_exception():
    teacher = model().denoiser
    lora = LoRA(teacher, 2)
    with pytest.raises(RuntimeError), lora.on():
        raise RuntimeError
    assert not lora.active
    assert list(Patched(teacher, lora).parameters()) == list(lora.parameters())


def test_lora_equals_merged_weights():
    teacher = model().denoiser
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        lora = LoRA(teacher, 3, alpha=6.0)
        for p in lora.up.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1))
    x, cond = batch()
    t = torch.rand(8)
    patched = Patched(teacher, lora).predict(x, t, cond).raw
    with torch.no_grad():
        for key in lora.down:
            layer, a, b = teacher.get_submodule(key.replace("/", ".")), lora.down[key].weight, lora.up[key].weight
            delta = torch.tensordot(b.flatten(1), a, 1) if a.dim() == 4 else b @ a
            layer.weight.add_(2.0 * delta)
    assert torch.allclose(teacher.predict(x, t, cond).raw, patched, rtol=1e-4, atol=1e-4)


def test_lora_needs_a_layer():
    with pytest.raises(ValueError, match="critic.kind: full"):
        LoRA(nn.LayerNorm(3), 2)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_critic_loss_reaches_the_critic_alone(kind):
    teacher = model()
    critic = critic_of(teacher, kind=kind, rank=2)
    x, cond = batch()
    x.requires_grad_(True)
    critic.loss(ctx(), "critic", x, cond).backward()
    assert x.grad is None
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.denoiser.parameters())


def test_the_critic_follows_the_samples():
    """Trained on constants, its x0 answer becomes that constant; a frozen critic would not."""
    teacher = model()
    critic = critic_of(teacher, kind="mlp", width=32, depth=2, dropout=0.0, space="x0")
    x, cond = torch.full((64, 3, 4, 4), 0.7), {"label": torch.zeros(64)}
    params = list(critic.denoiser.parameters())
    optim = torch.optim.Adam(params, lr=5e-3)
    first = last = 0.0
    for step in range(200):
        loss = critic.loss(ctx(step, 64), "critic", x, cond)
        optim.zero_grad()
        loss.backward()
        optim.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < 0.2 * first


def test_swiftbrush_weighting_is_the_square_of_alpha_times_eps():
    teacher, (x0, cond) = model(), batch()
    gen = torch.Generator().manual_seed(2)
    t, eps = torch.rand(8, generator=gen), torch.randn(8, 3, 4, 4, generator=gen)
    pred = teacher.denoiser.predict(teacher.denoiser.process.add_noise(x0, eps, t), t, cond)
    alpha, _ = teacher.denoiser.process.coefficients(t, x0)
    expected = torch.nn.functional.mse_loss(alpha * pred.eps, alpha * eps)
    assert torch.allclose(errors(pred, x0, eps, SwiftBrushCritic()).mean(), expected)
    assert not torch.allclose(errors(pred, x0, eps, Denoising(space="eps")).mean(), expected)


def test_condition_dropout_per_sample_and_for_the_whole_batch():
    null = {"label": torch.tensor([-1.0])}
    cond = {"label": torch.arange(512).float()}
    one = dropped(ctx(batch=512), "c", cond, null, 0.1, False)["label"]
    assert 20 < int((one == -1).sum()) < 90
    assert torch.equal(one[one != -1], cond["label"][one != -1])
    whole = [dropped(ctx(step, 512), "c", cond, null, 0.1, True)["label"] for step in range(300)]
    shares = [float((label == -1).float().mean()) for label in whole]
    assert set(shares) == {0.0, 1.0} and 12 < sum(shares) < 50
    assert dropped(ctx(), "c", cond, null, 0.0, False) is cond


def test_a_key_without_null_value_survives_dropout():
    cond = {"label": torch.arange(8).float(), "camera": torch.arange(8).float()}
    found = dropped(ctx(batch=8), "c", cond, {"label": torch.tensor([-1.0])}, 1.0, False)
    assert (found["label"] == -1).all() and torch.equal(found["camera"], cond["camera"])


def test_the_critic_sees_the_full_range_of_t():
    seen = []
    teacher = model()
    critic = critic_of(teacher, kind="full")
    critic.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    for step in range(40):
        critic.loss(ctx(step, 16), "critic", *batch(16))
    times = torch.cat(seen)
    assert times.min() < 0.02 and times.max() > 0.98 and len(times.unique()) > 600


def test_critic_guidance():
    teacher = model()
    assert critic_of(teacher).scale(ctx(), 7.5) == 1.0
    assert critic_of(teacher, guidance="same").scale(ctx(), 7.5) == 7.5
    assert critic_of(teacher, guidance=[(0, 1.0), (10, 3.0)]).scale(ctx(5), 7.5) == 2.0


def test_v_critic_of_an_eps_teacher_is_compared_in_eps():
    teacher, (x, cond) = model("v"), batch()
    t = torch.rand(8)
    (found,) = predict(critic_of(teacher, kind="lora", rank=1).denoiser, [(x, t, cond)])
    alpha, sigma = teacher.denoiser.process.coefficients(t, x)
    assert found.kind == "v" and torch.allclose(found.eps, sigma * x + alpha * found.raw, atol=1e-5)


def test_a_closed_form_teacher_needs_an_mlp_critic():
    from limbeck.core.diffusion.mixture import GaussianMixture

    teacher = Model(GaussianMixture(torch.zeros(1, 2), 1.0, VP()), (2,), Identity(), lambda p: {}, "gauss")
    with pytest.raises(ValueError, match="critic.kind: mlp"):
        critic_of(teacher, kind="full")
