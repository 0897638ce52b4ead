"""Real video pipelines: our teacher draws the very clips that the family's own diffusers pipeline draws."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, DiffusionPipeline, MotionAdapter, UniPCMultistepScheduler
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_pictures import stirred
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.core import film
from limbeck.core.diffusion.denoiser import Denoiser
from limbeck.core.diffusion.manystep import ManyStep
from limbeck.core.distillation.lora import Patched
from limbeck.core.pictures import CELL, sheet
from limbeck.core.pipelines import PipelineModel, lora
from limbeck.core.run import job
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput
from limbeck.core.run.recipe import load
from limbeck.domains.video import config, io, mcm, teacher
from limbeck.domains.video.pipelines import latents, load_pipeline
from limbeck.domains.video.pipelines.codec import fitted

PROMPTS = ["a cat on the moon", "red"]
SEED = 5
VARIANTS = (
    "animatediff", "modelscope", "wan", "ltx", "ltx-timed", "cogvideox", "cogvideox-5b", "cogvideox-1.5",
    "hunyuanvideo",
)  # fmt: skip
Folder = Callable[[str], Path]
Opened = Callable[[str], PipelineModel]


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The module tiny_videos."""
    import tiny_videos

    return tiny_videos


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Family -> folder of its tiny pipeline."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("pipelines")
    return lambda family: tiny.build(family, root)


def settings(tiny: Any, family: str, path: Path, **more: Any) -> config.VideoTeacher:
    base = family.split("-")[0]
    usual = {"model": str(path), "size": tiny.SIZES.get(base, (16, 32)), "frames": tiny.FRAMES.get(base, 5)}
    return config.VideoTeacher.model_validate({**usual, **more})


@pytest.fixture(scope="module")
def opened(tiny: Any, folder: Folder) -> Opened:
    """Family -> its teacher, loaded once."""
    return cache(lambda family: load_pipeline(settings(tiny, family, folder(family)), "cpu", torch.float32))


def theirs(path: Path) -> Any:
    """The pipeline as diffusers loads it (Wan's solver at its first order, without a corrector, which is Euler)."""
    pipe = DiffusionPipeline.from_pretrained(path, use_safetensors=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if isinstance(pipe.scheduler, UniPCMultistepScheduler):
        plain = {"solver_order": 1, "disable_corrector": list(range(99))}
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **plain)
    return pipe


def their_clips(pipe: Any, model: PipelineModel, steps: int, guidance: float, **extra: Any) -> Tensor:
    """[B,F,3,H,W] in [0,1]."""
    if model.family.name == "cogvideox":
        extra["max_sequence_length"] = 24
    height, width = model.options.size
    extra |= {"height": height, "width": width, "num_frames": model.codec.count, "guidance_scale": guidance}
    generator = torch.Generator().manual_seed(SEED)
    return pipe(PROMPTS, num_inference_steps=steps, generator=generator, output_type="pt", **extra).frames


@torch.no_grad()
def our_clips(
    model: PipelineModel, steps: int, guidance: float, denoiser: Denoiser | None = None, **cond: Tensor
) -> Tensor:
    noise = model.noise(len(PROMPTS), torch.Generator().manual_seed(SEED))
    sampler = ManyStep(model, denoiser or model.denoiser, steps, guidance)
    x = sampler.sample(noise, model.encode(PROMPTS) | cond).x
    return (model.codec.decode(x) / 2 + 0.5).clamp(0, 1).transpose(1, 2)


@pytest.mark.parametrize("family", VARIANTS)
def test_teacher_equals_the_pipeline(family: str, folder: Folder, opened: Opened) -> None:
    """With guidance and without; another guidance moves the pixels by far more than the bound."""
    model, pipe = opened(family), theirs(folder(family))
    for steps, guidance in ((2, 1.0), (4, 5.0)):
        expected = their_clips(pipe, model, steps, guidance)
        assert expected.std() > 0.05
        assert (our_clips(model, steps, guidance) - expected).abs().max() < 1e-4
    assert (our_clips(model, 4, 4.0) - expected).abs().max() > 1e-3


def test_ltx_is_asked_at_the_frame_rate_of_each_clip(folder: Folder, opened: Opened) -> None:
    model, pipe = opened("ltx"), theirs(folder("ltx"))
    ours = our_clips(model, 2, 3.0, fps=torch.tensor([12.0, 25.0]))
    for row, rate in enumerate((12, 25)):
        expected = their_clips(pipe, model, 2, 3.0, frame_rate=rate)
        assert (ours[row] - expected[row]).abs().max() < 1e-4 < (ours[1 - row] - expected[1 - row]).abs().max()


