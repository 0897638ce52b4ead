"""Real pipelines: our teacher draws the very pictures that the family's own diffusers pipeline draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor

from limbeck.core.diffusion.sampling import ddim
from limbeck.core.diffusion.sampling import sample as walk
from limbeck.core.pipelines import PipelineModel, schedule
from limbeck.domains.image import pipelines

FAMILIES = ("sd15", "sd15-v", "sdxl", "sd3", "flux", "pixart")
PROMPTS = ["a cat on the moon", "red"]
SEED = 5
Folder = Callable[[str], Path]


def theirs(folder: Path) -> Any:
    """The pipeline as diffusers loads it (PixArt's solver at its first order, which is DDIM)."""
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if isinstance(pipe.scheduler, DPMSolverMultistepScheduler):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    return pipe


def their_pictures(pipe: Any, steps: int, guidance: float, negative: str | None = None) -> Tensor:
    extra: dict[str, Any] = {"use_resolution_binning": False} if "PixArt" in type(pipe).__name__ else {}
    extra |= {} if negative is None else {"negative_prompt": [negative] * len(PROMPTS)}
    extra |= {"height": 16, "width": 16, "num_inference_steps": steps, "guidance_scale": guidance}
    return pipe(PROMPTS, generator=torch.Generator().manual_seed(SEED), output_type="pt", **extra).images


def noise(model: PipelineModel) -> Tensor:
    return torch.randn(len(PROMPTS), *model.shape, generator=torch.Generator().manual_seed(SEED))


def pixels(model: PipelineModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (model.codec.decode(x) / 2 + 0.5).clamp(0, 1)


def our_pictures(model: PipelineModel, steps: int, guidance: float, negative: str | None = None) -> Tensor:
    return pixels(model, pipelines.sample(model, noise(model), PROMPTS, steps, guidance, negative))


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_equals_the_pipeline(family: str, pipeline_folder: Folder) -> None:
    folder = pipeline_folder(family)
    model, pipe = pipelines.load_pipeline(str(folder), size=16), theirs(folder)
    for steps, guidance in ((4, 1.0), (10, 5.0)):
        expected = their_pictures(pipe, steps, guidance)
        assert expected.std() > 0.05
        assert (our_pictures(model, steps, guidance) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ("sd15", "sdxl", "sd3", "pixart"))
def test_negative_prompt_equals_the_pipeline(family: str, pipeline_folder: Folder) -> None:
    folder = pipeline_folder(family)
    model, expected = pipelines.load_pipeline(str(folder), size=16), their_pictures(theirs(folder), 3, 4.0, "blue")
    assert (our_pictures(model, 3, 4.0, "blue") - expected).abs().max() < 1e-4
    assert (our_pictures(model, 3, 4.0) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options", ({"timestep_spacing": "trailing"}, {"set_alpha_to_one": True}, {"beta_schedule": "linear"})
)
def test_scheduler_options_reach_the_grid(options: dict[str, Any], pipeline_folder: Folder) -> None:
    pipe = theirs(pipeline_folder("sd15"))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    model = pipelines.load_pipeline(str(pipeline_folder("sd15")))
    model.pipe.scheduler = pipe.scheduler
    model.denoiser.process = schedule.process_of(pipe.scheduler, model.tokens)
    assert (our_pictures(model, 5, 3.0) - their_pictures(pipe, 5, 3.0)).abs().max() < 1e-4


def test_pndm_gives_way_to_ddim(pipeline_folder: Folder) -> None:
    """Stable Diffusion 1.5 ships PNDM, which asks twice at one timestep: we draw what DDIM of the same config draws."""
    model, pipe = pipelines.load_pipeline(str(pipeline_folder("sd15"))), theirs(pipeline_folder("sd15"))
    model.pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config, clip_sample=False)
    assert (our_pictures(model, 5, 3.0) - their_pictures(pipe, 5, 3.0)).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_variants_are_seen(family: str, pipeline_folder: Folder) -> None:
    """A uniform grid, guidance off by one and swapped noise each move the pixels by far more than the bound."""
    folder = pipeline_folder(family)
    model, expected = pipelines.load_pipeline(str(folder), size=16), their_pictures(theirs(folder), 4, 3.0)
    denoiser, cond = pipelines.guided(model, model.encode(PROMPTS), 3.0)
    uniform = walk(denoiser, noise(model), torch.linspace(1, 0, 5) ** 1.5, ddim(), cond=cond)
    assert (pixels(model, uniform) - expected).abs().max() > 1e-3
    assert (our_pictures(model, 4, 4.0) - expected).abs().max() > 1e-3
    swapped = pipelines.sample(model, noise(model).flip(0), PROMPTS, 4, 3.0)
    assert (pixels(model, swapped) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_grid_is_the_schedulers(family: str, pipeline_folder: Folder) -> None:
    """Falling times, one for each step and an end; the net is asked at the scheduler's own timesteps."""
    model = pipelines.load_pipeline(str(pipeline_folder(family)), size=16)
    grid = model.grid(7)
    assert grid.shape == (8,) and (grid.diff() < 0).all() and grid[0] <= 1 and grid[-1] >= 0
    if model.denoiser.kind == "flow":
        return
    asked: list[float] = []
    hook = model.net.register_forward_pre_hook(
        lambda net, args, kwargs: asked.append(float(kwargs.get("timestep", args[1] if len(args) > 1 else 0)[0])),
        with_kwargs=True,
    )
    pipelines.sample(model, noise(model), PROMPTS, 7, 1.0)
    hook.remove()
    scheduler = type(model.pipe.scheduler).from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(7)
    assert asked == [float(k) for k in scheduler.timesteps]


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_channel_first_and_harmless(family: str, pipeline_folder: Folder) -> None:
    model = pipelines.load_pipeline(str(pipeline_folder(family)), size=16)
    cond, t = model.encode(PROMPTS), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        with_taps = model.denoiser.predict(noise(model), t, cond, features=True)
        plain = model.denoiser.predict(noise(model), t, cond)
    width = {"unet": 32}.get(model.family.net, {"pixart": 24}.get(family, 16))
    assert with_taps.features is not None and [f.shape[:2] for f in with_taps.features] == [(2, width)]
    assert torch.equal(with_taps.raw, plain.raw)


def test_codec_gives_the_autoencoders_latents(pipeline_folder: Folder) -> None:
    """SD3 has a scaling and a shift: latent = (vae(x) - shift) * scaling, and decode undoes it."""
    model = pipelines.load_pipeline(str(pipeline_folder("sd3")))
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean = model.pipe.vae.encode(x).latent_dist.mode()
        z = model.codec.encode(x)
        assert torch.allclose(z, (mean - 0.0609) * 1.5305, atol=1e-6)
        assert torch.allclose(model.codec.decode(z), model.pipe.vae.decode(mean).sample, atol=1e-5)
    assert z.shape[1:] == model.shape


def test_half_precision_loads(pipeline_folder: Folder) -> None:
    model = pipelines.load_pipeline(str(pipeline_folder("sd15")), dtype=torch.bfloat16)
    x = pipelines.sample(model, noise(model), PROMPTS, 2, 2.0)
    full = pipelines.sample(
        pipelines.load_pipeline(str(pipeline_folder("sd15"))), noise(model), PROMPTS, 2, 2.0
    )  # fmt: skip
    assert next(model.net.parameters()).dtype == torch.bfloat16 and x.dtype == torch.float32
    assert (x - full).abs().mean() < 0.1 * full.std()


def test_long_prompts_are_told_once(pipeline_folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    """The tiny CLIP reads 24 tokens; training must not be told at every step."""
    model = pipelines.load_pipeline(str(pipeline_folder("sd15")))
    capfd.readouterr()
    model.encode(PROMPTS)
    assert capfd.readouterr().err == ""
    for _ in range(3):
        model.encode(["a prompt that has far more than twenty-four letters"])
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "24 tokens" in err and "a prompt that" in err
