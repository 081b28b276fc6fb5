"""`pocket-sd15`: a Stable-Diffusion-1.5-style U-Net, trained as a diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from pocketune.pocket.autoencoder import LATENT_CHANNELS
from pocketune.pocket.denoiser import PocketDenoiser
from pocketune.pocket.text import token_ids

TEXT_WIDTH = 64
HEAD_WIDTH = 32
WIDTHS = (32, 96, 224)
"""Channels at 16x16, 8x8 and 4x4 latent pixels. The coarse stages decide what a picture shows, and cost the least."""
NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
"""Betas of Stable Diffusion 1.5. Its successor's v-prediction learns in fewer steps, above all at much noise."""


def new_denoiser() -> UNet2DConditionModel:
    """An untrained U-Net of 16 layers for latents (batch, 8, h, w); every residual branch and the output start at zero."""
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=WIDTHS,
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        # diffusers means the number of heads.
        attention_head_dim=tuple(width // HEAD_WIDTH for width in WIDTHS),
        norm_num_groups=16,
    )
    zeros = [model.conv_out]
    zeros += [module.conv2 for name, module in model.named_modules() if name.split(".")[-2:-1] == ["resnets"]]
    zeros += [module.proj_out for name, module in model.named_modules() if name.split(".")[-2:-1] == ["attentions"]]
    for layer in zeros:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class CaptionEncoder:
    """Captions to hidden states, as diffusers' Stable Diffusion pipeline makes them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load the encoder and the tokenizer from a pipeline folder."""
        self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self._encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval().to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        """Normed hidden states of the last layer, (batch, 20, 64)."""
        hidden: Tensor = self._encoder(token_ids(self._tokenizer, captions).to(self._device)).last_hidden_state
        return hidden


class Diffusion:
    """v-prediction over evenly spread timesteps.

    Paper: Salimans and Ho 2022, v = alpha eps - sigma x_0; its error is that of x_0 times (SNR + 1), so that steps with much
    noise, where it is decided what a picture shows, count as much as others.
    """

    def __init__(self, model: UNet2DConditionModel, folder: Path, device: torch.device) -> None:  # noqa: ARG002
        """Load the text encoder from the folder."""
        self._encode = CaptionEncoder(folder, device)
        self._noise = DDPMScheduler(**NOISE)

    def draw(
        self,
        latents: Tensor,
        captions: list[str],
        rng: np.random.Generator,  # noqa: ARG002
        generator: torch.Generator,
    ) -> tuple[Tensor, ...]:
        """Noisy latents, timesteps, hidden states and v. Each sample's timestep lies in its own part of the range."""
        noise = torch.randn(latents.shape, generator=generator)
        count, steps = len(latents), self._noise.config.num_train_timesteps
        timesteps = (
            ((torch.arange(count) + torch.rand(count, generator=generator)) / count * steps).long().clamp_(max=steps - 1)
        )
        noisy = self._noise.add_noise(latents, noise, timesteps)
        return noisy, timesteps, self._encode(captions), self._noise.get_velocity(latents, noise, timesteps)

    def loss(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Mean squared error of v."""
        noisy, timesteps, hidden, target = inputs
        return F.mse_loss(model(noisy, timesteps, hidden, return_dict=False)[0], target)


def shift_into_convolutions(vae: AutoencoderKL) -> AutoencoderKL:
    """The same VAE with its `shift_factor`, which Stable Diffusion 1.5 does not know, in the biases of 1x1 convolutions."""
    config = {**vae.config, "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None}
    with torch.random.fork_rng(devices=[]):  # the convolutions' random start is replaced at once
        shifted: AutoencoderKL = AutoencoderKL.from_config(config)
    shifted.load_state_dict(vae.state_dict(), strict=False)
    channels, shift = vae.config.latent_channels, vae.config.shift_factor
    with torch.no_grad():
        for layer in (shifted.quant_conv, shifted.post_quant_conv):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
        shifted.quant_conv.bias[:channels] = -shift
        shifted.post_quant_conv.bias[:] = shift
    return shifted.eval()


def new_pipeline(work: Path) -> Any:
    """The trained parts as a `StableDiffusionPipeline` without safety checker."""
    return StableDiffusionPipeline(
        vae=shift_into_convolutions(AutoencoderKL.from_pretrained(work / "vae")),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def small_share(progress: float) -> float:
    """Mostly small images at first, which cost a quarter and teach what words mean; mostly large ones at the end."""
    return 0.7 - 0.6 * progress


SD15 = PocketDenoiser(
    component="unet",
    new=new_denoiser,
    objective=Diffusion,
    pipeline=new_pipeline,
    learning_rate=1e-3,
    batches={128: 32, 64: 96},
    small_share=small_share,
    summary=(
        "A small Stable-Diffusion-1.5-style pipeline, trained from nothing on scenes that Pocketune renders: a U-Net of three",
        "resolutions with cross-attention, a VAE with 8x down-sampling and 8 latent channels, a CLIP-style text encoder.",
        "It predicts v, as Stable Diffusion 2 does; the noise schedule is that of Stable Diffusion 1.5.",
    ),
    example=(
        "from diffusers import StableDiffusionPipeline",
        "",
        "pipeline = StableDiffusionPipeline.from_pretrained(folder)",
        'image = pipeline("a photo of a red car on grass", guidance_scale=4.0).images[0]',
    ),
)
