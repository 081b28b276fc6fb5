"""Laws of a tuned word: it changes nothing at first, trains alone, and needs no backpropagation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pocketune import Progress, Recipe, personalize
from pocketune.errors import FileFormatError, Interrupted, RecipeError
from pocketune.inspection import inspect
from pocketune.methods.subspace import Subspace, noise_directions
from pocketune.methods.token import TokenMethod
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan
from pocketune.sample import generate
from pocketune.sampling.draws import draw_samples
from pocketune.train import new_optimizer, zeroth_order_step
from pocketune.weights import stream
from tests.laws.test_step import make_batch

PROMPT = "a photo of sks toy"
CPU = torch.device("cpu")
ZOODIP = {
    "method": "token",
    "weight_bits": 8,
    "gradient": "zeroth_order",
    "zo_two_sided": False,
    "zo_queries": 2,
    "zo_optimizer": "adam",
    "zo_learning_rate": 0.05,
    "zo_epsilon": 1e-2,
    "subspace_steps": 2,
    "timestep_low": 500,
    "timestep_high": 900,
}


def recipe(**changes: object) -> Recipe:
    settings = {"instance_prompt": PROMPT, "steps": 4, "sample_steps": 2, "sample_prompts": (PROMPT,), "method": "token"}
    return Recipe.create(**(settings | changes))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_fresh_word_is_the_word_itself(tiny_model: ModelFolder) -> None:
    """Bit for bit what the pipeline's own encoding gives, for the photos' rows alone."""
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    tuned = TokenMethod().attach(adapter, plan=BlockPlan(6), recipe=recipe(), folder=tiny_model)
    expected = tiny_model.encode_prompts([PROMPT], device=CPU)[PROMPT]
    batch = make_batch()
    prompt = tuned.inputs(batch).prompt
    assert torch.equal(prompt.hidden[:1], expected.hidden) and torch.equal(prompt.pooled[:1], expected.pooled)
    assert torch.equal(prompt.hidden[1:], batch.prompt.hidden[1:])
    assert set(tuned.parameters) == {"text_encoder.vector", "text_encoder_2.vector"}
    assert not any(TokenMethod().change(tuned).values())

    gradients = torch.autograd.grad((prompt.hidden**2).sum() + prompt.pooled.sum(), list(tuned.parameters.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    other = TokenMethod().attach(adapter, plan=BlockPlan(6), recipe=recipe(token_start="toy"), folder=tiny_model)
    assert all(TokenMethod().change(other).values())


def test_a_packed_encoder_leaves_its_words_on_disk(tiny_model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to the bit, wherever the table lies."""
    adapter, asked = tiny_model.load_denoiser(dtype=torch.float32, device=CPU), recipe(weight_bits=8, token_start="toy")
    tuned = [TokenMethod().attach(adapter, plan=BlockPlan(6), recipe=asked, folder=tiny_model)]
    monkeypatch.setattr(stream, "SMALLEST_STREAMED", 1)
    tuned.append(TokenMethod().attach(adapter, plan=BlockPlan(6), recipe=asked, folder=tiny_model))
    held, on_disk = ([token.table for _, token in one.owner.named_children()] for one in tuned)
    assert not any(isinstance(table, stream.StreamedEmbedding) for table in held)
    assert all(isinstance(table, stream.StreamedEmbedding) for table in on_disk)
    first, second = (one.inputs(make_batch()).prompt for one in tuned)
    assert torch.equal(first.hidden, second.hidden) and torch.equal(first.pooled, second.pooled)
    assert TokenMethod().change(tuned[0]) == TokenMethod().change(tuned[1])
    plain = TokenMethod().attach(adapter, plan=BlockPlan(6), recipe=recipe(token_start="toy"), folder=tiny_model)
    assert not torch.equal(plain.inputs(make_batch()).prompt.hidden, first.hidden)


def test_what_cannot_be_tuned_is_refused(tiny_model: ModelFolder, tiny_pipelines: Callable[[str], ModelFolder]) -> None:
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    for changes, folder, words in (
        ({"token_start": "xylophonist"}, tiny_model, "tokens to this model"),
        ({}, tiny_pipelines("pixart"), "no text encoder of the CLIP kind"),
    ):
        with pytest.raises(RecipeError, match=words):
            TokenMethod().attach(adapter, plan=BlockPlan(6), recipe=recipe(**changes), folder=folder)
    for changes, words in (
        ({"skip": "0-1"}, "hold for one prompt"),
        ({"token": "zebra"}, "not in"),
    ):
        with pytest.raises(RecipeError, match=words):
            recipe(**changes)


def test_projection_takes_out_what_hardly_varied() -> None:
    values = torch.zeros(8, 5)
    values[:, 0], values[:, 1] = numbers(8), numbers(8, seed=1)
    values[:, 2] = values[:, 0]
    removed = noise_directions(values, 1e-3)
    product = removed @ removed.T
    torch.testing.assert_close(product, torch.diag(product.diagonal().round()), rtol=0, atol=1e-5)
    moved = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    assert (moved @ removed.T).abs().max() < 1e-5
    assert torch.equal(noise_directions(torch.ones(4, 3), 1e-3), torch.zeros(4, 3))


