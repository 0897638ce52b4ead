"""Predictions, several queries in one forward, networks and their times, few-step students, diffusers models."""

import pytest
import torch
from torch import nn

from limbeck.core.diffusion.adapters import diffusers
from limbeck.core.diffusion.checks import Counted, two_classes
from limbeck.core.diffusion.denoiser import (
    Denoiser,
    FewStep,
    Network,
    Preconditioned,
    Prediction,
    cat_cond,
    index_cond,
    predict,
    repeat_cond,
    start_time,
)
from limbeck.core.diffusion.process import EDM, VP, Flow, convert

torch.set_num_threads(1)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed))


def seeded(seed, make):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


class Linear(nn.Module):
    """A small net with its inputs on record."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.seen = []

    def forward(self, x, time, label):
        self.seen.append((x, time))
        return self.inner(x) + label[:, None]


def test_prediction_reads_one_output_in_every_way():
    process, t = VP("cosine"), torch.linspace(0.1, 0.9, 5)
    x0, eps = noise(5, 3), noise(5, 3, seed=1)
    x_t = process.add_noise(x0, eps, t)
    pred = Prediction(eps, x_t, t, process, "eps")
    torch.testing.assert_close(pred.x0, x0, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pred.flow, eps - x0, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pred.velocity, convert(eps, x_t, t, process, "eps", "velocity"))
    assert pred.x0 is pred.x0 and pred.eps is pred.raw
    clipped = pred.replace(x0=pred.x0.clamp(-1, 1))
    torch.testing.assert_close(
        clipped.eps, convert(x0.clamp(-1, 1), x_t, t, process, "x0", "eps"), atol=1e-4, rtol=1e-3
    )


def test_half_precision_outputs_are_read_in_float32():
    raw, x_t = noise(2, 3).bfloat16(), noise(2, 3, seed=1).bfloat16()
    pred = Prediction(raw, x_t, torch.tensor([0.5, 1.0]), VP(), "eps")
    assert pred.x0.dtype == torch.float32 and pred.double().x0.dtype == torch.float64


def test_detach_cuts_the_inputs_too():
    x_t = noise(2, 3).requires_grad_()
    pred = Prediction(x_t * 2, x_t, torch.full((2,), 0.5), VP(), "eps")
    assert pred.x0.requires_grad and not pred.detach().x0.requires_grad


def test_predict_answers_all_queries_in_one_forward_and_in_order():
    teacher = Counted(two_classes())
    x, y, t = noise(4, 4), noise(2, 4, seed=1), torch.rand(4, generator=gen(2))
    queries = [
        (x, t, {"label": torch.tensor([0, 1, 0, 1])}),
        (x, t, {"label": torch.tensor([-1])}),
        (y, torch.tensor(0.3), {"label": torch.tensor([1])}),
    ]
    answers = predict(teacher, queries)
    assert teacher.calls == 1 and teacher.rows == 10 and [len(a.raw) for a in answers] == [4, 4, 2]
    for (q_x, q_t, cond), answer in zip(queries, answers, strict=True):
        torch.testing.assert_close(answer.x0, teacher.predict(q_x, q_t, cond).x0)
        assert torch.equal(answer.x_t, q_x)


def test_conditions_join_repeat_and_index():
    one, two = {"a": torch.zeros(1, 2)}, {"a": torch.ones(3, 2)}
    assert repeat_cond(one, 4)["a"].shape == (4, 2) and repeat_cond(two, 3)["a"] is two["a"]
    assert cat_cond([one, two])["a"].sum() == 6 and index_cond(two, torch.tensor([0, 0]))["a"].shape == (2, 2)
    with pytest.raises(ValueError, match=r"keys \['a'\] and \['b'\]; give each key its null value"):
        cat_cond([one, {"b": torch.zeros(1)}])


def test_network_times():
    net = Linear()
    label, x = {"label": torch.zeros(3)}, noise(3, 3)
    index = Network(net, VP(), "eps", time_scale="index")
    t = (torch.tensor([0, 399, 999]).double() + 1) / 1000
    index.predict(x, t.float(), label)
    assert net.seen[-1][1].tolist() == [0.0, 399.0, 999.0]  # whole, although t is float32
    Network(net, Flow(), "flow", time_scale=1000.0).predict(x, torch.tensor([0.0, 0.5, 1.0]), label)
    assert net.seen[-1][1].tolist() == [0.0, 500.0, 1000.0]
    with pytest.raises(ValueError, match="index"):
        Network(net, Flow(), "flow", time_scale="index").predict(x, t.float(), label)


def test_network_runs_in_the_dtype_of_its_weights():
    net = Linear().bfloat16()
    pred = Network(net, VP(), "eps").predict(
        noise(2, 3), torch.tensor([0.2, 0.9]), {"label": torch.zeros(2).bfloat16()}
    )
    assert (
        net.seen[-1][0].dtype == torch.bfloat16 and pred.raw.dtype == torch.bfloat16 and pred.x0.dtype == torch.float32
    )


def test_features_are_tapped_split_and_carry_gradient():
    net = Linear()
    tapped = Network(net, VP(), "eps", taps=("inner",))
    x, t = noise(3, 3).requires_grad_(), torch.full((3,), 0.5)
    first, second = predict(
        tapped, [(x, t, {"label": torch.zeros(3)}), (x, t, {"label": torch.ones(3)})], features=True
    )
    assert torch.equal(first.features[0], second.features[0]) and not torch.equal(first.raw, second.raw)
    first.features[0].sum().backward()
    assert x.grad is not None and not net.inner._forward_hooks
    with pytest.raises(ValueError, match="name the layers to tap"):
        Network(net, VP(), "eps").predict(x, t, {"label": torch.zeros(3)}, features=True)


@pytest.mark.parametrize("process", [EDM(), VP(), Flow()], ids=["edm", "vp", "flow"])
def test_preconditioning_has_unit_variances(process):
    """EDM's argument: unit-variance input, and a perfect net has a unit-variance target."""
    seen = {}

    def net(x, c_noise, cond):
        seen["x"], seen["c_noise"] = x, c_noise
        return torch.zeros_like(x)

    module = nn.Module()
    module.forward = net
    data_std, t = 1.6, torch.full((20_000,), 0.45)
    x0, eps = data_std * noise(20_000, 2), noise(20_000, 2, seed=1)
    x_t = process.add_noise(x0, eps, t)
    pred = Preconditioned(module, process, data_std).predict(x_t, t, {})
    alpha, sigma = process.coefficients(t, x_t)
    target = (x0 - pred.raw) * (alpha**2 * data_std**2 + sigma**2).sqrt() / (sigma * data_std)
    assert float(seen["x"].std()) == pytest.approx(1, abs=0.02) and float(target.std()) == pytest.approx(1, abs=0.02)
    assert float(seen["c_noise"][0]) == pytest.approx(float((sigma / alpha)[0].log()) / 4, rel=1e-5)


