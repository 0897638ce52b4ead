"""Builders of tiny random video pipelines, saved to disk in the layout of the real families (offline)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_pictures as images
import torch

FAMILIES = ("animatediff", "modelscope", "wan", "ltx", "cogvideox", "hunyuanvideo")
FRAMES = {"animatediff": 3, "modelscope": 3, "cogvideox": 9}  # the others: 5
SIZES = {"animatediff": (8, 16), "modelscope": (8, 16), "wan": (16, 32), "ltx": (32, 32)}  # the others: (16, 32)


def animatediff(motion: bool = True) -> Any:
    """A U-Net of pictures and a motion adapter, as AnimateDiff puts them together."""
    from diffusers import AnimateDiffPipeline, DDIMScheduler

    tokens = images.clip_tokenizer()
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
    return AnimateDiffPipeline(
        vae=images.vae(4, 0.18215), text_encoder=images.clip_text(tokens), tokenizer=tokens, unet=images.unet(16),
        motion_adapter=adapter(), scheduler=scheduler)  # fmt: skip


def adapter() -> Any:
    from diffusers import MotionAdapter

    return MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2,
        motion_max_seq_length=8, use_motion_mid_block=True)  # fmt: skip


def modelscope() -> Any:
    from diffusers import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel

    tokens = images.clip_tokenizer()
    net = UNet3DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"))  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1)  # fmt: skip
    return TextToVideoSDPipeline(
        vae=images.vae(4, 0.18215), text_encoder=images.clip_text(tokens), tokenizer=tokens, unet=net,
        scheduler=scheduler)  # fmt: skip


def wan() -> Any:
    """With the scheduler of the released folders."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokens = images.t5_tokenizer()
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokens), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 1.0, 0.7], scale_factor_spatial=4)  # fmt: skip
    net = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32)  # fmt: skip
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    return WanPipeline(tokenizer=tokens, text_encoder=text, vae=vae, scheduler=scheduler, transformer=net)


def ltx(timed: bool = False) -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    tokens = images.t5_tokenizer()
    scaling = (True, True, False, False)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=scaling,
        decoder_spatio_temporal_scaling=scaling, patch_size=1, timestep_conditioning=timed)  # fmt: skip
    vae.latents_mean = torch.tensor([0.1, -0.2, 0.3, 0.0])
    vae.latents_std = torch.tensor([1.5, 2.0, 1.0, 0.7])
    net = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16)  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=8, max_image_seq_len=256,
        shift_terminal=0.1)  # fmt: skip
    text = images.t5_text(tokens)
    return LTXPipeline(scheduler=scheduler, vae=vae, text_encoder=text, tokenizer=tokens, transformer=net)


def cogvideox(rotary: bool = False, depth: int | None = None) -> Any:
    """1.0's smaller model; `rotary` is the larger one, `depth` 2 is 1.5."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    tokens = images.t5_tokenizer()
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=16,
        sample_width=32)  # fmt: skip
    net = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_height=4, sample_width=6, sample_frames=9, max_text_seq_length=24,
        use_rotary_positional_embeddings=rotary or depth is not None, patch_size_t=depth,
        patch_bias=depth is None)  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0,
        clip_sample=False)  # fmt: skip
    text = images.t5_text(tokens)
    return CogVideoXPipeline(tokenizer=tokens, text_encoder=text, vae=vae, transformer=net, scheduler=scheduler)


def words() -> Any:
    """A tokenizer with a token a word of HunyuanVideo's instructions, and one a letter of everything else."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = Regex(r"<\|\w+\|>|\w+|[^\w ]")  # 95 tokens before the prompt, as the pipeline expects
    before = str(DEFAULT_PROMPT_TEMPLATE["template"])
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split(split, "removed", invert=True)
    found = [word for word, _ in raw.pre_tokenizer.pre_tokenize_str(before + " a cat on the moon red blue")]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(["[UNK]", "[PAD]", *found]))}
    raw.model = models.WordLevel(vocab, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]")


def hunyuanvideo() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import LlamaConfig, LlamaModel

    tokens, clip = words(), images.clip_tokenizer()
    text = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            pad_token_id=1, bos_token_id=0, eos_token_id=0))  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=4, scaling_factor=0.476986)  # fmt: skip
    net = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(2, 2, 4))  # fmt: skip
    return HunyuanVideoPipeline(
        text_encoder=text, tokenizer=tokens, transformer=net, vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=images.clip_text(clip, length=77),
        tokenizer_2=clip)  # fmt: skip


BUILDERS: dict[str, Callable[[], Any]] = {
    "animatediff": animatediff,
    "modelscope": modelscope,
    "wan": wan,
    "ltx": ltx,
    "ltx-timed": lambda: ltx(True),
    "cogvideox": cogvideox,
    "cogvideox-5b": lambda: cogvideox(True),
    "cogvideox-1.5": lambda: cogvideox(depth=2),
    "hunyuanvideo": hunyuanvideo,
}


def build(family: str, folder: Path) -> Path:
    """Save the tiny pipeline of `family` under `folder` (built once) and return its path."""
    return images.build(family, folder, builders=BUILDERS)
