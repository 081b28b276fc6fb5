"""Adapters of diffusion transformers whose blocks attend to text that stays as it is: PixArt-Sigma and SANA."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DDPMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor

from pocketune.errors import ModelError
from pocketune.models.base import Context, Prompt, Streams, TextAttention
from pocketune.models.family import Config, Family, Sizes, fixed_length
from pocketune.models.positions import embed_patches
from pocketune.models.transformer import TransformerAdapter, sizes, unpatchify


class PixArtAdapter(TransformerAdapter):
    """`PixArtTransformer2DModel` as its blocks, with one stream; the head gives noise and, behind it, a learned variance."""

    stream_names: tuple[str, ...] = ("image",)
    unit_kinds: tuple[Any, ...] = (BasicTransformerBlock,)
    # Those targets of PixArt-alpha's train_pixart_lora_hf.py that lie in blocks.
    default_scale_targets = ("attn1", "attn2", "ff")
    default_lora_targets: tuple[str, ...] = (
        "attn1.to_k",
        "attn1.to_q",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_k",
        "attn2.to_q",
        "attn2.to_v",
        "attn2.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    )

    def __init__(self, model: Any) -> None:
        """Wrap a model; it is neither copied nor changed.

        Raises:
            ModelError: it takes inputs besides image, timestep and text.
        """
        if getattr(model, "use_additional_conditions", False):
            msg = (
                "this PixArt takes the image's size and shape as inputs (PixArt-alpha at 1024 pixels), for which there is no "
                "adapter. Use PixArt-Sigma."
            )
            raise ModelError(msg)
        super().__init__(model)

    def context(self, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Context:
        """Embed the timestep and project the text."""
        batch, _, height, width = latents.shape
        modulation, embedding = self.model.adaln_single(timesteps, None, batch_size=batch, hidden_dtype=latents.dtype)
        text = self.model.caption_projection(prompt.hidden)
        return Context(embedding, height, width, modulation=modulation, text=text, text_bias=_bias(prompt.mask, latents.dtype))

    def embed(self, latents: Tensor, prompt: Prompt) -> Streams:
        """Patchify latents; text is no stream here."""
        return (embed_patches(self.model.pos_embed, latents, prompt.place),)

    def block(self, index: int, streams: Streams, context: Context) -> Streams:
        """Run one block."""
        image: Tensor = self._blocks[index](
            streams[0],
            attention_mask=None,
            encoder_hidden_states=context.text,
            encoder_attention_mask=context.text_bias,
            timestep=context.modulation,
            cross_attention_kwargs=None,
            class_labels=None,
        )
        return (image,)

    def text_attention(self, index: int) -> tuple[TextAttention, ...]:
        """The block's cross-attention."""
        block: Any = self._blocks[index]
        return (TextAttention(block.attn2),)

    def head(self, streams: Streams, context: Context) -> Tensor:
        """Final norm, modulation, projection and unpatchify."""
        shift, scale = (self.model.scale_shift_table[None] + context.embedding[:, None]).chunk(2, dim=1)
        hidden = self.model.norm_out(streams[0]) * (1 + scale) + shift
        return unpatchify(self.model.proj_out(hidden), context, self.patch_size)


class SanaAdapter(PixArtAdapter):
    """`SanaTransformer2DModel` as its blocks of linear attention, with one stream."""

    unit_kinds = (SanaTransformerBlock,)
    # The targets of diffusers' train_dreambooth_lora_sana.py.
    default_lora_targets = ("attn1.to_k", "attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_q", "attn2.to_v")

    def __init__(self, model: Any) -> None:
        """Wrap a model; it is neither copied nor changed.

        Raises:
            ModelError: it was distilled to few steps.
        """
        if model.config.guidance_embeds:
            msg = (
                "this SANA takes the guidance scale as an input (SANA-Sprint, distilled to few steps), for which there is no "
                "adapter. Use SANA or SANA-1.5."
            )
            raise ModelError(msg)
        super().__init__(model)

    def context(self, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Context:
        """Embed the timestep, and project and norm the text."""
        batch, _, height, width = latents.shape
        modulation, embedding = self.model.time_embed(timesteps, batch_size=batch, hidden_dtype=latents.dtype)
        text = self.model.caption_norm(self.model.caption_projection(prompt.hidden))
        return Context(embedding, height, width, modulation=modulation, text=text, text_bias=_bias(prompt.mask, latents.dtype))

    def embed(self, latents: Tensor, prompt: Prompt) -> Streams:  # noqa: ARG002 - text is no stream here
        """Patchify latents."""
        return (self.model.patch_embed(latents),)

    def block(self, index: int, streams: Streams, context: Context) -> Streams:
        """Run one block."""
        image: Tensor = self._blocks[index](
            streams[0],
            None,
            context.text,
            context.text_bias,
            context.modulation,
            context.height // self.patch_size,
            context.width // self.patch_size,
        )
        return (image,)

    def head(self, streams: Streams, context: Context) -> Tensor:
        """Final modulated norm, projection and unpatchify."""
        hidden = self.model.norm_out(streams[0], context.embedding, self.model.scale_shift_table)
        return unpatchify(self.model.proj_out(hidden), context, self.patch_size)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Added to attention scores as diffusers' models do: 0 for tokens that count, -10000 for padding."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def _sizes(config: Config) -> Sizes:
    return sizes(config, text_width=int(config["caption_channels"]))


def _encode(pipeline: Any, prompt: str, *, device: torch.device, length: int) -> Prompt:
    hidden, mask, _, _ = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, device=device, max_sequence_length=length
    )
    return Prompt(hidden=hidden, mask=mask)


PIXART = Family(
    title="PixArt-Sigma",
    denoiser=PixArtTransformer2DModel,
    adapter=PixArtAdapter,
    pipeline=PixArtSigmaPipeline,
    text_encoders=("text_encoder",),
    sizes=_sizes,
    encode=_encode,
    text_length=fixed_length(300),
    sampling=lambda length: {"max_sequence_length": length, "clean_caption": False, "use_resolution_binning": False},
    recipe_defaults={"weighting_scheme": "none", "precondition_outputs": False, "guidance_scale": 4.5},
    positions_for="image",
    noise=DDPMScheduler,
)

SANA = Family(
    title="SANA",
    denoiser=SanaTransformer2DModel,
    adapter=SanaAdapter,
    pipeline=SanaPipeline,
    text_encoders=("text_encoder",),
    sizes=_sizes,
    encode=_encode,
    text_length=fixed_length(300),
    # As in the script, prompts stand alone in training and sampling, without the pipeline's instruction to the text encoder.
    sampling=lambda length: {
        "max_sequence_length": length,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
    },
    recipe_defaults={"weighting_scheme": "none", "precondition_outputs": False, "guidance_scale": 4.5},
    vae=AutoencoderDC,
    vae_scale=32,
    overflows_in_float16=True,
)