class PerfectEps(Denoiser):
    """eps = (x_t - alpha x*)/sigma for a known x*; the input is on record."""

    def __init__(self, process, target):
        super().__init__(process, "eps")
        self.target, self.inputs = target, []

    def forward(self, x_t, t, cond, features=False):
        self.inputs.append((x_t, t))
        alpha, sigma = self.process.coefficients(t, x_t)
        return (x_t - alpha * self.target) / sigma


@pytest.mark.parametrize("process", [VP("scaled_linear", 1000, 0.00085, 0.012), VP("cosine")], ids=["sd", "cosine"])
def test_one_step_student_inverts_a_perfect_eps(process):
    """Card swiftbrush, check (a): the student returns x* to 1e-5."""
    target = noise(8, 4, 4)
    student = FewStep(PerfectEps(process, target.double()), (start_time(process),))
    out = student.sample(noise(8, 4, 4, seed=1).double(), {}).x
    assert float((out - target).abs().max()) < 1e-5


def test_student_read_at_the_wrong_time_is_caught():
    # card hyper-sd-score: converting at 999 what was predicted at 800 scales the result by 2.81
    process = VP("scaled_linear", 1000, 0.00085, 0.012)
    z, at = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0.801])
    eps = PerfectEps(process, torch.ones(1, 1, dtype=torch.float64)).predict(z, at, {}).eps
    wrong = float(convert(eps, z, torch.tensor([1.0]), process, "eps", "x0"))
    s800, s999 = float(process.sigma(at)), float(process.sigma(torch.tensor([1.0])))
    assert wrong == pytest.approx(2.81 * s999 / s800, rel=2e-3) and abs(wrong - 1) > 1