def test_stable_diffusion_takes_a_motion_adapter(tiny: Any, tmp_path: Path) -> None:
    """With the noise that adapters are made for, whatever the folder's own scheduler says."""
    base, motion = tiny.images.build("sd15", tmp_path), tmp_path / "motion"
    tiny.adapter().save_pretrained(motion)
    model = load_pipeline(settings(tiny, "animatediff", base, motion=str(motion)), "cpu", torch.float32)
    adapter = MotionAdapter.from_pretrained(motion)
    pipe = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    made_for = {"beta_schedule": "linear", "clip_sample": False}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **made_for)
    assert (our_clips(model, 3, 4.0) - their_clips(pipe, model, 3, 4.0)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ("animatediff", "modelscope", "wan", "hunyuanvideo"))
def test_an_exported_lora_draws_the_same_in_diffusers(
    family: str, folder: Folder, opened: Opened, tmp_path: Path
) -> None:
    model, pipe = opened(family), theirs(folder(family))
    patch = stirred(lora.attach(model, 2, alpha=3.0, seed=0))
    lora.save_lora(model, patch.lora, tmp_path)
    if family == "modelscope":  # diffusers loads no LoRA into this net, peft does
        pipe.unet = PeftModel.from_pretrained(pipe.unet, tmp_path)
    else:
        pipe.load_lora_weights(tmp_path)
    ours = our_clips(model, 2, 3.0, patch)
    assert (ours - their_clips(pipe, model, 2, 3.0)).abs().max() < 1e-4
    assert (ours - our_clips(model, 2, 3.0)).abs().max() > 1e-2, "the patch must show"


def test_lora_goes_where_the_families_want_it(opened: Opened) -> None:
    names = {family: set(lora.attach(opened(family), 1).lora.down) for family in ("modelscope", "hunyuanvideo")}
    assert all("refiner" not in name for name in names["hunyuanvideo"])
    assert {name.split("/")[0] for name in names["hunyuanvideo"]} == {"transformer_blocks", "single_transformer_blocks"}
    assert not any("temp" in name and "conv" in name for name in names["modelscope"])
    assert {"up_blocks/0/upsamplers/0/conv", "mid_block/resnets/0/time_emb_proj"} <= names["modelscope"]


@pytest.mark.parametrize("family", ("animatediff", "wan"))
def test_gradients_of_two_patches_on_one_base(family: str, tiny: Any, folder: Folder, opened: Opened) -> None:
    """With checkpointing as without; the teacher is the base, bit for bit; torch's own checkpoint forgets the patch."""
    grads, raws = [], []
    saving = load_pipeline(settings(tiny, family, folder(family), checkpointing=True), "cpu", torch.float32)
    for model in (opened(family), saving):
        x = model.noise(1, torch.Generator().manual_seed(0))
        t, cond = torch.tensor([0.4]), model.encode(PROMPTS[:1])
        with torch.no_grad():
            raws.append(model.denoiser.predict(x, t, cond).raw)
        student, critic = (stirred(lora.attach(model, 2, seed=seed)) for seed in (0, 1))
        (critic.predict(student.predict(x, t, cond).x0, t, cond).x0 - raws[0]).square().mean().backward()
        grads.append([p.grad for patch in (student, critic) for p in patch.parameters()])
        with torch.no_grad():
            raws.append(model.denoiser.predict(x, t, cond).raw)
        assert not any(p.requires_grad for p in model.net.parameters())
    assert all(torch.equal(raw, raws[0]) for raw in raws)
    for plain, again in zip(*grads, strict=True):
        assert plain is not None and again is not None and torch.allclose(plain, again, rtol=1e-4, atol=1e-8)
    saving.net.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=False))
    student.zero_grad()
    try:
        student.predict(x, t, cond).x0.square().mean().backward()
    except RuntimeError:  # torch counts what the second pass saves
        return
    pytest.fail("a second pass without the patch must be seen")


def test_half_precision(tiny: Any, folder: Folder, opened: Opened) -> None:
    """Wan keeps some of its weights in float32: it is asked in bfloat16 all the same; its patch is float32."""
    model = load_pipeline(settings(tiny, "wan", folder("wan")), "cpu", torch.bfloat16)
    kinds = {p.dtype for p in model.net.parameters()}
    assert kinds == {torch.bfloat16, torch.float32} and model.pipe.vae.dtype == torch.bfloat16
    patch = lora.attach(model, 2, seed=0)
    x, full = our_clips(model, 2, 3.0, patch), our_clips(opened("wan"), 2, 3.0)
    assert x.dtype == torch.float32 and (x - full).abs().mean() < 0.1 * full.std()
    assert {p.dtype for p in patch.parameters()} == {torch.float32}


