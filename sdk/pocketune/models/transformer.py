"""What adapters of diffusion transformers share whose blocks lie in one list, `transformer_blocks`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pocketune.models.base import Context, RemovedBlock
from pocketune.models.family import Config, Sizes


class TransformerAdapter:
    """The list of blocks."""

    def __init__(self, model: Any) -> None:
        """Wrap a model; it is neither copied nor changed."""
        self.model = model
        self._blocks: nn.ModuleList = model.transformer_blocks

    @property
    def block_count(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def patch_size(self) -> int:
        """Latent pixels along a token's side."""
        return int(self.model.config.patch_size)

    def block_name(self, index: int) -> str:
        """The block's prefix in the state dict."""
        return f"transformer_blocks.{index}"

    def block_parts(self, index: int) -> tuple[str, ...]:
        """The prefix of the one module that is the block."""
        return (self.block_name(index),)

    def remove_block(self, index: int) -> None:
        """Replace a block by a placeholder without weights."""
        self._blocks[index] = RemovedBlock()


def unpatchify(tokens: Tensor, context: Context, patch: int) -> Tensor:
    """(batch, tokens, patch * patch * channels) to (batch, channels, height, width)."""
    rows, columns = context.height // patch, context.width // patch
    tiles = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return tiles.reshape(tokens.shape[0], -1, context.height, context.width)


def sizes(config: Config, *, text_width: int, pooled_width: int = 0) -> Sizes:
    """Figures of such a model, which has no largest size of its own; the widths are those of the encoded text."""
    return Sizes(
        blocks=int(config["num_layers"]),
        width=int(config["num_attention_heads"]) * int(config["attention_head_dim"]),
        patch=int(config["patch_size"]),
        native=int(config["sample_size"]),
        channels=int(config["in_channels"]),
        text_width=text_width,
        pooled_width=pooled_width,
    )