class AddOne(Denoiser):
    """A stub student: x0 = x_t + 1."""

    def __init__(self, process):
        super().__init__(process, "x0")
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, x_t, t, cond, features=False):
        return x_t + self.shift


@pytest.mark.parametrize("process", [VP(), EDM(), Flow()], ids=["vp", "edm", "flow"])
def test_backward_simulation_is_the_renoised_output(process):
    """Card dmd2: the training input at step k is the renoised stub output, from noise alone, without gradient."""
    student = FewStep(AddOne(process), (1.0, 0.75, 0.5))
    z, fresh = noise(6, 3), [noise(6, 3, seed=i) for i in (1, 2)]
    x, t = student.rollout(z, {}, 0)
    torch.testing.assert_close(x, process.start(z, torch.ones(6)))
    x, t = student.rollout(z, {}, 2, fresh)
    first = process.add_noise(process.start(z, torch.ones(6)) + 1, fresh[0], torch.full((6,), 0.75))
    torch.testing.assert_close(x, process.add_noise(first + 1, fresh[1], torch.full((6,), 0.5)))
    assert not x.requires_grad and t.tolist() == [0.5] * 6
    end = student.sample(z, {}, fresh).x
    torch.testing.assert_close(end, x + 1)
    assert end.requires_grad


def test_students_refuse_bad_times_and_missing_noise():
    with pytest.raises(ValueError, match="must fall"):
        FewStep(AddOne(VP()), (0.5, 1.0))
    with pytest.raises(ValueError, match="needs 2 renoise tensors, 0 given"):
        FewStep(AddOne(VP()), (1.0, 0.5, 0.2)).sample(noise(1, 1), {})


def tiny_unet():
    from diffusers import UNet2DConditionModel

    return seeded(
        0,
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
    ).eval()


@pytest.mark.parametrize("kind,name", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_unet_with_ddim_equals_the_schedulers_own_loop(kind, name):
    from diffusers import DDIMScheduler

    from limbeck.core.diffusion.sampling import ddim, sample

    net, states = tiny_unet(), noise(2, 5, 8, seed=1)
    scheduler = DDIMScheduler(
        1000,
        0.00085,
        0.012,
        "scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type=name,
    )
    scheduler.set_timesteps(5)
    x = z = noise(2, 4, 8, 8, seed=2)
    with torch.no_grad():
        for step in scheduler.timesteps:
            x = scheduler.step(net(x, step, encoder_hidden_states=states).sample, step, x).prev_sample
    denoiser = diffusers(net, VP("scaled_linear", 1000, 0.00085, 0.012), kind, "unet")
    times = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)])
    ours = sample(denoiser, z, times, ddim(), cond={"states": states})
    assert float((ours - x).abs().max() / x.abs().max()) < 2e-5


def test_flow_transformer_with_euler_equals_the_schedulers_own_loop():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    from limbeck.core.diffusion.sampling import euler, sample

    net = seeded(
        0,
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=8,
        ),
    ).eval()
    cond = {"states": noise(2, 5, 8, seed=1), "pooled": noise(2, 8, seed=2)}
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    scheduler.set_timesteps(5)
    x = z = noise(2, 4, 8, 8, seed=3)
    with torch.no_grad():
        for step in scheduler.timesteps:
            out = net(x, cond["states"], cond["pooled"], step.expand(2), return_dict=False)[0]
            x = scheduler.step(out, step, x, return_dict=False)[0]
    denoiser = diffusers(net, Flow(), "flow", "transformer", 1000.0)
    ours = sample(denoiser, z, scheduler.sigmas, euler(), cond=cond)
    assert float((ours - x).abs().max() / x.abs().max()) < 2e-5


def test_dit_drops_its_variance_channels():
    from diffusers import DiTTransformer2DModel

    net = seeded(
        0,
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            norm_num_groups=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        ),
    ).eval()
    x, label = noise(3, 4, 8, 8), torch.tensor([1, 2, 10])
    pred = diffusers(net, VP(), "eps", "dit").predict(x, torch.tensor([0.1, 0.5, 1.0]), {"label": label})
    index = torch.tensor([99.0, 499.0, 999.0])
    own = net(x, timestep=index, class_labels=label).sample[:, :4]
    torch.testing.assert_close(pred.eps, own)
    with pytest.raises(ValueError, match="unet, dit, transformer"):
        diffusers(net, VP(), "eps", "dits")
