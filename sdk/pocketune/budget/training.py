"""The ledger of training and of the pass before it: real steps on the meta device, and closed forms for what they hide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch

from pocketune.budget.constants import (
    CONVOLUTION_BYTES,
    CONVOLUTION_BYTES_PER_SHAPE,
    HEAP_BYTES,
    HEAP_BYTES_PER_ENCODER,
    HEAP_BYTES_PER_TENSOR,
)
from pocketune.budget.encoders import ShapeFolder
from pocketune.budget.inputs import empty, shaped_batch
from pocketune.budget.ledger import Item, PhaseLedger, Place
from pocketune.budget.skeleton import denoiser_skeleton, held_tensors
from pocketune.budget.tracing import LiveBytes, ShapeScratch, fused_attention
from pocketune.methods.base import Tuned
from pocketune.methods.scales import quantization_of
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.models.positions import table_side
from pocketune.plan.blocks import BlockPlan
from pocketune.recipe import Recipe
from pocketune.recompute import saved_to
from pocketune.sampling.choices import zeroth_order_share
from pocketune.sampling.directions import Probing
from pocketune.step import span_features
from pocketune.train import forget_activations, loss_of
from pocketune.tuning import METHODS

ATTENTION, FEED_FORWARD, OTHERS = "attention activations", "feed-forward activations", "other activations"
GRADIENTS = "gradients of activations"
TRAINED, MOMENTS, WEIGHTS, INPUTS = "trained parameters", "optimizer moments", "frozen weights", "batch and features"
ENCODERS, BUFFER, HEAP = "text encoders", "streaming buffer", "heap"


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a job.

    Attributes:
        side: of the latents.
        tokens: of the text.
        samples: of a batch, class images included.
        low_side: of the latents that mixed training backpropagates on; None: all steps work at one size.
        canvas: on which training images have their place; None: they have positions of their own.
    """

    side: int
    tokens: int
    samples: int = 1
    low_side: int | None = None
    canvas: int | None = None

    def table_side(self, folder: ModelFolder) -> int | None:
        """To which the job crops a table of positions."""
        return self.canvas or table_side(self.side, self.low_side, patch=folder.sizes.patch)


def _free_gradients(tuned: Tuned) -> None:
    """As an optimizer's step does, whose moments are counted apart."""
    for parameter in tuned.parameters.values():
        parameter.grad = None


def training_phase(
    folder: ModelFolder, recipe: Recipe, plan: BlockPlan, shapes: Shapes, *, device: torch.device
) -> PhaseLedger:
    """What is in memory at the peak of a training step, from the second on, when the optimizer has its moments.

    Of mixed training, the step of either kind that needs more; times are those of both, in the shares to expect.

    Args:
        folder: the model; its weights are not read.
        recipe: complete.
        plan: what is skipped.
        shapes: sizes of the job.
        device: where the arithmetic is done.
    """
    if shapes.low_side is None:
        return _steps(folder, recipe, plan, shapes, device=device, side=shapes.side, backprop=recipe.gradient == "backprop")
    low = _steps(folder, recipe, plan, shapes, device=device, side=shapes.low_side, backprop=True)
    high = _steps(folder, recipe, plan, shapes, device=device, side=shapes.side, backprop=False)
    share = zeroth_order_share(recipe)
    return replace(
        max(low, high, key=lambda phase: sum(item.bytes for item in phase.items)),
        flops=round(low.flops * (1 - share) + high.flops * share),
        read_bytes=round(low.read_bytes * (1 - share) + high.read_bytes * share),
        written_bytes=round(low.written_bytes * (1 - share)),
        disk_bytes=low.disk_bytes,
    )


