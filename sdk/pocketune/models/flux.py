"""Adapter of FLUX.1 (`FluxTransformer2DModel`): double-stream blocks, then single-stream blocks, as one ordered list."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from pocketune.errors import ModelError, PlanError
from pocketune.models.base import Context, Prompt, RemovedBlock, Streams, TextAttention
from pocketune.models.family import Config, Family, Parts, Sizes
from pocketune.models.positions import token_places

PATCH = 2  # diffusers packs 2 x 2 latent pixels into a token outside of the model, whose own patch size is 1
NATIVE = 128  # the configuration says no size; diffusers' pipeline makes 1024-pixel images
TRAINING_GUIDANCE = 3.5  # of train_dreambooth_lora_flux.py, for models that take the guidance scale as an input
ATTENTION_TARGETS = (
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The LoRA targets of attention alone, without the feed-forward layers."""


class FluxAdapter:
    """`FluxTransformer2DModel` as its double blocks followed by its single blocks, each with an image and a text stream.

    diffusers joins the two streams inside of a single block and parts them again, so that a skipped span may cross from double
    to single blocks. Latents are taken and given unpacked. The last block ends the text stream, which the head does not see.
    """

    stream_names = ("image", "text")
    unit_kinds: tuple[Any, ...] = (FluxTransformerBlock, FluxSingleTransformerBlock)
    # The targets of diffusers' train_dreambooth_lora_flux.py; single blocks have the first three.
    default_scale_targets = ("attn", "ff", "ff_context", "proj_mlp", "proj_out")
    default_lora_targets = (
        *ATTENTION_TARGETS,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    def __init__(self, model: FluxTransformer2DModel) -> None:
        """Wrap a model; it is neither copied nor changed.

        Raises:
            ModelError: it takes an image beside the noise (Fill, Canny, Depth).
        """
        config = model.config
        if config.out_channels not in (None, config.in_channels):
            msg = (
                f"this FLUX takes {config.in_channels} channels and gives {config.out_channels}: it edits a given image, "
                "and training from prompts alone makes no sense. Use a text-to-image FLUX such as FLUX.1-dev."
            )
            raise ModelError(msg)
        self.model: Any = model
        self.guidance = TRAINING_GUIDANCE
        self._double: nn.ModuleList = model.transformer_blocks
        self._single: nn.ModuleList = model.single_transformer_blocks

    @property
    def block_count(self) -> int:
        """Number of double and single blocks together."""
        return len(self._double) + len(self._single)

    @property
    def patch_size(self) -> int:
        """Latent pixels along a token's side."""
        return PATCH

    def block_name(self, index: int) -> str:
        """The block's prefix in the state dict."""
        doubles = len(self._double)
        return f"transformer_blocks.{index}" if index < doubles else f"single_transformer_blocks.{index - doubles}"

    def block_parts(self, index: int) -> tuple[str, ...]:
        """The prefix of the one module that is the block."""
        return (self.block_name(index),)

    def remove_block(self, index: int) -> None:
        """Replace a block by a placeholder without weights."""
        blocks, position = self._place(index)
        blocks[position] = RemovedBlock()

    def context(self, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Context:
        """Embed timestep, guidance and pooled text, and the positions of all tokens."""
        # Divided and multiplied again, as the pipeline and the model do, so that rounding is theirs.
        timesteps = (timesteps / 1000).to(latents.dtype) * 1000
        if self.model.config.guidance_embeds:
            guidance = torch.full(timesteps.shape, self.guidance, device=latents.device).to(latents.dtype) * 1000
            embedding = self.model.time_text_embed(timesteps, guidance, prompt.pooled)
        else:
            embedding = self.model.time_text_embed(timesteps, prompt.pooled)
        height, width = latents.shape[-2:]
        rows, columns = (torch.arange(side // PATCH, device=latents.device) for side in (height, width))
        if prompt.place is not None:
            rows, columns = _place_of_all(prompt.place, side=height // PATCH)
        positions = _positions(prompt.hidden.shape[1], rows, columns)
        return Context(embedding=embedding, height=height, width=width, rotary=self.model.pos_embed(positions))

    def embed(self, latents: Tensor, prompt: Prompt) -> Streams:
        """Pack latents into tokens, and project them and the text."""
        return self.model.x_embedder(pack(latents)), self.model.context_embedder(prompt.hidden)

    def block(self, index: int, streams: Streams, context: Context) -> Streams:
        """Run one double or single block."""
        image, text = streams
        blocks, position = self._place(index)
        text, image = blocks[position](
            hidden_states=image, encoder_hidden_states=text, temb=context.embedding, image_rotary_emb=context.rotary
        )
        return (image,) if index == self.block_count - 1 else (image, text)

    def text_attention(self, index: int) -> tuple[TextAttention, ...]:
        """The joint attention of a double or single block."""
        blocks, position = self._place(index)
        return (TextAttention(blocks[position], joined="text first"),)

    def head(self, streams: Streams, context: Context) -> Tensor:
        """Final norm, projection and unpacking."""
        hidden = self.model.proj_out(self.model.norm_out(streams[0], context.embedding))
        return unpack(hidden, context.height, context.width)

    def _place(self, index: int) -> tuple[nn.ModuleList, int]:
        doubles = len(self._double)
        return (self._double, index) if index < doubles else (self._single, index - doubles)


def pack(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) to (batch, height / 2 * width / 2, channels * 4), as diffusers' pipeline packs."""
    batch, channels, height, width = latents.shape
    tiles = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(batch, (height // PATCH) * (width // PATCH), channels * PATCH * PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, to (batch, channels, height, width)."""
    tiles = tokens.reshape(tokens.shape[0], height // PATCH, width // PATCH, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(tokens.shape[0], -1, height, width)


def _place_of_all(place: Tensor, *, side: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of an only image's tokens, each (side,).

    Raises:
        PlanError: there are several images; diffusers rotates a whole batch by the same positions.
    """
    if len(place) > 1:
        msg = f'{len(place)} images a step share their positions in FLUX. Set positions = "own", or train on one a step.'
        raise PlanError(msg)
    rows, columns = token_places(place, side, patch=PATCH)
    return rows[0], columns[0]


def _positions(text_tokens: int, rows: Tensor, columns: Tensor) -> Tensor:
    """(text and image tokens, 3): zeros for text; 0, row and column for image tokens. rows, columns: those of the grid."""
    grid = torch.zeros(len(rows), len(columns), 3, device=rows.device)
    grid[..., 1] = rows[:, None]
    grid[..., 2] = columns[None, :]
    return torch.cat((torch.zeros(text_tokens, 3, device=rows.device), grid.flatten(0, 1)))


def _sizes(config: Config) -> Sizes:
    return Sizes(
        blocks=int(config["num_layers"]) + int(config["num_single_layers"]),
        width=int(config["num_attention_heads"]) * int(config["attention_head_dim"]),
        patch=PATCH,
        native=NATIVE,
        channels=int(config["in_channels"]) // PATCH**2,
        text_width=int(config["joint_attention_dim"]),
        pooled_width=int(config["pooled_projection_dim"]),
    )


def _encode(pipeline: Any, prompt: str, *, device: torch.device, length: int) -> Prompt:
    hidden, pooled, _ = pipeline.encode_prompt(prompt=prompt, prompt_2=prompt, device=device, max_sequence_length=length)
    return Prompt(hidden=hidden, pooled=pooled)


def _text_length(parts: Parts) -> int:
    """512 tokens, as FLUX.1-dev was made with; schnell, which takes no guidance scale, was made with 256 at most."""
    return 512 if parts.denoiser_config.get("guidance_embeds") else 256


FAMILY = Family(
    title="FLUX.1",
    denoiser=FluxTransformer2DModel,
    adapter=FluxAdapter,
    pipeline=FluxPipeline,
    text_encoders=("text_encoder", "text_encoder_2"),
    sizes=_sizes,
    encode=_encode,
    text_length=_text_length,
    sampling=lambda length: {"max_sequence_length": length},
    recipe_defaults={"weighting_scheme": "none", "precondition_outputs": False, "guidance_scale": 3.5},
    guided_passes=1,
    timestep_divisor=1000,
    positions_for="batch",
    left_out=("feature_extractor", "image_encoder"),
)
