"""Fixtures: a tiny SD3 pipeline with random weights, in an ordinary diffusers folder."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image

from pocketune.models.load import ModelFolder
from pocketune.pocket.draw import render
from pocketune.pocket.scenes import random_scene, toy_identity
from pocketune.pocket.text import new_text_encoder, new_tokenizer
from tests.tiny_models import build

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six joint blocks of width 32 (the first two with dual attention), latents 4 x 8 x 8 for 64-pixel images."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=128,
            caption_projection_dim=32,
            pooled_projection_dim=128,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(0, 1),
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            sample_size=64,
            scaling_factor=0.9,
            shift_factor=0.1,
        )
        tokenizer = new_tokenizer()
        encoders = [new_text_encoder(tokenizer) for _ in range(2)]
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> ModelFolder:
    return ModelFolder("tiny-sd3", tiny_folder)


@pytest.fixture(scope="session")
def toy_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three renders of one toy as JPEG files of different sizes."""
    import numpy as np

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(3)
    for number, size in enumerate(((96, 96), (128, 96), (80, 120))):
        scene = random_scene(rng, toy=toy_identity(5))
        render(scene, size=128).resize(size, Image.Resampling.BILINEAR).save(folder / f"{number}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFolder]:
    """The tiny pipeline of an architecture by name, made once."""
    folder = tmp_path_factory.mktemp("pipelines")

    @cache
    def get(name: str) -> ModelFolder:
        return ModelFolder(f"tiny-{name}", build(name, folder / name))

    return get
