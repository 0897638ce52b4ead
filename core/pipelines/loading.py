"""From a folder or a hub id to a Model: no remote code, no pickled weights, no download that the user did not name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from limbeck.core.diffusion.codec import Autoencoder, Codec
from limbeck.core.diffusion.denoiser import Call, Denoiser, Encoded, Model, Network, Output
from limbeck.core.diffusion.process import VP, Process
from limbeck.core.pipelines import schedule
from limbeck.core.pipelines.family import Family, Options, Pipe
from limbeck.core.pipelines.text import reader
from limbeck.core.run.errors import BadInput, clean, did_you_mean

F = TypeVar("F", bound=Family)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of a run's precision
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

    def noise(self, count: int, gen: torch.Generator) -> Tensor:
        """Standard normal noise [count,*S], drawn in the pipeline's own layout."""
        if not self.family.swapped:
            return super().noise(count, gen)
        channels, frames, *rest = self.shape
        return torch.randn(count, frames, channels, *rest, generator=gen, device=gen.device).transpose(1, 2)

    def grid(self, steps: int) -> Tensor:
        """The grid of the family's own scheduler."""
        return schedule.grid(self.pipe.scheduler, steps, self.tokens, self.family.linear_sigmas).float()

    @property
    def tokens(self) -> int:
        """Image tokens of a sample: what a dynamic shift depends on."""
        return math.prod(self.shape[1:]) // self.family.patch**2


def open_pipeline(
    path_or_hub_id: str,
    known: Mapping[str, F],
    device: str | torch.device,
    dtype: torch.dtype,
    parts: Mapping[str, Any] | None = None,
) -> tuple[Pipe, F]:
    """The pipeline of a folder or a hub id, and its family among the `known`, by the class names of pipelines.

    With `parts` that the folder lacks it becomes a pipeline of the family's own class.
    """
    source, local = locate(path_or_hub_id)
    index = read_index(source, local)
    family = family_of(index, source, known)
    if parts:
        index["_class_name"] = family.pipelines[0]
    pipe = read_pipe(index, source, local, dtype, parts or {}).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, family


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


def family_of(index: dict[str, Any], source: str, known: Mapping[str, F]) -> F:
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
    if name not in known:
        names = ", ".join(known)
        raise BadInput(f"model: unknown pipeline {clean(name, 60)}{did_you_mean(name, known)}; limbeck knows {names}")
    family = known[name]
    for part in family.refused:
        if index.get(part, (None,))[0] is not None:
            raise BadInput(f"model: {clean(source)} has a {part}, and limbeck knows {name} without one only")
    return family


def refuse_pickles(folder: Path) -> None:
    """Every component with weights must have them as safetensors."""
    for part in sorted(child for child in folder.iterdir() if child.is_dir() and child.name not in UNUSED):
        files = [file.name for file in part.iterdir() if file.is_file()]
        pickled = [file for file in files if file.endswith(PICKLED) and file != "training_args.bin"]
        if pickled and not any(file.endswith(".safetensors") for file in files):
            raise BadInput(f"{part}: {pickled[0]} is a pickle, which is never opened; save the pipeline as safetensors")


def read_pipe(index: dict[str, Any], source: str, local: bool, dtype: torch.dtype, parts: Mapping[str, Any]) -> Pipe:
    """The pipeline itself, safetensors only, without the parts that we do not use."""
    import diffusers

    if local:
        refuse_pickles(Path(source))
    skipped = {part: None for part in UNUSED if part in index}
    pipe = read(getattr(diffusers, index["_class_name"]), source, local, dtype, {**skipped, **parts})
    if dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
        pipe.vae.to(torch.float32)
    return pipe


def read(cls: Any, source: str, local: bool, dtype: torch.dtype, parts: Mapping[str, Any]) -> Any:
    """A pipeline or a part of one, safetensors only; `parts` go in place of the folder's own (None: without)."""
    try:
        return cls.from_pretrained(source, dtype=dtype, use_safetensors=True, local_files_only=local, **parts)
    except (OSError, ValueError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"model: cannot load {clean(source)}: {clean(lines[0], 160)}") from None


def assemble(
    pipe: Pipe, family: Family, options: Options, shape: tuple[int, ...], codec: Codec, name: str
) -> PipelineModel:
    """Our adapters around the pipeline's own components, all frozen; samples [*S] are of this shape."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    process = schedule.process_of(pipe.scheduler, math.prod(shape[1:]) // family.patch**2)
    return PipelineModel(
        denoiser=network(getattr(pipe, family.net), process, pipe.scheduler, family), shape=shape, name=name,
        codec=codec, encode=reader(pipe, family, options), pipe=pipe, family=family,
        options=options,
    )  # fmt: skip


def network(net: nn.Module, process: Process, scheduler: Any, family: Family) -> Denoiser:
    """The net behind our time: index k for VP, scale * sigma(t) for rectified flow."""
    taps, call, kind = family.taps(net), in_net_dtype(family.call), schedule.kind_of(scheduler)
    if isinstance(process, VP):
        made = Network(net, process, kind, call, time_scale="index", taps=taps)
    else:
        timed = by_sigma(call, process, family.flow_scale, schedule.whole_times(scheduler))
        made = Network(net, process, kind, timed, taps=taps)
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
    """A call whose inputs have the dtype in which the net computes, whatever weights it keeps in float32.

    A float32 copy of a net is asked with half-precision text; some of a half-precision net's own stay float32 (Wan).
    """

    def cast(net: nn.Module, x: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        dtype = net.dtype
        assert isinstance(dtype, torch.dtype)
        rows = {key: c.to(dtype) if c.is_floating_point() else c for key, c in cond.items()}
        return call(net, x.to(dtype), t, rows)

    return cast


def by_sigma(call: Call, process: Process, scale: float, whole: bool) -> Call:
    """A call whose time is scale * sigma(t), or (`whole`) the whole number below.

    Flow families with a shift count time in sigma, not in t.
    """

    def timed(net: nn.Module, x: Tensor, t: Tensor, cond: Encoded) -> Tensor:
        time = process.sigma(t) * scale
        # t is the float32 of a grid's time: 1e-3 keeps what is whole from falling below
        return call(net, x, ((time + 1e-3).floor() if whole else time).float(), cond)

    return timed


def codec_of(pipe: Pipe, vae: nn.Module | None = None, chunk: int = 8) -> Autoencoder:
    """latent = (vae(x) - shift) * scaling; per-channel statistics (some SDXL variants) are folded into both.

    `vae` goes in place of the pipeline's own; `chunk` samples go through it at a time.
    """
    config = pipe.vae.config
    scaling, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    known = {**dict(pipe.vae.named_buffers()), **config}  # LTX has the statistics as buffers
    mean, std = known.get("latents_mean"), known.get("latents_std")
    if mean is not None and std is not None:
        scaling, shift = [scaling / float(s) for s in std], [float(m) for m in mean]
    codec = Autoencoder(pipe.vae if vae is None else vae, scaling, shift, chunk)
    return codec.to(pipe.device)