def test_projection_begins_after_its_steps_and_off_is_exact() -> None:
    vector = numbers(6)
    off, on = Subspace({"v": vector}, steps=0, noise=0.5), Subspace({"v": vector}, steps=3, noise=0.5)
    gradient = numbers(6, seed=2)
    assert off.state == {} and off.project("v", gradient) is gradient
    for step in range(3):
        assert torch.equal(on.project("v", gradient), gradient)
        vector.copy_(numbers(6, seed=10 + step))
        on.after_step(step)
    assert not torch.equal(on.project("v", gradient), gradient)
    assert on.project("v", gradient).norm() < gradient.norm()


@pytest.mark.parametrize("optimizer", ["adam", "descent"])
def test_a_step_takes_the_projected_gradient(tiny_model: ModelFolder, optimizer: str) -> None:
    asked = recipe(**(ZOODIP | {"zo_optimizer": optimizer}))
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    tuned = TokenMethod().attach(adapter, plan=BlockPlan(6), recipe=asked, folder=tiny_model)
    tuned = replace(tuned, project=lambda name, found: found if name == "text_encoder.vector" else torch.zeros_like(found))
    before = {name: parameter.detach().clone() for name, parameter in tuned.parameters.items()}
    adam = new_optimizer(tuned.parameters, asked)
    zeroth_order_step(adapter, tuned, BlockPlan(6), asked, make_batch(), adam, step=0)
    left = 1 - asked.zo_learning_rate * asked.weight_decay if optimizer == "descent" else 1.0  # what weight decay alone leaves
    other = "text_encoder_2.vector"
    torch.testing.assert_close(tuned.parameters[other].detach(), before.pop(other) * left, rtol=1e-6, atol=0)
    assert not torch.allclose(tuned.parameters["text_encoder.vector"], before["text_encoder.vector"] * left, rtol=1e-6)


def test_timesteps_keep_to_their_part() -> None:
    asked = recipe(steps=300, weighting_scheme="none")
    draws = draw_samples(asked, [(8, 8)], kind="instance", positions=(0.1, 0.5))
    indices = [draw.timestep_index for draw in draws]
    assert min(indices) >= 100 and max(indices) < 500 and max(indices) - min(indices) > 380
    plain = draw_samples(asked, [(8, 8)], kind="instance")
    assert draw_samples(asked, [(8, 8)], kind="instance", positions=(0.0, 1.0)) == plain


def test_zeroth_order_textual_inversion_personalizes_and_resumes(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    """Over packed weights, with a subspace found on the way; interrupted and resumed it gives the same bytes."""
    asked = recipe(**ZOODIP)
    record = personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / "whole")
    assert any(record.check.norms.values()) and record.check.image_change > 0
    path = tmp_path / "whole" / "token" / "learned_embeds.safetensors"
    assert path.stat().st_size < 2000
    assert {name: value.shape for name, value in load_file(path).items()} == {
        "text_encoder": (64,),
        "text_encoder_2": (64,),
    }
    assert inspect(path).kind == "token" and inspect(path).facts["token"] == "sks"

    def stop_at_three(event: Progress) -> None:
        if event.phase == "training" and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / "broken", on_progress=stop_at_three)
    personalize(toy_photos, model=tiny_folder, recipe=asked, out=tmp_path / "broken", resume=True)
    assert (tmp_path / "broken" / "token" / path.name).read_bytes() == path.read_bytes()


def test_backpropagated_word_of_a_unet_loads_in_stock_diffusers(
    tiny_pipelines: Callable[[str], ModelFolder], toy_photos: Path, tmp_path: Path
) -> None:
    model = tiny_pipelines("sd15")
    asked = recipe(learning_rate=0.1, weighting_scheme="none", precondition_outputs=False)
    record = personalize(toy_photos, model=model.path, recipe=asked, out=tmp_path / "run")
    path = tmp_path / "run" / "token" / "learned_embeds.safetensors"
    pipeline = model.pipeline(dtype=torch.float32, device=CPU)
    pipeline.load_textual_inversion(str(path), token="<toy>")
    number = pipeline.tokenizer.convert_tokens_to_ids("<toy>")
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[number], load_file(path)["text_encoder"])
    (image,) = generate(
        model.path, [PROMPT], lora=tmp_path / "run", seeds=[1000], steps=2, guidance=record.recipe.guidance_scale
    )
    (plain,) = generate(model.path, [PROMPT], seeds=[1000], steps=2, guidance=record.recipe.guidance_scale)
    assert image.tobytes() != plain.tobytes()
    with pytest.raises(FileFormatError, match="does not fit"):
        TokenMethod().apply(tiny_pipelines("sdxl").pipeline(dtype=torch.float32, device=CPU), _renamed(path, tmp_path), model)


def _renamed(path: Path, folder: Path) -> Path:
    from safetensors.torch import save_file

    other = folder / "other.safetensors"
    save_file({"text_encoder": torch.zeros(3)}, other, metadata={"token": "sks"})
    return other
