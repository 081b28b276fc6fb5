"""Fixtures: a tiny SD3 model with one block of each kind, and its exported graphs."""

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from pocketune.models.load import ModelFolder


@pytest.fixture(scope="session")
def small_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The tiny pipeline with four blocks of width 64: one with dual attention, two plain ones, and the last."""
    folder = tmp_path_factory.mktemp("models") / "small-sd3"
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_folder, text_encoder_3=None, tokenizer_3=None)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline.register_modules(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=4,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=128,
                caption_projection_dim=64,
                pooled_projection_dim=128,
                pos_embed_max_size=8,
                qk_norm="rms_norm",
                dual_attention_layers=(0,),
            )
        )
    pipeline.save_pretrained(folder)
    return ModelFolder("small-sd3", folder)
