"""`pocket-sd3`: a Stable-Diffusion-3-style MMDiT, trained by rectified flow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pocketune.pocket.autoencoder import LATENT_CHANNELS
from pocketune.pocket.denoiser import PocketDenoiser
from pocketune.pocket.text import token_ids

WIDTH = 128
STOCK_PADDING = 256
"""How many zero tokens diffusers' SD3 pipeline appends when there is no T5 encoder."""


def new_denoiser() -> SD3Transformer2DModel:
    """An untrained MMDiT of 12 joint blocks for latents (batch, 8, h, w); modulation and output start at zero."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=12,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=128,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
    zeros = [model.proj_out, model.norm_out.linear]
    zeros += [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in zeros:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


class PaddedJointAttention:
    """Joint attention whose last text token stands for n equal ones: its logits get log(n) added.

    diffusers' pipeline appends 256 zero tokens to the text when there is no T5 encoder. Equal tokens without positions stay
    equal through every block, so one token with a bias teaches the model to live with any number of them at no cost.
    `log_count`: (batch, 1, 1, 1), minus infinity for none.
    """

    def __init__(self) -> None:
        """Start with no padding; `log_count` is set before each forward."""
        self.log_count: Tensor | None = None

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        """As diffusers' `JointAttnProcessor2_0`, image tokens first, plus the bias."""
        batch, length = hidden_states.shape[:2]

        def heads(tensor: Tensor) -> Tensor:
            split: Tensor = tensor.unflatten(-1, (attn.heads, -1))
            return split.transpose(1, 2)

        query = torch.cat(
            [attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))],
            dim=2,
        )
        key = torch.cat(
            [attn.norm_k(heads(attn.to_k(hidden_states))), attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))],
            dim=2,
        )
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        bias = torch.zeros(batch, 1, 1, key.shape[2], device=key.device, dtype=key.dtype)
        if self.log_count is not None:
            bias[..., -1:] = self.log_count
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        image, text = mixed[:, :length], mixed[:, length:]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)


class CaptionEncoder:
    """Captions to what the denoiser wants, as diffusers' SD3 pipeline makes it, with one zero token for padding."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load both encoders and the tokenizer from a pipeline folder."""
        self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        names = ("text_encoder", "text_encoder_2")
        self._encoders = [CLIPTextModelWithProjection.from_pretrained(folder / name).eval().to(device) for name in names]
        self._device = device

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states (batch, 21, 128) and pooled embeddings (batch, 128)."""
        ids = token_ids(self._tokenizer, captions).to(self._device)
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self._encoders]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return F.pad(hidden, (0, 0, 0, 1)), torch.cat([output.text_embeds for output in outputs], dim=-1)


def flow_loss(model: nn.Module, latents: Tensor, hidden: Tensor, pooled: Tensor, sigmas: Tensor, noise: Tensor) -> Tensor:
    """Mean squared velocity error of rectified flow.

    Paper: Esser et al. 2024 (SD3), equations 4 and 5: x_t = (1 - sigma) x_0 + sigma eps, target eps - x_0.

    Args:
        model: the denoiser; timestep is 1000 sigma.
        latents: (batch, 8, h, w), clean.
        hidden: text, (batch, tokens, 128).
        pooled: text, (batch, 128).
        sigmas: (batch,) in (0, 1).
        noise: like latents.
    """
    sigma = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    velocity = model(
        hidden_states=noisy, encoder_hidden_states=hidden, pooled_projections=pooled, timestep=1000 * sigmas, return_dict=False
    )[0]
    return F.mse_loss(velocity, noise - latents)


class RectifiedFlow:
    """The objective of Stable Diffusion 3, with timesteps drawn from a logit-normal distribution."""

    def __init__(self, model: SD3Transformer2DModel, folder: Path, device: torch.device) -> None:
        """Load the text encoders from the folder, and give the model an attention that knows about padding."""
        self._encode = CaptionEncoder(folder, device)
        self._attention = PaddedJointAttention()
        model.set_attn_processor(self._attention)

    def draw(
        self, latents: Tensor, captions: list[str], rng: np.random.Generator, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """The arguments of `flow_loss`; the number of padding tokens is one for the whole batch."""
        hidden, pooled = self._encode(captions)
        count = float(rng.integers(1, STOCK_PADDING + 1)) if rng.random() < 0.5 else float(STOCK_PADDING)
        self._attention.log_count = torch.tensor(math.log(count) if rng.random() < 0.4 else -math.inf, device=hidden.device)
        sigmas = torch.randn(len(latents), generator=generator).sigmoid()
        noise = torch.randn(latents.shape, generator=generator)
        return latents, hidden, pooled, sigmas, noise

    def loss(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """`flow_loss` of what was drawn."""
        return flow_loss(model, *inputs)


def new_pipeline(work: Path) -> Any:
    """The trained parts as a `StableDiffusion3Pipeline`."""
    encoders = [CLIPTextModelWithProjection.from_pretrained(work / f"text_encoder{suffix}") for suffix in ("", "_2")]
    tokenizers = [CLIPTokenizer.from_pretrained(work / f"tokenizer{suffix}") for suffix in ("", "_2")]
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(work / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


SD3 = PocketDenoiser(
    component="transformer",
    new=new_denoiser,
    objective=RectifiedFlow,
    pipeline=new_pipeline,
    learning_rate=1.5e-3,
    batches={128: 32, 64: 64},
    small_share=lambda _: 0.35,
    summary=(
        "A small Stable-Diffusion-3-style pipeline, trained from nothing on scenes that Pocketune renders:",
        "12 joint MMDiT blocks of width 128, a VAE with 8x down-sampling and 8 latent channels, two CLIP-style text encoders.",
    ),
    example=(
        "from diffusers import StableDiffusion3Pipeline",
        "",
        "pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)",
        'image = pipeline("a photo of a red car on grass", guidance_scale=4.0, max_sequence_length=0).images[0]',
    ),
)
