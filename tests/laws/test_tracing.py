"""What is counted on the meta device is what lives while the same step runs on real tensors."""

import pytest
import torch

from pocketune.budget.inputs import empty, shaped_batch
from pocketune.budget.ledger import PhaseLedger
from pocketune.budget.tracing import LiveBytes
from pocketune.budget.training import ATTENTION, FEED_FORWARD, GRADIENTS, OTHERS, Shapes, training_phase
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.recipe import Recipe
from pocketune.recompute import saved_to
from pocketune.scratch import Scratch
from pocketune.train import forget_activations, loss_of, new_optimizer
from pocketune.tuning import METHODS
from tests.tolerances import TRACED_BYTES

SHAPES = Shapes(side=8, tokens=20)
CPU = torch.device("cpu")


def activations(phase: PhaseLedger) -> int:
    return sum(phase.item(name) for name in (ATTENTION, FEED_FORWARD, OTHERS, GRADIENTS))


def lived(model: ModelFolder, recipe: Recipe, plan: BlockPlan, scratch: Scratch | None) -> int:
    """The same figure of a real step."""
    adapter = model.load_denoiser(dtype=torch.float32, device=CPU, blocks=plan.kept, latent_side=SHAPES.side)
    tuned = METHODS["lora"].attach(adapter, plan=plan, recipe=recipe, folder=model)
    batch = shaped_batch(model, adapter, plan, torch.randn, samples=1, side=SHAPES.side, tokens=SHAPES.tokens)
    if recipe.activations != "kept":
        forget_activations(adapter, recipe, new_optimizer(tuned.parameters, recipe), scratch)
    live = LiveBytes()
    live.hold([*adapter.model.parameters(), *adapter.model.buffers()], "model")
    prompt = [batch.prompt.hidden, batch.prompt.pooled]
    held = [batch.latents, batch.noise, batch.timesteps, batch.sigmas, batch.loss_weights, *prompt]
    held += [stream for streams in batch.features.values() for stream in streams]
    live.hold([one for one in held if one is not None], "batch")
    live.begin()
    before = live.now_bytes
    with live, saved_to(scratch):
        torch.autograd.backward(loss_of(adapter, plan, recipe, batch))
    return live.peak_bytes - before


@pytest.mark.parametrize("skip", ["none", "0-1,5"])
@pytest.mark.parametrize("kind", ["kept", "recomputed"])
def test_a_traced_step_is_a_real_one(tiny_model: ModelFolder, skip: str, kind: str) -> None:
    recipe = Recipe.create(instance_prompt="a toy", resolution=64, steps=1, skip=skip, activations=kind)
    plan = parse_plan(skip, tiny_model.block_count)
    traced = activations(training_phase(tiny_model, recipe, plan, SHAPES, device=CPU))
    assert traced == pytest.approx(lived(tiny_model, recipe, plan, None), rel=TRACED_BYTES)


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