def _steps(
    folder: ModelFolder, recipe: Recipe, plan: BlockPlan, shapes: Shapes, *, device: torch.device, side: int, backprop: bool
) -> PhaseLedger:
    """All steps as one kind of them, at one size."""
    adapter, tiles = denoiser_skeleton(folder, recipe, blocks=plan.kept, latent_side=shapes.table_side(folder))
    weights = held_tensors(adapter.model)
    texts = ShapeFolder(folder)
    tuned = METHODS[recipe.method].attach(adapter, plan=plan, recipe=recipe, folder=cast(ModelFolder, texts))
    scratch = ShapeScratch() if recipe.activations == "on_disk" and backprop else None
    trained = [parameter.to("meta") for parameter in tuned.parameters.values()]
    has_moments = recipe.gradient != "zeroth_order" or recipe.zo_optimizer == "adam"
    moments = [torch.empty_like(one, device="meta") for one in trained for _ in range(2)] if has_moments else []
    batch = shaped_batch(
        folder, adapter, plan, empty, samples=shapes.samples, side=side, tokens=shapes.tokens, placed=shapes.canvas is not None
    )
    live = LiveBytes()
    counted = len([one for one in weights if one.numel()])
    live.hold(weights, WEIGHTS)
    live.hold(trained, TRAINED)
    live.hold([*tuned.parameters.values(), *tuned.state.values()], TRAINED)
    live.hold(texts.held(), ENCODERS)
    live.hold(moments, MOMENTS)
    live.hold(_tensors(batch), INPUTS)
    if recipe.activations != "kept":
        forget_activations(adapter, recipe, lambda: _free_gradients(tuned), scratch=scratch)
    follow(live, adapter)
    live.begin()
    with fused_attention(), live:
        if backprop:
            with saved_to(scratch):
                loss = loss_of(adapter, plan, recipe, tuned.inputs(batch))
                with live.named(GRADIENTS):
                    torch.autograd.backward(loss)
        else:
            with torch.no_grad():
                loss_of(adapter, plan, recipe, tuned.inputs(batch))
    count = sum(one.numel() for one in trained)
    formulas = {
        WEIGHTS: f"{counted} tensors in {recipe.dtype}" + _residence(recipe),
        TRAINED: f"{count:,} x 4 B",
        MOMENTS: f"2 x {count:,} x 4 B",
        ENCODERS: "float32" + _residence(recipe) + ", tables of words on disk" * (quantization_of(recipe) is not None),
        INPUTS: f"{shapes.samples} x latents, {shapes.tokens} tokens of text, features of {len(plan.skipped_spans)} spans",
        ATTENTION: _activations(recipe, plan, backprop=backprop),
        FEED_FORWARD: _activations(recipe, plan, backprop=backprop),
        OTHERS: _activations(recipe, plan, backprop=backprop),
        GRADIENTS: "one block at a time" if recipe.optimizer_in_backward else f"{count:,} x 4 B and what flows back",
    }
    place: Place = "device" if device.type == "cuda" else "host"
    items = [
        Item(name=name, bytes=size, formula=formulas[name], place=place)
        for name, size in live.at_peak.items()
        if size and name in formulas
    ]
    if tiles is not None:
        buffers = tiles.largest_bytes + texts.buffer_bytes
        items.append(Item(name=BUFFER, bytes=buffers, formula="a tile of one weight" + " each" * bool(texts.buffer_bytes)))
    forwards = len(Probing(queries=recipe.zo_queries, two_sided=recipe.zo_two_sided).points)
    passes = 0 if tiles is None else (2 + (recipe.activations != "kept") if backprop else forwards)
    return PhaseLedger(
        name="training",
        items=(*items, heap(len(live.convolutions), len(trained), encoders=len(texts.encoders))),
        flops=live.flops * recipe.steps * (1 if backprop else forwards),
        read_bytes=passes * stored_bytes(folder, plan, recipe) * recipe.steps,
        written_bytes=0 if scratch is None else scratch.written_bytes * recipe.steps,
        disk_bytes=0 if scratch is None else scratch.size_bytes,
    )


def saving_phase(training: PhaseLedger) -> PhaseLedger:
    """What is in memory while a checkpoint and the result are written: all that training keeps between two steps."""
    kept = (WEIGHTS, TRAINED, MOMENTS, ENCODERS, INPUTS, BUFFER, HEAP)
    items = [item for item in training.items if item.name in kept]
    # The file is read back once to sort its header, so that equal results have equal bytes.
    copies = 2 * training.item(TRAINED)
    return PhaseLedger(name="saving", items=(*items, Item(name="the result's file", bytes=copies, formula="2 copies")))


