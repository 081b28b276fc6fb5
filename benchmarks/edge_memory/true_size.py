"""A model of SD3.5-medium's true size with random weights: values change no memory, and nothing has to be downloaded.

The denoiser has the published configuration. Text encoders and VAE are tiny, with the published widths, so that the denoiser is
fed what it expects: they are not part of a training step.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from benchmarks.memory.weights import shapes_of, write_random
from pocketune.atomic import write_text
from pocketune.models.published import published, published_config
from pocketune.pocket.text import new_tokenizer

NAME = "sd35-medium"
CLIP_WIDTHS = (768, 1280)
CLIP_TOKENS = 77
LATENT_CHANNELS = 16


def write_true_size(folder: Path) -> Path:
    """Write the model as an ordinary diffusers folder, 5 GB in bfloat16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _surroundings().save_pretrained(folder)
    transformer = folder / "transformer"
    shutil.rmtree(transformer)
    transformer.mkdir()
    write_text(transformer / "config.json", json.dumps(published_config(NAME)))
    write_random(transformer / "diffusion_pytorch_model.safetensors", shapes_of(published(NAME).model))
    return folder


def _surroundings() -> StableDiffusion3Pipeline:
    """A pipeline whose denoiser is to be replaced."""
    tokenizer = new_tokenizer()
    tokenizer.model_max_length = CLIP_TOKENS
    encoders = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=1,
                num_attention_heads=width // 64,
                projection_dim=width,
                max_position_embeddings=CLIP_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        for width in CLIP_WIDTHS
    ]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(num_layers=1, attention_head_dim=8, num_attention_heads=1, caption_projection_dim=8),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
