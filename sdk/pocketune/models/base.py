"""The seam between Pocketune and diffusers' denoisers: an ordered list of blocks that pass streams along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from pocketune.errors import PlanError

Streams = tuple[Tensor, ...]
"""What flows from block to block, image tokens first: (image: (batch, tokens, width), text: (batch, tokens, width))."""


@dataclass(frozen=True)
class Prompt:
    """Encoded text; what an architecture does not take is None.

    Attributes:
        hidden: (batch, tokens, width).
        pooled: (batch, width).
        mask: (batch, tokens), 1 where a token counts and 0 where it is padding.
        sizes: (batch, 6), SDXL's height and width of the photo, top and left of the crop, height and width of the result.
        place: (batch, 4) in float32, each image's top, left and side on the canvas and the canvas' side, in its latent pixels;
            None: each image is a canvas of its own.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    sizes: Tensor | None = None
    place: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """What every block and the head see besides the streams; what an architecture does not use is None.

    Attributes:
        embedding: (batch, width), the embedded timestep, and pooled text where the model takes it.
        height: of the latents.
        width: of the latents.
        modulation: (batch, 6 * width), the scales and shifts that all blocks share (adaLN-single).
        text: (batch, tokens, width), projected text that blocks attend to and do not change.
        text_bias: (batch, 1, tokens), added to the attention scores of that text.
        rotary: cosines and sines of the positions of text and image, each (tokens, head width).
    """

    embedding: Tensor
    height: int
    width: int
    modulation: Tensor | None = None
    text: Tensor | None = None
    text_bias: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class TextAttention:
    """Where a block lets the image see the text.

    Attributes:
        module: inside whose forward all of it happens.
        joined: how the tokens of both lie in queries and keys, with `hidden_states` and `encoder_hidden_states` as the module's
            inputs; None where the module's keys are text alone.
    """

    module: nn.Module
    joined: Literal["image first", "text first"] | None = None


class DenoiserAdapter(Protocol):
    """A diffusers denoiser as blocks. `embed`, all blocks in order and `head` together equal the model's own forward."""

    model: Any  # an nn.Module; diffusers ships no types
    stream_names: tuple[str, ...]
    default_lora_targets: tuple[str, ...]
    default_scale_targets: tuple[str, ...] | None
    """Parts of blocks with scales that train: layers that see tokens, not those that shift them by the timestep. None: all
    packed layers, in blocks or not."""
    unit_kinds: tuple[Any, ...]
    """Module classes whose activations are made again in backward when they are not kept."""

    @property
    def block_count(self) -> int:
        """How many blocks the intact model has."""

    @property
    def patch_size(self) -> int:
        """Latent pixels along a token's side."""

    def block_name(self, index: int) -> str:
        """The prefix in the model's state dict of the part that LoRA is for, as "transformer_blocks.3"."""

    def block_parts(self, index: int) -> tuple[str, ...]:
        """The prefixes of all that runs in the block and nowhere else."""

    def remove_block(self, index: int) -> None:
        """Take a block's weights out of the model; running that block is then an error."""

    def context(self, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Context:
        """Embed what all blocks share. latents: (batch, channels, height, width); timesteps: (batch,) in [0, 1000]."""

    def embed(self, latents: Tensor, prompt: Prompt) -> Streams:
        """Turn latents and text into the streams that enter block 0."""

    def block(self, index: int, streams: Streams, context: Context) -> Streams:
        """Run one block; a stream that ends in it is missing from the result."""

    def text_attention(self, index: int) -> tuple[TextAttention, ...]:
        """Where a block lets the image see the text; empty where it does not."""

    def head(self, streams: Streams, context: Context) -> Tensor:
        """Turn the image stream into the model's output, (batch, channels, height, width)."""


@runtime_checkable
class SkipConnected(Protocol):
    """What an adapter of a U-Net has besides: its first stream is the image, the others are skip connections."""

    def middle(self) -> int:
        """Index of the block between encoder and decoder."""

    def stream_count(self, index: int) -> int:
        """How many streams enter a block; for the number behind the last block, those that enter the head."""


class RemovedBlock(nn.Module):
    """Holds the place of a block whose weights were taken out."""

    def forward(self, *_: object, **__: object) -> None:
        """Refuse to run.

        Raises:
            PlanError: always.
        """
        msg = "a removed block was run: the plan and the loaded weights disagree. Load the plan's kept blocks."
        raise PlanError(msg)


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
