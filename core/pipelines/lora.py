"""LoRA on a pipeline's frozen net: attach, save as diffusers or peft read it, merge into a copy of the net."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Denoiser, Model, Network
from limbeck.core.distillation.lora import LoRA, Patched, written
from limbeck.core.pipelines.loading import PipelineModel, TokenFeatures
from limbeck.core.run.errors import BadInput


def attach(
    model: PipelineModel, rank: int, alpha: float | None = None, seed: int | None = None, targets: Sequence[str] = ()
) -> Patched:
    """The teacher's net with LoRA (Hu et al. 2021, eq. 3), as a denoiser of its own.

    On these targets, or on those of its family where none is named.
    Its parameters are the LoRA's alone; several (student, critic) may live on one base, and the teacher is that base
    with all of them off, bit for bit. A seed draws A without touching the global generator.
    """
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return Patched(model.denoiser, LoRA(model.net, rank, alpha, targets or model.family.targets))


def peft_tensors(lora: LoRA) -> dict[str, Tensor]:
    """`<layer>.lora_A.weight` and `<layer>.lora_B.weight`, alpha/rank folded into B: every loader's scale is then 1."""
    out: dict[str, Tensor] = {}
    for key, down in lora.down.items():
        name, up = key.replace("/", "."), lora.up[key]
        out[f"{name}.lora_A.weight"] = _weight(down).detach().cpu().contiguous()
        out[f"{name}.lora_B.weight"] = (lora.scale * _weight(up).detach()).cpu().contiguous()
    return out


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def save_lora(model: PipelineModel, lora: LoRA, folder: Path) -> list[Path]:
    """Write what `pipe.load_lora_weights(folder)` reads; a peft folder where it cannot (PixArt, ModelScope)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = peft_tensors(lora)
    if not (hasattr(model.pipe, "save_lora_weights") and hasattr(model.net, "load_lora_adapter")):
        return save_peft(tensors, folder)
    layers: dict[str, Any] = {f"{model.family.net}_lora_layers": tensors}
    model.pipe.save_lora_weights(folder, safe_serialization=True, **layers)
    return [folder / "pytorch_lora_weights.safetensors"]


def save_peft(tensors: dict[str, Tensor], folder: Path) -> list[Path]:
    """peft's own layout: `pipe.transformer = PeftModel.from_pretrained(pipe.transformer, folder)`."""
    names = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    rank = next(value.shape[0] for key, value in tensors.items() if ".lora_A." in key)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({f"base_model.model.{key}": t for key, t in tensors.items()}, folder / "adapter_model.safetensors")
    return [folder / "adapter_model.safetensors", folder / "adapter_config.json"]


def merged(model: PipelineModel, lora: LoRA) -> nn.Module:
    """A copy of the net with W + (alpha/rank) B A written into its weights."""
    return written(lora, copy.deepcopy(model.net))


def export_lora(model: Model, denoiser: Denoiser, path: Path) -> list[Path]:
    """`limbeck export RUN --format lora`: BadInput for a student that has none."""
    if not isinstance(denoiser, Patched) or not isinstance(model, PipelineModel):
        raise BadInput(
            "this student is a full copy, it has no LoRA; use --format diffusers, or train with student.lora=64"
        )
    return save_lora(model, denoiser.lora, path)


def export_folder(model: PipelineModel, denoiser: Denoiser, path: Path) -> list[Path]:
    """`limbeck export RUN --format diffusers`: the teacher's own folder layout with the weights that were trained."""
    net, kept = merged(model, denoiser.lora) if isinstance(denoiser, Patched) else plain(denoiser), model.net
    try:
        setattr(model.pipe, model.family.net, net)
        model.pipe.save_pretrained(path, safe_serialization=True)
    finally:
        setattr(model.pipe, model.family.net, kept)
    return sorted(file for file in path.rglob("*") if file.is_file())


def plain(denoiser: Denoiser) -> nn.Module:
    """The net behind a denoiser."""
    inner = denoiser.inner if isinstance(denoiser, TokenFeatures) else denoiser
    assert isinstance(inner, Network)
    return inner.net
