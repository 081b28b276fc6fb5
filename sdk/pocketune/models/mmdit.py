"""Adapter of the MMDiT family: Stable Diffusion 3 and 3.5 (`SD3Transformer2DModel`), dual-attention blocks too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor

from pocketune.models.base import Context, Prompt, Streams, TextAttention
from pocketune.models.family import Config, Family, Parts, Sizes
from pocketune.models.positions import embed_patches
from pocketune.models.transformer import TransformerAdapter, sizes, unpatchify


class SD3Adapter(TransformerAdapter):
    """`SD3Transformer2DModel` as its joint blocks, with an image and a text stream; the last block ends the text stream."""

    stream_names = ("image", "text")
    unit_kinds: tuple[Any, ...] = (JointTransformerBlock,)
    # The targets of diffusers' train_dreambooth_lora_sd3.py.
    default_scale_targets = ("attn", "attn2", "ff", "ff_context")
    default_lora_targets = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )

    def context(self, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Context:
        """Embed timestep and pooled text."""
        embedding = self.model.time_text_embed(timesteps, prompt.pooled)
        return Context(embedding=embedding, height=latents.shape[-2], width=latents.shape[-1])

    def embed(self, latents: Tensor, prompt: Prompt) -> Streams:
        """Patchify latents and project text."""
        image = embed_patches(self.model.pos_embed, latents, prompt.place).contiguous()
        text: Tensor = self.model.context_embedder(prompt.hidden)
        return image, text

    def block(self, index: int, streams: Streams, context: Context) -> Streams:
        """Run one joint block."""
        image, text = streams
        text_out, image_out = self._blocks[index](hidden_states=image, encoder_hidden_states=text, temb=context.embedding)
        return (image_out,) if text_out is None else (image_out, text_out)

    def text_attention(self, index: int) -> tuple[TextAttention, ...]:
        """The joint attention; a dual-attention block's second one sees the image alone."""
        return (TextAttention(self._blocks[index], joined="image first"),)

    def head(self, streams: Streams, context: Context) -> Tensor:
        """Final norm, projection and unpatchify."""
        hidden = self.model.proj_out(self.model.norm_out(streams[0], context.embedding))
        return unpatchify(hidden, context, self.patch_size)


def _sizes(config: Config) -> Sizes:
    text_width, pooled_width = int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])
    own = sizes(config, text_width=text_width, pooled_width=pooled_width)
    return replace(own, largest=int(config["pos_embed_max_size"]) * own.patch)


def _encode(pipeline: Any, prompt: str, *, device: torch.device, length: int) -> Prompt:
    hidden, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompt,
        prompt_2=prompt,
        prompt_3=prompt,
        device=device,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
    )
    return Prompt(hidden=hidden, pooled=pooled)


def _text_length(parts: Parts) -> int:
    """A model whose text width is just that of its CLIP encoders was made without T5; diffusers would append zeros for it."""
    if parts.has("text_encoder_3"):
        return 256
    widths = [parts.config(part)["hidden_size"] for part in ("text_encoder", "text_encoder_2")]
    return 0 if sum(widths) == parts.denoiser_config["joint_attention_dim"] else 256


FAMILY = Family(
    title="Stable Diffusion 3",
    denoiser=SD3Transformer2DModel,
    adapter=SD3Adapter,
    pipeline=StableDiffusion3Pipeline,
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    sizes=_sizes,
    encode=_encode,
    text_length=_text_length,
    clip_text=True,
    positions_for="image",
    sampling=lambda length: {"max_sequence_length": length},
    optional=("text_encoder_3", "tokenizer_3"),
)
