"""Multi-view teachers: a Stable Diffusion U-Net that denoises n views together and is told their cameras.

Shi et al. 2023 (MVDream, arXiv 2308.16512): self-attention runs over the tokens of all n views, and the camera's
matrix, through a small net, joins the embedding of time. Both fit diffusers' own U-Net: attention by a processor, the
small net as its class embedding (`class_embed_type: projection`). Legend: B batch (whole groups of n views), L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from limbeck.core.diffusion.denoiser import Encoded, Model, Network
from limbeck.core.run.build import Build
from limbeck.core.run.errors import BadInput, clean
from limbeck.domains.threed import config as settings

Net = Any  # a U-Net of diffusers: its base classes have no useful types
MATRIX = 16  # numbers of a camera
CAMERA = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": MATRIX}


class Joint:
    """A processor of self-attention: the tokens of `views` neighbours of the batch are one sequence."""

    def __init__(self, views: int, inner: Any) -> None:
        self.views, self.inner = views, inner

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[B,L,C] -> [B,L,C], diffusers' own arguments."""
        rows, tokens, width = hidden_states.shape
        joined = hidden_states.reshape(rows // self.views, self.views * tokens, width)
        out: Tensor = self.inner(attn, joined, encoder_hidden_states, attention_mask, temb)
        return out.reshape(rows, tokens, width)


def join(unet: Net, views: int) -> None:
    """Lets every self-attention of a U-Net run over groups of views; cross-attention stays with its own view."""
    found = unet.attn_processors.items()
    made = {name: Joint(views, inner) if name.endswith("attn1.processor") else inner for name, inner in found}
    unet.set_attn_processor(made)


def matrices(camera: Tensor) -> Tensor:
    """Camera to world [B,16], row by row, from condition rows [B,15]; it stands at distance 1, as MVDream's do.

    MVDream's world is ours (z up, columns right, up, backward); our front, +x, is its azimuth 90, from which its own
    script shows an object.
    """
    pose = camera[:, :12].view(-1, 3, 4)
    placed = torch.cat([pose[:, :, :3], F.normalize(pose[:, :, 3:], dim=1)], 2)
    last = pose.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(pose), 1, 4)
    return torch.cat([placed, last], 1).flatten(1)


def call(net: Net, x: Tensor, time: Tensor, cond: Encoded) -> Tensor:
    """The U-Net on whole groups of views, with its text and its cameras."""
    states, camera = cond["states"].to(x.dtype), matrices(cond["camera"].float()).to(x)
    raw: Tensor = net(x, time, encoder_hidden_states=states, class_labels=camera, return_dict=False)[0]
    return raw


def build(config: settings.MultiView, build: Build) -> Model:
    """Factory of the teacher `threed.multiview`: a Stable Diffusion pipeline whose U-Net sees n views together.

    The U-Net is the pipeline's own, or comes from `weights`: a safetensors file with diffusers' names, or with those of
    MVDream's checkpoints (its Stable Diffusion 2.1 model, `unet/` of the port ashawkey/mvdream-sd2.1-diffusers;
    ImageDream's picture input is not supported). MVDream has kept text encoder, autoencoder and noise of Stable
    Diffusion 2.1 base, so that pipeline is its `of`.
    """
    model: Model = build.part("teacher", config.of)
    inner = model.denoiser
    if not isinstance(inner, Network) or not hasattr(inner.net, "attn_processors"):
        raise BadInput(f"threed.multiview needs a Stable Diffusion pipeline; {clean(model.name, 80)} is another kind")
    unet: Net = inner.net
    if config.weights is not None:
        unet = with_cameras(unet, read(Path(config.weights).expanduser()))
    if unet.config.get("projection_class_embeddings_input_dim") != MATRIX:
        raise BadInput(
            f"{clean(model.name, 80)} has no embedding of cameras; name the multi-view U-Net in teacher.weights"
        )
    join(unet, config.views)
    denoiser = Network(unet, inner.process, inner.kind, call, inner.time_scale, inner.taps)
    return replace(model, denoiser=denoiser, together=config.views)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise BadInput(f"teacher.weights: cannot read {clean(path)}; give the U-Net's safetensors file") from None


def with_cameras(unet: Net, weights: dict[str, Tensor]) -> Net:
    """A frozen U-Net of the same shape with an embedding of cameras and these weights."""
    like = next(unet.parameters())
    made: Net = type(unet).from_config(unet.config, **CAMERA)
    if any(key.startswith("input_blocks.") for key in weights):
        weights = renamed(weights, dict(names(made.config)))
    try:
        made.load_state_dict(weights)
    except RuntimeError as error:
        text = clean(" ".join(str(error).split(":", 1)[-1].split()), 160)
        raise BadInput(f"teacher.weights: they do not fit the pipeline's U-Net: {text}") from None
    return nn.Module.to(made.requires_grad_(False).eval(), like.device, like.dtype)  # diffusers' own `to` warns


def renamed(weights: dict[str, Tensor], heads: dict[str, str]) -> dict[str, Tensor]:
    """Weights whose names begin as `heads` says instead."""
    out = {}
    for key, value in weights.items():
        head = next((head for head in heads if key.startswith(head)), "")
        out[heads.get(head, "") + key.removeprefix(head)] = value
    return out


RESNET = {
    "in_layers.0.": "norm1.", "in_layers.2.": "conv1.", "emb_layers.1.": "time_emb_proj.", "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.", "skip_connection.": "conv_shortcut.",
}  # fmt: skip
ENDS = {
    "time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2.",
    "camera_embed.0.": "class_embedding.linear_1.", "camera_embed.2.": "class_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.", "out.0.": "conv_norm_out.", "out.2.": "conv_out.",
}  # fmt: skip


def names(config: Any) -> Iterator[tuple[str, str]]:
    """How names of MVDream's checkpoints (and Stable Diffusion's first ones) begin, and how diffusers' do."""
    yield from ENDS.items()
    yield from resnet("middle_block.0.", "mid_block.resnets.0.")
    yield "middle_block.1.", "mid_block.attentions.0."
    yield from resnet("middle_block.2.", "mid_block.resnets.1.")
    levels, layers = len(config.block_out_channels), config.layers_per_block
    yield from blocks("input_blocks", 1, "down", config.down_block_types, [layers] * levels, "downsamplers.0.conv.")
    yield from blocks("output_blocks", 0, "up", config.up_block_types, [layers + 1] * levels, "upsamplers.0.")


def blocks(
    theirs: str, place: int, way: str, kinds: list[str], counts: list[int], sampler: str
) -> Iterator[tuple[str, str]]:
    """One side of the U: a block of theirs is a resnet, perhaps its attention; samplers stand alone or at the end."""
    for level, (kind, count) in enumerate(zip(kinds, counts, strict=True)):
        attends, ours = "CrossAttn" in kind, f"{way}_blocks.{level}."
        for layer in range(count):
            yield from resnet(f"{theirs}.{place}.0.", f"{ours}resnets.{layer}.")
            if attends:
                yield f"{theirs}.{place}.1.", f"{ours}attentions.{layer}."
            place += 1
        if level < len(kinds) - 1:
            if way == "down":
                yield f"{theirs}.{place}.0.op.", ours + sampler
                place += 1
            else:
                yield f"{theirs}.{place - 1}.{1 + attends}.", ours + sampler


def resnet(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """The layers of a residual block."""
    yield from ((theirs + a, ours + b) for a, b in RESNET.items())
