"""The whole way of a user with a real pipeline: run image/dmd2 on it, sample, export, load the export in diffusers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import PeftModel
from PIL import Image

from limbeck.core.distillation.lora import Patched
from limbeck.core.run import job
from limbeck.core.run import recipe as recipes
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.domains.image import students

PROMPTS = ["red apple", "rocket"]
Folder = Callable[[str], Path]
SMALL = [
    "steps=3",
    "batch=4",
    "eval=[]",
    "checkpoint.every=3",
    "sample.every=3",
    "space.steps=2",
    f"sample.prompts={PROMPTS}",
]
SLOW = pytest.mark.slow


def recipe(model: Path, *sets: str, name: str = "image/dmd2") -> Any:
    return recipes.load(name, [f"teacher.model={model}", "teacher.size=16", *SMALL, *sets])


def pictures(paths: list[Path]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(Image.open(path), dtype=int) for path in paths])


def theirs(folder: Path, adapter: Path | None, steps: int, guidance: float, seed: int) -> np.ndarray[Any, Any]:
    """The pipeline's own pictures, with the exported LoRA where one is given."""
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if adapter and hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(adapter)
    elif adapter:
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, adapter)
    if steps == 1 and "FlowMatch" not in type(pipe.scheduler).__name__:
        one = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **one)
    extra: dict[str, Any] = {"use_resolution_binning": False} if "PixArt" in type(pipe).__name__ else {}
    extra |= {"height": 16, "width": 16, "num_inference_steps": steps, "guidance_scale": guidance}
    images = pipe(PROMPTS, generator=torch.Generator().manual_seed(seed), output_type="np", **extra).images
    return (images * 255).round().astype(int)


def moved(build: Build) -> float:
    patch = build.piece("student").denoiser
    assert isinstance(patch, Patched)
    return max(float(up.weight.detach().abs().max()) for up in patch.lora.up.values())


@pytest.mark.parametrize(
    "family",
    ("sd15", "flux", *[pytest.param(f, marks=SLOW) for f in ("sd15-v", "sdxl", "sd3", "pixart")]),
)
def test_dmd2_then_sample_then_export(family: str, pipeline_folder: Folder, tmp_path: Path) -> None:
    model, run = pipeline_folder(family), tmp_path / "run"
    assert job.run(recipe(model, "stages.0.losses.0.optim.lr=1e-2"), run, device="cpu", quiet=True) == 0
    build = job.open_run(run, "cpu")
    assert moved(build) > 1e-4, "the student must have learned something"
    space = build.piece("space")
    files = space.export(build, run / "exports", "lora")
    assert all(file.is_file() for file in files)
    ours = pictures(space.sample(build, PROMPTS, 7, run / "student"))
    guidance = build.piece("teacher").options.guidance if family == "flux" else 1.0
    assert np.abs(ours - theirs(model, run / "exports", 1, guidance, 7)).max() <= 1  # rounding to 8 bits
    if family not in ("pixart",):  # PixArt's own scheduler is of second order
        ours = pictures(space.sample(build, PROMPTS, 7, run / "teacher", which="teacher", steps=4, guidance=3.0))
        assert np.abs(ours - theirs(model, None, 4, 3.0, 7)).max() <= 1


def test_student_and_critic_share_the_base(pipeline_folder: Folder, tmp_path: Path) -> None:
    """swiftbrush: a LoRA student and a LoRA critic on one frozen net, which is the teacher before and after."""
    from safetensors.torch import load_file

    model = pipeline_folder("sd15")
    sets = ("stages.0.losses.0.optim.lr=1e-2", "stages.0.losses.0.critic.rank=4", "student.lora=4")
    assert job.run(recipe(model, *sets, name="image/swiftbrush"), tmp_path / "run", device="cpu", quiet=True) == 0
    build = job.open_run(tmp_path / "run", "cpu")
    original = load_file(next((model / "unet").glob("*.safetensors")))
    state = build.piece("teacher").net.state_dict()
    assert set(state) == set(original) and all(torch.equal(state[key], original[key]) for key in original)
    assert moved(build) > 1e-4
    saved = load_file(next((tmp_path / "run" / "checkpoints").glob("*/state.safetensors")))
    assert sum(t.numel() for t in saved.values()) < 2 * sum(t.numel() for t in original.values()), (
        "adapters alone are saved"
    )


def test_a_full_copy_exports_a_pipeline(pipeline_folder: Folder, tmp_path: Path) -> None:
    model, run = pipeline_folder("sd15"), tmp_path / "run"
    sets = ("student.lora=null", "stages.0.losses.0.optim.lr=1e-3")
    assert job.run(recipe(model, *sets), run, device="cpu", quiet=True) == 0
    build = job.open_run(run, "cpu")
    with pytest.raises(BadInput, match="no LoRA"):
        students.export_lora(build, run / "lora")
    students.export_folder(build, run / "folder")
    ours = pictures(build.piece("space").sample(build, PROMPTS, 3, run / "student"))
    assert np.abs(ours - theirs(run / "folder", None, 1, 1.0, 3)).max() <= 1
    assert np.abs(ours - theirs(model, None, 1, 1.0, 3)).max() > 1


def test_a_lora_student_exports_a_merged_pipeline(pipeline_folder: Folder, tmp_path: Path) -> None:
    model, run = pipeline_folder("sd3"), tmp_path / "run"
    assert job.run(recipe(model, "stages.0.losses.0.optim.lr=1e-2"), run, device="cpu", quiet=True) == 0
    build = job.open_run(run, "cpu")
    students.export_folder(build, run / "folder")
    ours = pictures(build.piece("space").sample(build, PROMPTS, 3, run / "student"))
    assert np.abs(ours - theirs(run / "folder", None, 1, 1.0, 3)).max() <= 1


def test_resume_is_bit_exact(pipeline_folder: Folder, tmp_path: Path) -> None:
    """Two steps, a stop, two more: the same bits as four at a stretch (LoRA student, LoRA critic, adversary)."""
    from safetensors.torch import load_file

    sets = ("steps=4", "checkpoint.every=2", "sample.every=100", "stages.0.losses.0.critic.kind=lora")
    run, states = tmp_path / "run", []
    job.run(recipe(pipeline_folder("sd15"), *sets), run, device="cpu", quiet=True)
    for again in (False, True):
        last = sorted((run / "checkpoints").glob("*-00000004"))[0]
        states.append(load_file(last / "state.safetensors"))
        if not again:
            shutil.rmtree(last)
            job.run(recipes.load(str(run / "recipe.yaml")), run, device="cpu", quiet=True, resume=True)
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
