"""Adapter of the MMDiT family: Stable Diffusion 3 and 3.5 (`SD3Transformer2DModel`), dual-attention blocks too."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from pocketune.errors import PlanError
from pocketune.models.base import Context, Prompt, Streams


class RemovedBlock(nn.Module):
    """Holds the place of a block whose weights were taken out."""

    def forward(self, *_: object, **__: object) -> None:
        """Refuse to run.

        Raises:
            PlanError: always.
        """
        msg = "a removed block was run: the plan and the loaded weights disagree. Load the plan's kept blocks."
        raise PlanError(msg)


class SD3Adapter:
    """`SD3Transformer2DModel` as its joint blocks, with an image and a text stream; the last block ends the text stream."""

    stream_names = ("image", "text")
    # The targets of diffusers' train_dreambooth_lora_sd3.py.
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

    def __init__(self, model: SD3Transformer2DModel) -> None:
        """Wrap a model; it is neither copied nor changed."""
        self.model: Any = model
        self._blocks: nn.ModuleList = model.transformer_blocks

    @property
    def block_count(self) -> int:
        """Number of joint blocks."""
        return len(self._blocks)

    @property
    def patch_size(self) -> int:
        """Latent pixels along a token's side."""
        return int(self.model.config.patch_size)

    def block_name(self, index: int) -> str:
        """The block's prefix in the state dict."""
        return f"transformer_blocks.{index}"

    def remove_block(self, index: int) -> None:
        """Replace a block by a placeholder without weights."""
        self._blocks[index] = RemovedBlock()

    def context(self, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Context:
        """Embed timestep and pooled text."""
        embedding = self.model.time_text_embed(timesteps, prompt.pooled)
        return Context(embedding=embedding, height=latents.shape[-2], width=latents.shape[-1])

    def embed(self, latents: Tensor, prompt: Prompt) -> Streams:
        """Patchify latents and project text."""
        image: Tensor = self.model.pos_embed(latents).contiguous()
        text: Tensor = self.model.context_embedder(prompt.hidden)
        return image, text

    def block(self, index: int, streams: Streams, context: Context) -> Streams:
        """Run one joint block."""
        image, text = streams
        text_out, image_out = self._blocks[index](hidden_states=image, encoder_hidden_states=text, temb=context.embedding)
        return (image_out,) if text_out is None else (image_out, text_out)

    def head(self, streams: Streams, context: Context) -> Tensor:
        """Final norm, projection and unpatchify."""
        hidden = self.model.proj_out(self.model.norm_out(streams[0], context.embedding))
        patch = self.patch_size
        rows, columns = context.height // patch, context.width // patch
        hidden = hidden.reshape(hidden.shape[0], rows, columns, patch, patch, -1)
        hidden = torch.einsum("nhwpqc->nchpwq", hidden)
        return hidden.reshape(hidden.shape[0], -1, context.height, context.width)
