"""LoRA students: off is the teacher bit for bit, several share one base, diffusers draws the same from the export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from peft import PeftModel
from tiny_pictures import stirred
from torch import Tensor

from limbeck.core.diffusion.denoiser import FewStep
from limbeck.core.diffusion.sampling import ddim
from limbeck.core.diffusion.sampling import sample as walk
from limbeck.core.pipelines import PipelineModel, lora
from limbeck.domains.image import pipelines

FAMILIES = ("sd15", "sd15-v", "sdxl", "sd3", "flux", "pixart")
PROMPTS = ["a cat on the moon", "red"]
SEED = 3
Folder = Callable[[str], Path]


def load(pipeline_folder: Folder, family: str) -> PipelineModel:
    return pipelines.load_pipeline(str(pipeline_folder(family)), size=16)


def noise(model: PipelineModel) -> Tensor:
    return torch.randn(len(PROMPTS), *model.shape, generator=torch.Generator().manual_seed(SEED))


def pixels(model: PipelineModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (model.codec.decode(x) / 2 + 0.5).clamp(0, 1)


def reloaded(model: PipelineModel, folder: Path, adapter: Path) -> Any:
    """The untouched pipeline with the exported LoRA, both read by diffusers (PixArt: by peft) itself."""
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(adapter)
    else:
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, adapter)
    return pipe


def their_pictures(pipe: Any, steps: int, guidance: float) -> Tensor:
    extra: dict[str, Any] = {"use_resolution_binning": False} if "PixArt" in type(pipe).__name__ else {}
    extra |= {"height": 16, "width": 16, "num_inference_steps": steps, "guidance_scale": guidance}
    return pipe(PROMPTS, generator=torch.Generator().manual_seed(SEED), output_type="pt", **extra).images


def one_step_scheduler(pipe: Any) -> None:
    """A scheduler whose single step is the student's: from the last index to exact data."""
    if "FlowMatch" not in type(pipe.scheduler).__name__:
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_the_teacher_bit_for_bit(family: str, pipeline_folder: Folder) -> None:
    model = load(pipeline_folder, family)
    cond, t = model.encode(PROMPTS), torch.tensor([0.4, 1.0])
    with torch.no_grad():
        before = model.denoiser.predict(noise(model), t, cond).raw
        student, critic = stirred(lora.attach(model, 4, seed=0)), lora.attach(model, 2, alpha=4.0, seed=1)
        patched = student.predict(noise(model), t, cond).raw
        fresh = critic.predict(noise(model), t, cond).raw
        after = model.denoiser.predict(noise(model), t, cond).raw
    assert torch.equal(before, after)
    assert torch.equal(before, fresh), "a new adapter (B = 0) is the teacher"
    assert (patched - before).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_students_and_critics_train_apart_on_one_base(family: str, pipeline_folder: Folder) -> None:
    """Their parameters are the LoRA's alone; a loss through student, critic and teacher reaches each in its own way."""
    model = load(pipeline_folder, family)
    student, critic = stirred(lora.attach(model, 4, seed=0)), stirred(lora.attach(model, 2, seed=1))
    mine, other = set(map(id, student.parameters())), set(map(id, critic.parameters()))
    base = set(map(id, model.net.parameters()))
    assert not mine & other and not (mine | other) & base
    assert not any(p.requires_grad for p in model.net.parameters()) and all(
        p.requires_grad for p in student.parameters()
    )
    cond, t = model.encode(PROMPTS), torch.tensor([0.4, 0.6])
    x = student.predict(noise(model), t, cond).x0
    critic.requires_grad_(False)
    (critic.predict(x, t, cond).x0 - model.denoiser.predict(x, t, cond).x0).square().mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert any(p.grad.abs().max() > 0 for p in student.parameters() if p.grad is not None)
    assert all(p.grad is None for p in (*critic.parameters(), *model.net.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_export_draws_the_same_in_diffusers(family: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    """Four steps with guidance on the teacher's grid."""
    model = load(pipeline_folder, family)
    patch = stirred(lora.attach(model, 4, alpha=6.0, seed=0))
    files = lora.save_lora(model, patch.lora, tmp_path)
    assert all(file.is_file() and file.suffix in (".safetensors", ".json") for file in files)
    pipe = reloaded(model, pipeline_folder(family), tmp_path)
    if isinstance(pipe.scheduler, DPMSolverMultistepScheduler):  # at its first order it is DDIM
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    denoiser, cond = pipelines.guided(model, model.encode(PROMPTS), 3.0, denoiser=patch)
    ours = walk(denoiser, noise(model), model.grid(4), ddim(), cond=cond)
    assert (pixels(model, ours) - their_pictures(pipe, 4, 3.0)).abs().max() < 1e-4
    plain = pipelines.sample(model, noise(model), PROMPTS, 4, 3.0)
    assert (pixels(model, ours) - pixels(model, plain)).abs().max() > 1e-2, "the patch must show"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_student_equals_one_step_pipeline(family: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    """x0 at t = 1, no guidance: the single step of DDIM (trailing) or Euler."""
    model = load(pipeline_folder, family)
    student = FewStep(stirred(lora.attach(model, 4, seed=0)), [1.0])
    with torch.no_grad():
        ours = student.sample(noise(model), model.encode(PROMPTS)).x
    lora.save_lora(model, student.denoiser.lora, tmp_path)
    pipe = reloaded(model, pipeline_folder(family), tmp_path)
    one_step_scheduler(pipe)
    guidance = model.options.guidance if model.family.embeds_guidance else 1.0
    assert (pixels(model, ours) - their_pictures(pipe, 1, guidance)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ("sd15", "flux"))
def test_merged_net_is_the_patched_net(family: str, pipeline_folder: Folder) -> None:
    model = load(pipeline_folder, family)
    patch = stirred(lora.attach(model, 4, alpha=6.0, seed=0))
    cond, t = model.encode(PROMPTS), torch.tensor([0.4, 1.0])
    with torch.no_grad():
        patched = patch.predict(noise(model), t, cond).raw
        kept = getattr(model.pipe, model.family.net)
        merged = lora.merged(model, patch.lora)
        model.net.load_state_dict(merged.state_dict())
        assert (model.denoiser.predict(noise(model), t, cond).raw - patched).abs().max() < 1e-4
    assert kept is model.net


def test_adapters_stay_float32_on_a_half_precision_base(pipeline_folder: Folder) -> None:
    model = pipelines.load_pipeline(str(pipeline_folder("sd15")), dtype=torch.bfloat16)
    patch = lora.attach(model, 4, seed=0)
    assert {p.dtype for p in patch.parameters()} == {torch.float32}
    x = patch.predict(noise(model), torch.tensor([1.0, 0.5]), model.encode(PROMPTS)).x0
    x.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in patch.parameters())


def test_a_seed_draws_without_the_global_generator(pipeline_folder: Folder) -> None:
    model = load(pipeline_folder, "sd15")
    state = torch.get_rng_state()
    first, second, third = (lora.attach(model, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    weights = [torch.cat([p.flatten() for p in patch.parameters()]) for patch in (first, second, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