def test_autoencoders_in_parts(tiny: Any, folder: Folder, opened: Opened) -> None:
    """One clip at a time is the same; in pieces nearly so, as the pieces overlap."""
    whole, more = opened("wan"), {"slicing": True, "tiling": True}
    parts = load_pipeline(settings(tiny, "wan", folder("wan"), **more), "cpu", torch.float32)
    z = 0.2 * whole.noise(2, torch.Generator().manual_seed(0))
    assert parts.codec.inner.chunk == 1 and parts.pipe.vae.use_tiling and not whole.pipe.vae.use_tiling
    with torch.no_grad():
        expected = whole.codec.decode(z)
        assert torch.allclose(parts.codec.decode(z), expected, atol=1e-5), "smaller than a piece"
        parts.pipe.vae.enable_tiling(16, 16, 8, 8)
        tiled = parts.codec.decode(z)
    error = (tiled - expected).abs()
    assert 0 < error.mean() < 0.2 * expected.std()


def test_codec_gives_the_autoencoders_latents(opened: Opened) -> None:
    """Normalised by channel; clips of another size and length are cut to the model's."""
    model = opened("wan")
    x = torch.rand(1, 3, 8, 20, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = model.codec.encode(x)
        mean = model.pipe.vae.encode(x[:, :, :5, 2:18]).latent_dist.mode()
    assert z.shape[1:] == model.shape == (4, 2, 4, 8)
    assert torch.allclose(z, (mean - torch.tensor([0.1, -0.2, 0.3, 0.0]).view(4, 1, 1, 1))
                          / torch.tensor([1.5, 2.0, 1.0, 0.7]).view(4, 1, 1, 1), atol=1e-5)  # fmt: skip
    wide = torch.arange(12.0).expand(1, 3, 4, 12) / 6 - 1
    assert fitted(wide, (4, 4)).shape == (1, 3, 4, 4) and torch.allclose(fitted(wide, (4, 4)), wide[..., 4:8])
    padded = opened("cogvideox-1.5")
    with torch.no_grad():
        z = padded.codec.encode(x[:, :, :1].expand(-1, -1, 9, -1, -1))
    assert (
        padded.codec.extra == 1 and z.shape[1:] == padded.shape == (4, 4, 2, 4) and torch.equal(z[:, :, 0], z[:, :, 1])
    )
    assert padded.codec.decode(z).shape == (1, 3, 9, 16, 32)


def test_the_noise_of_cogvideox_falls_to_zero_signal(opened: Opened) -> None:
    process, scheduler = opened("cogvideox").denoiser.process, opened("cogvideox").pipe.scheduler
    alpha = process.alpha((torch.arange(1000) + 1) / 1000)
    assert torch.allclose(alpha**2, scheduler.alphas_cumprod, atol=1e-6, rtol=0) and 0 < alpha[-1] < 1e-5


def test_a_judge_of_frames_sees_those_of_whole_clips(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's latent frames cannot be decoded by themselves."""
    model = opened("wan")
    judge = mcm.Judge(config.FrameAdversary(), None, None, model.codec)  # type: ignore[arg-type]
    monkeypatch.setattr(judge, "logits", lambda clips, look: clips)
    place, z = torch.tensor([[0.0, 0.99]]), model.noise(1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        shown, clip = judge.shown(z, mcm.Look(place, torch.zeros(1, 2, 7))), model.codec.decode(z)
    assert torch.equal(shown, clip[:, :, [0, 4]])


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(BadInput) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_what_does_not_fit_is_one_line(tiny: Any, folder: Folder, opened: Opened, tmp_path: Path) -> None:
    def told(family: str, size: tuple[int, int], frames: int) -> str:
        model: Any = opened(family)
        return refusal(lambda: latents(model.pipe, model.family, size, frames))

    assert "6 is not 4k + 1" in told("wan", (16, 32), 6) and "set 5 or 9" in told("wan", (16, 32), 6)
    assert "5 is not 8k + 1" in told("cogvideox", (16, 32), 5) and "multiples of 8" in told("wan", (16, 20), 5)
    assert "9 is more than the 8" in told("animatediff", (8, 8), 9)
    build = Build(load("video/lcm", [f"teacher.model={tmp_path}"]))
    assert "has no model_index.json" in refusal(lambda: build.piece("teacher"))
    build = Build(load("video/lcm", ["teacher.frames=8"]))
    assert "teacher.frames: is for diffusers pipelines" in refusal(lambda: build.piece("teacher"))

    index = tmp_path / "model_index.json"
    for name, expected in (("WanPipelin", 'did you mean "WanPipeline"'), ("MochiPipeline", "HunyuanVideoPipeline")):
        index.write_text(json.dumps({"_class_name": name}))
        assert expected in refusal(lambda: load_pipeline(settings(tiny, "wan", tmp_path), "cpu", torch.float32))
    index.write_text(json.dumps({"_class_name": "WanPipeline", "transformer_2": ["diffusers", "X"]}))
    assert "transformer_2" in refusal(lambda: load_pipeline(settings(tiny, "wan", tmp_path), "cpu", torch.float32))


SMALL = ["eval=[]", "batch=2", "steps=2", "checkpoint.every=2", "sample.every=2", "space.steps=2",
         f"sample.prompts={PROMPTS}"]  # fmt: skip


def trained(name: str, made: config.VideoTeacher, out: Path, *sets: str) -> Build:
    """A run of this recipe with a tiny pipeline, opened again."""
    assert made.size
    own = [f"teacher.model={made.model}", f"teacher.size={list(made.size)}", f"teacher.frames={made.frames}"]
    assert job.run(load(name, [*own, *SMALL, *sets]), out, device="cpu", quiet=True) == 0
    return job.open_run(out, "cpu")


def moved(build: Build) -> float:
    patch = build.piece("student").denoiser
    assert isinstance(patch, Patched)
    return max(float(up.weight.detach().abs().max()) for up in patch.lora.up.values())


def test_lcm_trains_a_lora_that_diffusers_draws_with(tiny: Any, folder: Folder, opened: Opened, tmp_path: Path) -> None:
    """And the films of `limbeck sample` are those of the pipeline's own clips."""
    run, made = tmp_path / "run", settings(tiny, "wan", folder("wan"))
    build = trained("video/lcm", made, run, "stages.0.losses.0.optim.lr=1e-2", "student.of.lora=2")
    assert moved(build) > 1e-4
    told = ["sample", str(run), "--which", "teacher", "--steps", "2", "--guidance", "3", "--seed", str(SEED)]
    told += [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    result = CliRunner().invoke(app, [*told, "--out", str(tmp_path / "films"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    films, pipe = sorted((tmp_path / "films").glob("*.mp4")), theirs(folder("wan"))
    expected = their_clips(pipe, opened("wan"), 2, 3.0)
    for path, clip in zip(films, expected, strict=True):
        film.write(clip * 2 - 1, tmp_path / "own.mp4", 6.0)
        ours, own = (io.read(file).frames.int() for file in (path, tmp_path / "own.mp4"))
        assert ours.shape == own.shape and (ours - own).abs().max() <= 2

    model = build.piece("teacher")
    build.piece("space").export(build, tmp_path / "lora", "lora")
    pipe.load_lora_weights(tmp_path / "lora")
    ours = our_clips(model, 2, 3.0, build.piece("student").denoiser)
    assert (ours - their_clips(pipe, model, 2, 3.0)).abs().max() < 1e-4
    assert (ours - expected).abs().max() > 1e-3
    build.piece("space").export(build, tmp_path / "merged", "diffusers")
    merged = their_clips(theirs(tmp_path / "merged"), model, 2, 3.0)
    assert (merged - ours).abs().max() < 1e-4


def test_dmd2_trains_student_and_critic_on_one_base(tiny: Any, folder: Folder, tmp_path: Path) -> None:
    made = settings(tiny, "animatediff", folder("animatediff"))
    sets = ("stages.0.losses.0.optim.lr=1e-2", "stages.0.losses.0.critic={kind: lora, rank: 2}", "student.lora=2")
    build = trained("video/dmd2", made, tmp_path / "run", *sets, "student.times=[1.0]")
    assert moved(build) > 1e-4
    original = load_file(next((folder("animatediff") / "unet").glob("*.safetensors")))
    state = build.piece("teacher").net.state_dict()
    assert set(state) == set(original) and all(torch.equal(state[key], original[key]) for key in original)
    saved = load_file(next((tmp_path / "run" / "checkpoints").glob("*/state.safetensors")))
    assert sum(t.numel() for t in saved.values()) < sum(t.numel() for t in original.values()), "adapters alone"


def test_sheets_keep_the_aspect_of_wide_clips() -> None:
    page = sheet({"": [Image.new("RGB", (64, 32), "red")]}, [""])
    red = (torch.from_numpy(np.asarray(page).copy()) == torch.tensor([255, 0, 0])).all(-1)
    assert red.any(0).sum() == CELL and red.any(1).sum() == CELL // 2


def test_names_and_folders_go_the_same_way(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a slash in its name is found as well."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder("wan"), tmp_path / "mine")
    build = Build(load("video/lcm", ["teacher.model=mine", "teacher.frames=1", "teacher.size=[8, 8]"]))
    assert build.piece("teacher").shape == (4, 1, 2, 2)
    assert teacher.names() and Build(load("video/lcm", [])).piece("teacher").shape == (3, 8, 32, 32)
