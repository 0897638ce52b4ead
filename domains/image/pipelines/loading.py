"""From a folder or a hub id to a Model: no remote code, no pickled weights, no download that the user did not name."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Autoencoder
from limbeck.core.diffusion.denoiser import Call, Denoiser, Encoded, Model, Network, Output
from limbeck.core.diffusion.process import VP, Process
from limbeck.core.run.errors import BadInput, clean, did_you_mean
from limbeck.domains.image.pipelines import flux, pixart, schedule, sd3, stable_diffusion
from limbeck.domains.image.pipelines.family import Family, Options, Pipe

FAMILIES = (stable_diffusion.SD, stable_diffusion.SDXL, sd3.SD3, flux.FLUX, pixart.PIXART)
KNOWN: dict[str, Family] = {name: family for family in FAMILIES for name in family.pipelines}
LIBRARIES = ("diffusers", "transformers")
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # never loaded: they take no part in denoising


@dataclass(kw_only=True)
class PipelineModel(Model):
    """A Model that remembers its pipeline: its scheduler gives the time grid, its loader mixin saves the LoRA."""

    pipe: Pipe
    family: Family
    options: Options

    @property
    def net(self) -> nn.Module:
        """The frozen net that denoises."""
        net = getattr(self.pipe, self.family.net)
        assert isinstance(net, nn.Module)
        return net

    def grid(self, steps: int) -> Tensor:
        """The grid of the family's own scheduler."""
        return schedule.grid(self.pipe.scheduler, steps, self.tokens, self.family.linear_sigmas).float()

    @property
    def tokens(self) -> int:
        """Image tokens of a sample: what a dynamic shift depends on."""
        return (self.shape[-1] // self.family.patch) * (self.shape[-2] // self.family.patch)


def load_pipeline(
    path_or_hub_id: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    guidance: float | None = None,
) -> PipelineModel:
    """The teacher of a diffusers pipeline. `size`: pixels of the square picture; `guidance`: for nets that embed it."""
    source, local = locate(path_or_hub_id)
    index = read_index(source, local)
    family = family_of(index, source)
    pipe = read_pipe(index, source, local, dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    options = Options(size or family.sample_size(pipe), family.guidance if guidance is None else guidance)
    return assemble(pipe, family, options, name=path_or_hub_id)


def locate(text: str) -> tuple[str, bool]:
    """(folder, True) for a local folder, (id, False) for what can only be a hub id."""
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path), True
    if path.is_file():
        raise BadInput(
            f"model: {clean(text)} is a single file; give the folder of a diffusers pipeline (with model_index.json)"
        )
    parts = text.split("/")
    if text[:1] in "./~" or len(parts) != 2 or not all(parts):
        raise BadInput(
            f"model: there is no folder {clean(text)}; give a pipeline folder, an embedded name or a hub id OWNER/NAME"
        )
    return text, False


def read_index(source: str, local: bool) -> dict[str, Any]:
    """model_index.json as a dict."""
    path = Path(source) / "model_index.json" if local else download_index(source)
    if not path.is_file():
        raise BadInput(
            f"model: {clean(source)} has no model_index.json; give the folder that `pipeline.save_pretrained` wrote"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON ({clean(error, 80)})") from None
    if not isinstance(index, dict):
        raise BadInput(f"{path}: must be a JSON object")
    return index


def download_index(source: str) -> Path:
    """The index of a hub model: the first download, made only because the user named the id."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "model_index.json"))
    except Exception as error:  # the hub's client raises many unrelated types
        reason = clean(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, 120)
        raise BadInput(
            f"model: cannot read {clean(source)} from the hub ({reason}); check the id and the network"
        ) from None


def family_of(index: dict[str, Any], source: str) -> Family:
    """The family by the pipeline's class; code that a folder brings along is refused."""
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise BadInput(
            f"model: {clean(source)} brings its own pipeline code, which is never run; use a plain diffusers pipeline"
        )
    for part, entry in index.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if not part.startswith("_") and part not in UNUSED and library not in (None, *LIBRARIES):
            raise BadInput(
                f"model: {part} of {clean(source)} needs code from {clean(library, 60)!r}, which is never run"
            )
    if name not in KNOWN:
        known = ", ".join(KNOWN)
        raise BadInput(f"model: unknown pipeline {clean(name, 60)}{did_you_mean(name, KNOWN)}; limbeck knows {known}")
    return KNOWN[name]


def refuse_pickles(folder: Path) -> None:
    """Every component with weights must have them as safetensors."""
    for part in sorted(child for child in folder.iterdir() if child.is_dir() and child.name not in UNUSED):
        files = [file.name for file in part.iterdir() if file.is_file()]
        pickled = [file for file in files if file.endswith(PICKLED) and file != "training_args.bin"]
        if pickled and not any(file.endswith(".safetensors") for file in files):
            raise BadInput(f"{part}: {pickled[0]} is a pickle, which is never opened; save the pipeline as safetensors")


def read_pipe(index: dict[str, Any], source: str, local: bool, dtype: torch.dtype) -> Pipe:
    """The pipeline itself, safetensors only, without the parts that we do not use."""
    import diffusers

    if local:
        refuse_pickles(Path(source))
    cls = getattr(diffusers, index["_class_name"])
    skipped = {part: None for part in UNUSED if part in index}
    try:
        pipe = cls.from_pretrained(source, dtype=dtype, use_safetensors=True, local_files_only=local, **skipped)
    except (OSError, ValueError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"model: cannot load {clean(source)}: {clean(lines[0], 160)}") from None
    if dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
        pipe.vae.to(torch.float32)
    return pipe


def assemble(pipe: Pipe, family: Family, options: Options, name: str) -> PipelineModel:
    """Our adapters around the pipeline's own components, all frozen."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    net, side = getattr(pipe, family.net), latent_side(pipe, family, options.size)
    tokens = (side // family.patch) ** 2
    process = schedule.process_of(pipe.scheduler, tokens)
    denoiser = network(net, process, schedule.kind_of(pipe.scheduler), family)
    return PipelineModel(
        denoiser=denoiser, shape=(family.channels(net), side, side), name=name,
        codec=AtSize(codec_of(pipe), options.size),
        encode=lambda prompts: encode(pipe, family, options, prompts), pipe=pipe, family=family, options=options,
    )  # fmt: skip


def latent_side(pipe: Pipe, family: Family, size: int) -> int:
    """Latents per side; the size must fill whole tokens."""
    unit = pipe.vae_scale_factor * family.patch
    if size <= 0 or size % unit:
        raise BadInput(f"teacher.size: {size} is not a multiple of {unit}, as {family.name} needs")
    return size // int(pipe.vae_scale_factor)


def network(net: nn.Module, process: Process, kind: str, family: Family) -> Denoiser:
    """The net behind our time: index k for VP, scale * sigma(t) for rectified flow."""
    taps, call = family.taps(net), in_net_dtype(family.call)
    if isinstance(process, VP):
        made = Network(net, process, kind, call, time_scale="index", taps=taps)
    else:
        made = Network(net, process, kind, by_sigma(call, process, family.flow_scale), taps=taps)
    return TokenFeatures(made) if family.net == "transformer" else made


class TokenFeatures(Denoiser):
    """A transformer whose tapped tokens [B,L,C] are handed on channel first, [B,C,L], as those of a U-Net are."""

    def __init__(self, inner: Network) -> None:
        super().__init__(inner.process, inner.kind)
        self.inner = inner

    def forward(self, x_t: Tensor, t: Tensor, cond: Encoded, features: bool = False) -> Output:
        out = self.inner(x_t, t, cond, features)
        return (out[0], [tokens.mT for tokens in out[1]]) if isinstance(out, tuple) else out


def in_net_dtype(call: Call) -> Call:
    """A call whose conditions have the dtype of x: a float32 copy of a net is asked with half-precision text."""

    def cast(net: nn.Module, x: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        return call(net, x, t, {key: c.to(x.dtype) if c.is_floating_point() else c for key, c in cond.items()})

    return cast


def by_sigma(call: Call, process: Process, scale: float) -> Call:
    """A call whose time is scale * sigma(t): flow families with a shift count time in sigma, not in t."""

    def timed(net: nn.Module, x: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        return call(net, x, (process.sigma(t) * scale).float(), cond)

    return timed


class AtSize:
    """The autoencoder at the model's size: pictures of another size are resized (antialiased) before encoding."""

    def __init__(self, inner: Autoencoder, size: int) -> None:
        self.inner, self.size = inner, size

    def encode(self, x: Tensor, gen: torch.Generator | None = None) -> Tensor:
        """Pixels [B,3,H,W] of any size -> latents of the model's shape, with gradient."""
        if x.shape[-2:] != (self.size, self.size):
            x = nn.functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
        return self.inner.encode(x, gen)

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pixels [B,3,size,size] in about [-1,1], with gradient."""
        return self.inner.decode(z)

    def read(self, z: Tensor, space: str) -> Tensor:
        """Pixels, whatever they are called."""
        return self.decode(z)


def codec_of(pipe: Pipe) -> Autoencoder:
    """latent = (vae(x) - shift) * scaling; per-channel statistics (some SDXL variants) are folded into both."""
    config = pipe.vae.config
    scaling, shift = config.scaling_factor, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        scaling, shift = [scaling / s for s in std], list(mean)
    codec = Autoencoder(pipe.vae, scaling, shift)
    return codec.to(pipe.device)


@torch.no_grad()
def encode(pipe: Pipe, family: Family, options: Options, prompts: list[str]) -> Encoded:
    """Text by the pipeline's own encoders, one row a prompt."""
    if family.net == "unet":  # CLIP alone; where T5 reads along, nothing is lost
        tell_cut(pipe, prompts)
    with quiet():
        return {key: value.detach() for key, value in family.encode(pipe, list(prompts), options).items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' own warnings, which would come at every training step."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def tell_cut(pipe: Pipe, prompts: list[str]) -> None:
    """Say once for a pipeline that it reads only the beginning of a long prompt."""
    limit = pipe.tokenizer.model_max_length
    if getattr(pipe, "told_cut", False):
        return
    for prompt, ids in zip(prompts, pipe.tokenizer(list(prompts), verbose=False).input_ids, strict=True):
        if len(ids) > limit:
            pipe.told_cut = True
            print(
                f'warning: only {limit} tokens of a prompt are read; the end of "{clean(prompt, 60)}" is ignored',
                file=sys.stderr,
            )
            return
