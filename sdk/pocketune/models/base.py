"""The seam between Pocketune and diffusers' denoisers: an ordered list of blocks that pass streams along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Streams = tuple[Tensor, ...]
"""What flows from block to block, image tokens first: (image: (batch, tokens, width), text: (batch, tokens, width))."""


@dataclass(frozen=True)
class Prompt:
    """Encoded text. `hidden`: (batch, tokens, width); `pooled`: (batch, width)."""

    hidden: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Context:
    """What every block and the head see besides the streams.

    Attributes:
        embedding: (batch, width), the embedded timestep and pooled text.
        height: of the latents.
        width: of the latents.
    """

    embedding: Tensor
    height: int
    width: int


class DenoiserAdapter(Protocol):
    """A diffusers denoiser as blocks. `embed`, all blocks in order and `head` together equal the model's own forward."""

    model: Any  # an nn.Module; diffusers ships no types
    stream_names: tuple[str, ...]
    default_lora_targets: tuple[str, ...]

    @property
    def block_count(self) -> int:
        """How many blocks the intact model has."""

    @property
    def patch_size(self) -> int:
        """Latent pixels along a token's side."""

    def block_name(self, index: int) -> str:
        """The block's prefix in the model's state dict, as "transformer_blocks.3"."""

    def remove_block(self, index: int) -> None:
        """Take a block's weights out of the model; running that block is then an error."""

    def context(self, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Context:
        """Embed what all blocks share. latents: (batch, channels, height, width); timesteps: (batch,) in [0, 1000]."""

    def embed(self, latents: Tensor, prompt: Prompt) -> Streams:
        """Turn latents and text into the streams that enter block 0."""

    def block(self, index: int, streams: Streams, context: Context) -> Streams:
        """Run one block; a stream that ends in it is missing from the result."""

    def head(self, streams: Streams, context: Context) -> Tensor:
        """Turn the image stream into the model's output, (batch, channels, height, width)."""


def run_blocks(adapter: DenoiserAdapter, start: int, stop: int, streams: Streams, context: Context) -> Streams:
    """Run blocks start (inclusive) to stop (exclusive) in order."""
    for index in range(start, stop):
        streams = adapter.block(index, streams, context)
    return streams


def denoise(adapter: DenoiserAdapter, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
    """The whole model through its adapter; bit for bit what the diffusers model computes."""
    context = adapter.context(latents, timesteps, prompt)
    streams = run_blocks(adapter, 0, adapter.block_count, adapter.embed(latents, prompt), context)
    return adapter.head(streams, context)
