"""Builders of tiny random pipelines, saved to disk in the layout of the real families (offline, a second each)."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("sd15", "sd15-v", "sdxl", "sd3", "flux", "pixart")
SIZE = 16  # pixels; the tiny autoencoder halves them once


def clip_tokenizer() -> Any:
    """Byte-level CLIP tokenizer with one token a character and no merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=24)


def t5_tokenizer() -> Any:
    """Unigram T5 tokenizer with one token a character."""
    from transformers import T5TokenizerFast

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    words += [(letter, -2.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=32)


def clip_text(tokenizer: Any, projection: int | None = None, length: int = 24) -> Any:
    """CLIP text encoder of width 16; with a projection head where `projection` is its width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projection or 16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_text(tokenizer: Any, width: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def vae(channels: int, scaling: float, shift: float | None = None) -> Any:
    """Autoencoder that halves the picture once; the family's own scaling and shift factors."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=scaling,
        shift_factor=shift,
    )


def unet(cross: int, extra: dict[str, Any] | None = None) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=2,
        norm_num_groups=4,
        **(extra or {}),
    )


def sd15(prediction: str = "epsilon") -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokens = clip_tokenizer()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    return StableDiffusionPipeline(
        vae=vae(4, 0.18215),
        text_encoder=clip_text(tokens),
        tokenizer=tokens,
        unet=unet(16),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    one, two = clip_tokenizer(), clip_tokenizer()
    net = unet(
        32,
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
            "use_linear_projection": True,
        },
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=vae(4, 0.13025),
        text_encoder=clip_text(one),
        text_encoder_2=clip_text(two, 24),
        tokenizer=one,
        tokenizer_2=two,
        unet=net,
        scheduler=scheduler,
        add_watermarker=False,
    )


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    one, two, three = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    net = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=36,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, 1.5305, 0.0609),
        text_encoder=clip_text(one, 16),
        tokenizer=one,
        text_encoder_2=clip_text(two, 20),
        tokenizer_2=two,
        text_encoder_3=t5_text(three, 48),
        tokenizer_3=three,
    )


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    one, two = clip_tokenizer(), t5_tokenizer()
    net = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae(4, 0.3611, 0.1159),
        text_encoder=clip_text(one),
        tokenizer=one,
        text_encoder_2=t5_text(two),
        tokenizer_2=two,
        transformer=net,
    )


def pixart() -> Any:
    """sample_size 128 switches on the resolution and aspect-ratio conditions; out_channels 8 is the learned sigma."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    tokens = t5_tokenizer()
    net = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=128,
        patch_size=2,
        caption_channels=16,
        norm_num_groups=4,
    )
    return PixArtAlphaPipeline(
        tokenizer=tokens,
        text_encoder=t5_text(tokens),
        vae=vae(4, 0.18215),
        transformer=net,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "sd15": sd15,
    "sd15-v": lambda: sd15("v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
}


def liven(pipe: Any, gen: torch.Generator) -> None:
    """Random weights far from the usual near-zero starts, so that prompt, time and guidance all move the pixels."""
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        net = getattr(pipe, name, None)
        for weight in net.parameters() if net is not None else ():
            if weight.ndim > 1:
                fan = weight[0].numel() ** 0.5
                weight.data = 1.3 * torch.randn(weight.shape, generator=gen) / fan


def stirred(patch: Any) -> Any:
    """A LoRA with B away from zero, so that the patch shows."""
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for up in patch.lora.up.values():
            up.weight.copy_(0.15 * torch.randn(up.weight.shape, generator=gen))
    return patch


def build(family: str, folder: Path, seed: int = 0, builders: Mapping[str, Callable[[], Any]] | None = None) -> Path:
    """Save the tiny pipeline of `family` under `folder` (built once) and return its path."""
    target = Path(folder) / family
    if not (target / "model_index.json").exists():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipe = (builders or BUILDERS)[family]()
        liven(pipe, torch.Generator().manual_seed(seed))
        pipe.save_pretrained(target, safe_serialization=True)
    return target
