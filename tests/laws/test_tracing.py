"""What is counted on the meta device is what lives while the same step runs on real tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pocketune.budget.inputs import empty, shaped_batch
from pocketune.budget.ledger import PhaseLedger
from pocketune.budget.tracing import LiveBytes
from pocketune.budget.training import (
    ATTENTION,
    BUFFER,
    ENCODERS,
    FEED_FORWARD,
    GRADIENTS,
    OTHERS,
    WEIGHTS,
    Shapes,
    training_phase,
)
from pocketune.models.load import ModelFolder, open_model
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.recipe import Recipe
from pocketune.train import forget_activations, loss_of
from pocketune.tuning import METHODS
from pocketune.weights import stream
from pocketune.weights.fill import Residence
from tests.tiny_models import build
from tests.tolerances import TRACED_BYTES

SHAPES = Shapes(side=8, tokens=20)
CPU = torch.device("cpu")


def activations(phase: PhaseLedger) -> int:
    return sum(phase.item(name) for name in (ATTENTION, FEED_FORWARD, OTHERS, GRADIENTS))


class RealBytes(LiveBytes):
    """Tensors that a real step makes without memory are none of its memory."""

    def _count(self, tensor: torch.Tensor, name: str) -> None:
        if not tensor.is_meta:
            super()._count(tensor, name)


def lived(model: ModelFolder, recipe: Recipe, plan: BlockPlan, shapes: Shapes = SHAPES) -> int:
    """The same figure of a real step."""
    pipelines: list[Any] = []
    texts = model.text_pipeline
    weights = Residence(streamed=recipe.weights == "streamed")
    side = shapes.table_side(model)
    adapter = model.load_denoiser(dtype=torch.float32, device=CPU, blocks=plan.kept, weights=weights, latent_side=side)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "text_pipeline", lambda **given: pipelines.append(texts(**given)) or pipelines[-1])
        tuned = METHODS[recipe.method].attach(adapter, plan=plan, recipe=recipe, folder=model)
    sizes = {"samples": 1, "side": shapes.side, "tokens": shapes.tokens}
    batch = shaped_batch(model, adapter, plan, torch.randn, **sizes, placed=shapes.canvas is not None)
    if recipe.activations != "kept":
        forget_activations(adapter, recipe, lambda: None)
    live = RealBytes()
    for one in (adapter.model, *(pipeline.text_encoder for pipeline in pipelines)):
        live.hold([*one.parameters(), *one.buffers()], "model")
    prompt = [batch.prompt.hidden, batch.prompt.pooled, batch.prompt.place]
    held = [batch.latents, batch.noise, batch.timesteps, batch.sigmas, batch.loss_weights, *prompt]
    held += [stream for streams in batch.features.values() for stream in streams]
    live.hold([one for one in held if one is not None], "batch")
    live.begin()
    before = live.now_bytes
    with live:
        torch.autograd.backward(loss_of(adapter, plan, recipe, tuned.inputs(batch)))
    return live.peak_bytes - before


@pytest.mark.parametrize("skip", ["none", "0-1,5"])
@pytest.mark.parametrize("kind", ["kept", "recomputed"])
def test_a_traced_step_is_a_real_one(tiny_model: ModelFolder, skip: str, kind: str) -> None:
    recipe = Recipe.create(instance_prompt="a toy", resolution=64, steps=1, skip=skip, activations=kind)
    plan = parse_plan(skip, tiny_model.block_count)
    traced = activations(training_phase(tiny_model, recipe, plan, SHAPES, device=CPU))
    assert traced == pytest.approx(lived(tiny_model, recipe, plan), rel=TRACED_BYTES)


def test_a_traced_step_of_patches_is_a_real_one(tiny_model: ModelFolder) -> None:
    """Which holds the table of positions of the whole canvas."""
    recipe = Recipe.create(instance_prompt="a toy", resolution=64, steps=1, patches="dynamic")
    plan, own = parse_plan("none", tiny_model.block_count), Shapes(side=4, tokens=20)
    placed = Shapes(side=4, tokens=20, canvas=8)
    phases = [training_phase(tiny_model, recipe, plan, shapes, device=CPU) for shapes in (own, placed)]
    assert activations(phases[1]) == pytest.approx(lived(tiny_model, recipe, plan, placed), rel=TRACED_BYTES)
    tokens = (8 // 2) ** 2 - (4 // 2) ** 2
    assert phases[1].item(WEIGHTS) - phases[0].item(WEIGHTS) == tokens * tiny_model.width * 4


def test_a_traced_step_of_a_streamed_unet_is_a_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SMALLEST_STREAMED", 1)
    model = open_model(str(build("sd15", tmp_path / "model")))
    recipe = Recipe.create(instance_prompt="a toy", resolution=64, steps=1, weights="streamed", activations="recomputed")
    plan = BlockPlan(model.block_count)
    shapes = Shapes(side=32, tokens=20)  # activations are far larger than what a weight is read into on its way to the tile
    traced = activations(training_phase(model, recipe, plan, shapes, device=CPU))
    assert traced == pytest.approx(lived(model, recipe, plan, shapes) - stream.TILE_BYTES, rel=TRACED_BYTES)


def test_a_traced_step_that_tunes_a_word_is_a_real_one(tmp_path: Path) -> None:
    """Forward and backward through the text encoder too."""
    model = open_model(str(build("sd15", tmp_path / "model")))
    recipe = Recipe.create(instance_prompt="a photo of sks toy", method="token", resolution=64, steps=1)
    plan = BlockPlan(model.block_count)
    found = training_phase(model, recipe, plan, SHAPES, device=CPU)
    assert activations(found) == pytest.approx(lived(model, recipe, plan), rel=TRACED_BYTES)
    encoder = model.text_pipeline(device=CPU).text_encoder
    held = sum(one.nbytes for one in (*encoder.parameters(), *encoder.buffers()))
    assert found.item(ENCODERS) == pytest.approx(held, rel=TRACED_BYTES)  # in whole pages
    smallest = training_phase(model, recipe.changed(weight_bits=8, gradient="zeroth_order"), plan, SHAPES, device=CPU)
    table = encoder.get_input_embeddings().weight.nbytes
    assert smallest.item(ENCODERS) < (held - table) / 2  # packed one weight at a time, with the table of words on disk
    streamed = training_phase(model, recipe.changed(weights="streamed", gradient="zeroth_order"), plan, SHAPES, device=CPU)
    assert streamed.item(ENCODERS) <= held - table
    assert streamed.item(BUFFER) >= stream.TILE_BYTES


def test_names_are_given_and_taken_back() -> None:
    live = LiveBytes()
    with live:
        with live.named("inner"):
            first = empty(1000)
        second = first * 2
        del first
    assert live.peak_bytes == 2 * second.nbytes
    assert live.now_bytes == second.nbytes
    assert live.at_peak == {"inner": 4000, "other activations": 4000}
