"""Tiny pipelines with random weights, one per architecture, in ordinary diffusers folders: 64-pixel images, a few blocks."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, Gemma2Config, Gemma2Model, GemmaTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from pocketune.pocket.text import new_text_encoder, new_tokenizer

TEXT_WIDTH = 32  # of the T5 and Gemma encoders
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def build(name: str, folder: Path) -> Path:
    """Save the tiny pipeline of an architecture; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = BUILDERS[name]()
    pipeline.save_pretrained(folder)
    return folder


def with_values(model: Path, folder: Path, file: str, values: dict[str, Any]) -> Path:
    """A pipeline again, of links, but for some values in one of its JSON files."""
    shutil.copytree(model, folder, copy_function=os.link)
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(content | values), encoding="utf-8")
    return folder


def small_unet(name: str, folder: Path) -> Path:
    """The tiny pipeline of a U-Net with one layer a stage, that is seven blocks, the middle being block 2."""
    pipeline = DiffusionPipeline.from_pretrained(build(name, folder / name))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | {"layers_per_block": 1})
    pipeline.register_modules(unet=unet)
    pipeline.save_pretrained(folder / "small")
    return folder / "small"


def autoencoder(**changes: Any) -> AutoencoderKL:
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
        "sample_size": 64,
        "scaling_factor": 0.9,
    }
    return AutoencoderKL(**(settings | changes))


def _t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    tokenizer = T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)
    config = T5Config(vocab_size=len(pieces), d_model=TEXT_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return T5EncoderModel(config), tokenizer


def _gemma() -> tuple[Gemma2Model, GemmaTokenizer]:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tokenizer = GemmaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    config = Gemma2Config(
        vocab_size=len(pieces),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Gemma2Model(config), tokenizer


def _flux() -> FluxPipeline:
    """Three double and three single blocks of width 32, with the guidance scale as an input."""
    clip = new_tokenizer()
    encoder, tokenizer = _t5()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=CLIPTextModel(new_text_encoder(clip).config),
        tokenizer=clip,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
    )


def _pixart() -> PixArtSigmaPipeline:
    """Five blocks of width 32 that predict noise and its variance."""
    encoder, tokenizer = _t5()
    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=5,
            cross_attention_dim=32,
            sample_size=8,
            caption_channels=TEXT_WIDTH,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        vae=autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def _sana() -> SanaPipeline:
    """Five blocks of width 32, with an autoencoder that has no distribution."""
    encoder, tokenizer = _gemma()
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=5,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=TEXT_WIDTH,
            sample_size=8,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, beta_schedule="linear"
        ),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock",) * 4,
            decoder_block_types=("ResBlock",) * 4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), ()),
            decoder_qkv_multiscales=((), (), (), ()),
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            scaling_factor=0.41,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def _sd15(prediction: str = "epsilon", **changes: Any) -> StableDiffusionPipeline:
    """Two stages of two layers, so eleven blocks, the middle being block 4."""
    clip = new_tokenizer()
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**(settings | changes)),
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1, prediction_type=prediction),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(new_text_encoder(clip).config),
        tokenizer=clip,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd2() -> StableDiffusionPipeline:
    """As above with what Stable Diffusion 2 changed: Linears around attention, heads that differ by stage, and v."""
    return _sd15("v_prediction", use_linear_projection=True, attention_head_dim=(2, 4), upcast_attention=True)


def _sdxl() -> StableDiffusionXLPipeline:
    """Two stages, the second with two transformer layers a block; conditioned on pooled text and sizes."""
    clip = new_tokenizer()
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=128,
            attention_head_dim=(2, 4),
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(new_text_encoder(clip).config),
        tokenizer=clip,
        text_encoder_2=new_text_encoder(clip),
        tokenizer_2=clip,
    )


def sd3_transformer(**changes: Any) -> SD3Transformer2DModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 6,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 128,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 128,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
    }
    return SD3Transformer2DModel(**(settings | changes))


def _sd3(dual_attention: tuple[int, ...] = ()) -> StableDiffusion3Pipeline:
    """Six joint blocks of width 32, latents 4 x 8 x 8 for 64-pixel images."""
    transformer = sd3_transformer(dual_attention_layers=dual_attention)
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    tokenizer = new_tokenizer()
    encoders = [new_text_encoder(tokenizer) for _ in range(2)]
    return StableDiffusion3Pipeline(
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


BUILDERS: dict[str, Callable[[], Any]] = {
    "flux": _flux,
    "pixart": _pixart,
    "sana": _sana,
    "sd15": _sd15,
    "sd2": _sd2,
    "sd3": _sd3,
    "sd35": lambda: _sd3(dual_attention=(0, 1)),
    "sdxl": _sdxl,
}