def features_phase(
    folder: ModelFolder, recipe: Recipe, plan: BlockPlan, shapes: Shapes, *, draws: int, device: torch.device
) -> PhaseLedger:
    """What is in memory while the features of skipped blocks are computed."""
    blocks = range(plan.skipped_spans[-1].stop)
    adapter, tiles = denoiser_skeleton(folder, recipe, blocks=blocks, latent_side=shapes.table_side(folder))
    whole = BlockPlan(plan.block_count)
    placed = shapes.canvas is not None
    batch = shaped_batch(
        folder, adapter, whole, empty, samples=shapes.samples, side=shapes.side, tokens=shapes.tokens, placed=placed
    )
    live = LiveBytes()
    live.hold(held_tensors(adapter.model), WEIGHTS)
    live.hold(_tensors(batch), INPUTS)
    follow(live, adapter)
    live.begin()
    with fused_attention(), live:
        span_features(adapter, plan, batch)
    formula = f"a forward pass of {len(blocks)} blocks"
    place: Place = "device" if device.type == "cuda" else "host"
    items = [Item(name=name, bytes=size, formula=formula, place=place) for name, size in live.at_peak.items() if size]
    if tiles is not None:
        items.append(Item(name=BUFFER, bytes=tiles.largest_bytes, formula="a tile of one weight"))
    passes = 0 if tiles is None else -(-draws // shapes.samples)
    return PhaseLedger(
        name="features",
        items=(*items, heap(len(live.convolutions))),
        flops=live.flops * -(-draws // shapes.samples),
        read_bytes=passes * stored_bytes(folder, BlockPlan(plan.block_count), recipe),
    )


def follow(live: LiveBytes, adapter: DenoiserAdapter) -> None:
    """Name activations after the part of a block that makes them."""
    kinds = {"attn": ATTENTION, "attn1": ATTENTION, "attn2": ATTENTION, "ff": FEED_FORWARD, "ff_context": FEED_FORWARD}
    live.follow(adapter.model, lambda path: kinds.get(path.rsplit(".", 1)[-1]))


def heap(convolutions: int, trained_tensors: int = 0, *, encoders: int = 0) -> Item:
    """What no tensor shows; `convolutions` differ in shape, and overlap in their windows; `encoders` are of text."""
    size = HEAP_BYTES + HEAP_BYTES_PER_TENSOR * trained_tensors
    formula = f"{HEAP_BYTES / 1e6:.0f} MB + {HEAP_BYTES_PER_TENSOR / 1e3:.0f} kB x {trained_tensors} trained tensors, fitted"
    if convolutions:
        size += CONVOLUTION_BYTES + CONVOLUTION_BYTES_PER_SHAPE * convolutions
        each = f"{CONVOLUTION_BYTES / 1e6:.0f} MB + {CONVOLUTION_BYTES_PER_SHAPE / 1e3:.0f} kB x {convolutions}"
        formula += f"; {each} shapes of convolutions"
    if encoders:
        size += HEAP_BYTES_PER_ENCODER * encoders
        formula += f"; {HEAP_BYTES_PER_ENCODER / 1e6:.0f} MB x {encoders} text encoders"
    return Item(name=HEAP, bytes=size, formula=formula, fixed=True)


def stored_bytes(folder: ModelFolder, plan: BlockPlan, recipe: Recipe) -> int:
    """Of the weights of the kept blocks as they lie on disk, packed if the recipe packs them; 2 bytes a value otherwise."""
    adapter = folder.empty_denoiser()
    for index in plan.skipped:
        adapter.remove_block(index)
    values: int = sum(parameter.numel() for parameter in adapter.model.parameters())
    return values * (recipe.weight_bits or 16) // 8


def _residence(recipe: Recipe) -> str:
    if recipe.weights == "streamed":
        return "; the rest is read from disk"
    return f", packed to {recipe.weight_bits} bits" if recipe.weight_bits else ""


def _activations(recipe: Recipe, plan: BlockPlan, *, backprop: bool) -> str:
    if not backprop:
        return "one block, forward"
    kept = len(plan.kept)
    return {
        "kept": f"{kept} blocks",
        "recomputed": f"inputs of {kept} blocks, and one block again",
        "on_disk": f"one of {kept} blocks; the rest is in the scratch file",
    }[recipe.activations]


def _tensors(batch: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in vars(batch).values():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found += [stream for streams in value.values() for stream in streams]
        elif hasattr(value, "__dataclass_fields__"):
            found += _tensors(value)
    return found
