"""The ledgers of text encoders, the autoencoder, and sampling, each by a run on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from pocketune.budget.encoders import empty_text_encoder
from pocketune.budget.inputs import clip_tokens, empty, shaped_batch, text_tokens
from pocketune.budget.ledger import Item, PhaseLedger, Place
from pocketune.budget.skeleton import denoiser_skeleton, dtype_of, held_tensors, retype, stream_shapes
from pocketune.budget.tracing import LiveBytes, fused_attention
from pocketune.budget.training import BUFFER, ENCODERS, heap
from pocketune.models.base import denoise
from pocketune.models.encoders import use_tiles
from pocketune.models.load import ModelFolder
from pocketune.models.quiet import building
from pocketune.photos import PIXEL_BYTES
from pocketune.plan.blocks import BlockPlan
from pocketune.recipe import Recipe
from pocketune.sample import BATCH

VAE, DENOISER = "autoencoder", "denoiser"
ACTIVATIONS = "activations"
POSTERIORS = "latents of the crops"


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """What a pass makes beyond what is there already: its activations, its operations, its different convolutions."""

    bytes: int
    flops: int
    convolutions: frozenset[Any]


def text_phase(folder: ModelFolder, recipe: Recipe, *, device: torch.device) -> PhaseLedger:
    """All text encoders in float32, and the largest of their passes over one prompt."""
    streamed = recipe.streams_parts
    held, largest, moved = 0, 0, 0
    activations, flops = 0, 0
    for part in filter(folder.has, folder.family.text_encoders):
        encoder, buffer = _text_encoder(folder, part, dtype=torch.float32, streamed=streamed)
        held += _bytes(encoder, streamed=streamed)
        tokens = torch.zeros(1, _length(folder, part), dtype=torch.long, device="meta")
        passed = _pass(lambda encoder=encoder, tokens=tokens: encoder(tokens), encoder)  # type: ignore[misc]
        activations, flops = max(activations, passed.bytes), flops + passed.flops
        largest, moved = max(largest, buffer), max(moved, *(one.nbytes for one in held_tensors(encoder)))
    return PhaseLedger(
        name="text",
        items=_items(
            ((ENCODERS, held, "float32" + _where(streamed)), (ACTIVATIONS, activations, "one prompt")),
            largest,
            device,
            passing_bytes=0 if streamed else moved,
            encoders=_encoder_count(folder),
        ),
        flops=flops * (1 + (recipe.class_prompt is not None)),
    )


def latents_phase(folder: ModelFolder, recipe: Recipe, *, resolution: int, crops: int, device: torch.device) -> PhaseLedger:
    """The autoencoder over one of all crops after the other."""
    vae, buffer = _vae(folder, recipe, dtype=torch.float32)
    encoding = _pass(lambda: vae.encode(empty(1, 3, resolution, resolution)), vae)
    tile = f"a tile of {recipe.vae_tile} px" if recipe.vae_tile else f"{resolution} x {resolution} px"
    streamed = recipe.streams_parts
    held = _bytes(vae, streamed=streamed)
    return PhaseLedger(
        name="latents",
        items=_items(
            ((VAE, held, "float32" + _where(streamed)), (ACTIVATIONS, encoding.bytes, tile)),
            buffer,
            device,
            passing_bytes=0 if streamed else held,
            convolutions=len(encoding.convolutions),
        ),
        flops=encoding.flops * crops,
    )


def posteriors_item(folder: ModelFolder, *, crops: int, side: int) -> Item:
    """The mean and the deviation of each crop that is in use, which stay in main memory from their encoding on.

    Args:
        folder: the model.
        crops: how many.
        side: of their latents.
    """
    channels = folder.sizes.channels
    return Item(
        name=POSTERIORS,
        bytes=crops * 2 * channels * side**2 * torch.float32.itemsize,
        formula=f"{crops:,} x 2 x {channels} x {side} x {side} x 4 B",
    )


def samples_phase(
    folder: ModelFolder,
    recipe: Recipe,
    *,
    resolution: int,
    images: int,
    rounds: int,
    trained_bytes: int,
    packed: bool,
    device: torch.device,
) -> PhaseLedger:
    """The whole stock pipeline, and the larger of a denoising pass and the decoding of a batch of images.

    Args:
        folder: the model.
        recipe: complete.
        resolution: of the images, in pixels.
        images: that are sampled in one go.
        rounds: how often.
        trained_bytes: of the result, which is loaded too.
        packed: whether the denoiser's weights are held packed, as scales need them.
        device: where the arithmetic is done.
    """
    streamed = recipe.streams_parts
    made = rounds * images
    batch = 1 if streamed else min(BATCH, images)
    side = resolution // folder.vae_scale
    whole_weights = {"weight_bits": None, "weights": "streamed" if streamed else "resident"}
    held = recipe if packed else recipe.model_copy(update=whole_weights)
    adapter, tiles = denoiser_skeleton(folder, held, blocks=range(folder.block_count), latent_side=side)
    whole = BlockPlan(folder.block_count)
    passes = batch * folder.family.guided_passes
    inputs = shaped_batch(folder, adapter, whole, empty, samples=passes, side=side, tokens=text_tokens(folder))
    denoising = _pass(lambda: denoise(adapter, inputs.latents, inputs.timesteps, inputs.prompt), adapter.model)
    vae_dtype = folder.family.vae_dtype(dtype_of(recipe))
    vae, vae_buffer = _vae(folder, recipe, dtype=vae_dtype)
    latents = empty(batch, *inputs.latents.shape[1:]).to(vae_dtype)
    decoding = _pass(lambda: vae.decode(latents), vae)
    text_dtype = folder.family.text_dtype(dtype_of(recipe))
    encoders = [
        _bytes(_text_encoder(folder, part, dtype=text_dtype, streamed=streamed)[0], streamed=streamed)
        for part in filter(folder.has, folder.family.text_encoders)
    ]
    buffer = max(tiles.largest_bytes if tiles else 0, vae_buffer)
    denoiser_bytes, vae_bytes = _bytes(adapter.model, streamed=streamed and not packed), _bytes(vae, streamed=streamed)
    larger = max(denoising, decoding, key=lambda passed: passed.bytes)
    return PhaseLedger(
        name="samples",
        items=(
            Item(name="images", bytes=made * resolution**2 * PIXEL_BYTES, formula=f"{made} of {resolution} x {resolution} px"),
            *_items(
                (
                    (DENOISER, denoiser_bytes, recipe.dtype + (f", {recipe.weight_bits} bits" if packed else _where(streamed))),
                    ("trained parameters", trained_bytes, "the result"),
                    (VAE, vae_bytes, str(vae_dtype).removeprefix("torch.") + _where(streamed)),
                    (ENCODERS, sum(encoders), str(text_dtype).removeprefix("torch.") + _where(streamed)),
                    (ACTIVATIONS, larger.bytes, f"{'decoding' if larger is decoding else 'denoising'} {batch} images"),
                ),
                buffer,
                device,
                passing_bytes=0 if streamed else vae_bytes + (0 if text_dtype == torch.float32 else sum(encoders)),
                convolutions=len(denoising.convolutions | decoding.convolutions),
                encoders=len(encoders),
            ),
        ),
        flops=(denoising.flops * recipe.sample_steps + decoding.flops) * -(-images // batch) * rounds,
    )


def _items(
    parts: Sequence[tuple[str, int, str]],
    buffer: int,
    device: torch.device,
    *,
    passing_bytes: int,
    convolutions: int = 0,
    encoders: int = 0,
) -> tuple[Item, ...]:
    """Items of parts by name, size and formula; `passing_bytes` of weights at once are in main memory on their way to a GPU."""
    place: Place = "device" if device.type == "cuda" else "host"
    items = [Item(name=name, bytes=size, formula=formula, place=place) for name, size, formula in parts if size]
    if buffer:
        items.append(Item(name=BUFFER, bytes=buffer, formula="a tile of one weight"))
    if place == "device" and passing_bytes:
        items.append(Item(name="weights on their way", bytes=passing_bytes, formula="loaded, then moved to the GPU"))
    return (*items, heap(convolutions, encoders=encoders))


def _pass(run: Callable[[], Any], model: nn.Module) -> _Pass:
    """A pass of a model without gradients."""
    live = LiveBytes()
    held = live.hold(held_tensors(model), "weights")  # a product makes views of them, which are no activations
    live.begin()
    with torch.no_grad(), fused_attention(), live:
        run()
    return _Pass(bytes=live.peak_bytes - held, flops=live.flops, convolutions=frozenset(live.convolutions))


def _text_encoder(folder: ModelFolder, part: str, *, dtype: torch.dtype, streamed: bool) -> tuple[nn.Module, int]:
    encoder = empty_text_encoder(folder, part, dtype=dtype)
    if not streamed:
        return encoder, 0
    tiles = stream_shapes(encoder, dtype=dtype)
    return encoder, tiles.tile_bytes


def _vae(folder: ModelFolder, recipe: Recipe, *, dtype: torch.dtype) -> tuple[Any, int]:
    with building(), init_empty_weights():
        vae = folder.family.vae.from_config(folder.vae_config)
    retype(vae.eval(), dtype)
    buffer = stream_shapes(vae, dtype=dtype).tile_bytes if recipe.streams_parts else 0
    if recipe.vae_tile is not None:
        use_tiles(vae, recipe.vae_tile, scale=folder.vae_scale)
    return vae.requires_grad_(False), buffer


def _encoder_count(folder: ModelFolder) -> int:
    return len([part for part in folder.family.text_encoders if folder.has(part)])


def _length(folder: ModelFolder, part: str) -> int:
    is_clip = folder.index[part][1].startswith("CLIP")
    return clip_tokens(folder, part) if is_clip else folder.text_padding


def _bytes(model: nn.Module, *, streamed: bool) -> int:
    seen: dict[int, Tensor] = {id(one): one for one in held_tensors(model, without_embeddings=streamed)}
    return sum(one.untyped_storage().nbytes() for one in seen.values())


def _where(streamed: bool) -> str:
    return ", small tensors; the rest is read from disk" if streamed else ""
