"""Laws of every transformer adapter: the decomposed forward is diffusers' own, and skipping is exact where it claims to be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from pocketune.errors import ModelError, PlanError, RecipeError
from pocketune.methods.lora import add_lora
from pocketune.models import load
from pocketune.models.base import DenoiserAdapter, Prompt, denoise
from pocketune.models.load import ModelFolder
from pocketune.models.published import PUBLISHED, published
from pocketune.models.registry import FAMILIES, family_of
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.recipe import Recipe
from pocketune.step import Batch, diffusion_loss, flow_matching_loss, predict, span_features
from tests.tiny_models import BUILDERS, TEXT_WIDTH

CPU = torch.device("cpu")
TRANSFORMERS = [name for name in BUILDERS if not name.startswith("sd")]
Pipelines = Callable[[str], ModelFolder]
every_transformer = pytest.mark.parametrize("name", TRANSFORMERS)


def make_batch(name: str, *, batch: int = 2, tokens: int = 12, height: int = 8, width: int = 12) -> Batch:
    """Random inputs; latents that are not square, so that no axis is taken for the other."""
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, tokens)
    mask[0, tokens // 2 :] = 0
    sigmas = torch.linspace(0.3, 0.8, batch)
    return Batch(
        latents=torch.randn(batch, 4, height, width, generator=g),
        noise=torch.randn(batch, 4, height, width, generator=g),
        timesteps=torch.tensor([873.0, 107.0])[:batch],
        sigmas=sigmas,
        alphas=(1 - sigmas**2).sqrt() if name == "pixart" else None,
        objective="epsilon" if name == "pixart" else "flow",
        prompt=Prompt(
            hidden=torch.randn(batch, tokens, TEXT_WIDTH, generator=g),
            pooled=torch.randn(batch, 64, generator=g) if name == "flux" else None,
            mask=None if name == "flux" else mask,
        ),
        loss_weights=torch.full((batch,), 1 / batch),
    )


def stock_forward(name: str, model: Any, latents: Tensor, timesteps: Tensor, prompt: Prompt) -> Tensor:
    """The model called as diffusers' pipeline calls it."""
    if name == "flux":
        batch, channels, height, width = latents.shape
        tokens = model(
            hidden_states=FluxPipeline._pack_latents(latents, batch, channels, height, width),
            timestep=timesteps / 1000,
            guidance=torch.full([batch], 3.5),
            pooled_projections=prompt.pooled,
            encoder_hidden_states=prompt.hidden,
            txt_ids=torch.zeros(prompt.hidden.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, CPU, torch.float32),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(tokens, height * 8, width * 8, 8)
    further = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if name == "pixart" else {}
    return model(
        latents,
        encoder_hidden_states=prompt.hidden,
        encoder_attention_mask=prompt.mask,
        timestep=timesteps,
        return_dict=False,
        **further,
    )[0]


def loss_of(output: Tensor, batch: Batch) -> Tensor:
    if batch.objective == "flow":
        return flow_matching_loss(output, batch, weighting_scheme="none", precondition_outputs=False)
    return diffusion_loss(output, batch)


def loaded(model: ModelFolder, blocks: tuple[int, ...] | None = None) -> DenoiserAdapter:
    return model.load_denoiser(dtype=torch.float32, device=CPU, blocks=blocks)


def tuned(adapter: DenoiserAdapter, plan: BlockPlan) -> dict[str, torch.nn.Parameter]:
    """LoRA on the kept blocks whose up-projections are not zero."""
    parameters = add_lora(adapter, blocks=plan.kept, rank=2, seed=7)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(parameters.items()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.05)
    return parameters


@every_transformer
@pytest.mark.parametrize(("height", "width"), [(8, 12), (8, 8)])
def test_equals_diffusers_bit_for_bit(tiny_pipelines: Pipelines, name: str, height: int, width: int) -> None:
    adapter = loaded(tiny_pipelines(name))
    batch = make_batch(name, height=height, width=width)
    with torch.no_grad():
        ours = denoise(adapter, batch.noisy, batch.timesteps, batch.prompt)
        theirs = stock_forward(name, adapter.model, batch.noisy, batch.timesteps, batch.prompt)
    assert torch.equal(ours, theirs)


@every_transformer
def test_prompt_and_timestep_matter(tiny_pipelines: Pipelines, name: str) -> None:
    adapter, batch = loaded(tiny_pipelines(name)), make_batch(name)
    hidden, pooled = batch.prompt.hidden + 1, None if batch.prompt.pooled is None else batch.prompt.pooled + 1
    other = Prompt(hidden=hidden, pooled=pooled, mask=batch.prompt.mask)
    with torch.no_grad():
        output = denoise(adapter, batch.noisy, batch.timesteps, batch.prompt)
        assert not torch.equal(output, denoise(adapter, batch.noisy, batch.timesteps, other))
        assert not torch.equal(output, denoise(adapter, batch.noisy, batch.timesteps - 50, batch.prompt))


@every_transformer
def test_padding_does_not(tiny_pipelines: Pipelines, name: str) -> None:
    batch = make_batch(name)
    if batch.prompt.mask is None:
        pytest.skip("takes no mask")
    adapter = loaded(tiny_pipelines(name))
    other = Prompt(hidden=batch.prompt.hidden + 9 * (1 - batch.prompt.mask)[..., None], mask=batch.prompt.mask)
    with torch.no_grad():
        output = denoise(adapter, batch.noisy, batch.timesteps, batch.prompt)
        assert torch.equal(output, denoise(adapter, batch.noisy, batch.timesteps, other))


@every_transformer
def test_loads_what_diffusers_loads(tiny_pipelines: Pipelines, name: str) -> None:
    model = tiny_pipelines(name)
    ours = loaded(model)
    theirs = model.family.denoiser.from_pretrained(model.path, subfolder="transformer").state_dict()
    assert family_of(ours.model) is model.family
    found = ours.model.state_dict()
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[key], theirs[key]) for key in theirs)
    assert all(any(key.startswith(ours.block_name(index) + ".") for key in theirs) for index in range(ours.block_count))
    assert ours.block_count == model.block_count


@every_transformer
def test_partial_load_holds_no_weights_of_other_blocks(tiny_pipelines: Pipelines, name: str) -> None:
    model = tiny_pipelines(name)
    whole, part = loaded(model), loaded(model, (2, 3))
    kept = {part.block_name(2), part.block_name(3)}
    names = {key for key, _ in part.model.named_parameters()}
    blocks = {whole.block_name(index) for index in range(whole.block_count)}
    present = {block for block in blocks if any(key.startswith(block + ".") for key in names)}
    assert present == kept
    batch = make_batch(name)
    with pytest.raises(PlanError, match="removed block"):
        denoise(part, batch.noisy, batch.timesteps, batch.prompt)


@every_transformer
@pytest.mark.parametrize("skip", ["0-1", "0-3"])
def test_skipped_prefix_is_exact(tiny_pipelines: Pipelines, name: str, skip: str) -> None:
    """Loss and every gradient, bit for bit in float32, without the skipped blocks' weights."""
    model = tiny_pipelines(name)
    plan, batch = parse_plan(skip, model.block_count), make_batch(name)
    full = loaded(model)
    full_parameters = tuned(full, plan)
    expected_loss = loss_of(predict(full, BlockPlan(model.block_count), batch), batch)
    expected = torch.autograd.grad(expected_loss, list(full_parameters.values()), allow_unused=True)

    batch = Batch(**{**vars(batch), "features": span_features(loaded(model), plan, batch)})
    part = loaded(model, plan.kept)
    parameters = tuned(part, plan)
    assert list(parameters) == list(full_parameters)
    loss = loss_of(predict(part, plan, batch), batch)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    assert loss.item() == expected_loss.item()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert sum(value is not None and bool(value.any()) for value in found) > len(found) // 2


@every_transformer
@pytest.mark.parametrize("skip", ["1-3", "4", "0,2-3", "0-1,4"])
def test_every_plan_is_exact_while_the_adapter_is_fresh(tiny_pipelines: Pipelines, name: str, skip: str) -> None:
    """Also across FLUX's border between double and single blocks (2 and 3); only the sum a + (b - a) rounds."""
    model = tiny_pipelines(name)
    adapter, batch = loaded(model), make_batch(name)
    plan = parse_plan(skip, model.block_count)
    with torch.no_grad():
        expected = denoise(adapter, batch.noisy, batch.timesteps, batch.prompt)
        features = span_features(adapter, plan, batch)
        found = predict(adapter, plan, Batch(**{**vars(batch), "features": features}))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        without = predict(adapter, plan, batch, use_residuals=False)
    assert (without - expected).abs().mean() > 10 * (found - expected).abs().mean()


@every_transformer
def test_default_targets_are_linears_of_the_blocks(tiny_pipelines: Pipelines, name: str) -> None:
    adapter = loaded(tiny_pipelines(name))
    modules = dict(adapter.model.named_modules())
    for target in adapter.default_lora_targets:
        assert isinstance(modules[f"{adapter.block_name(0)}.{target}"], torch.nn.Linear)


def test_every_architecture_is_tested() -> None:
    tested = {BUILDERS[name]().components.get("transformer").__class__.__name__ for name in TRANSFORMERS}
    assert tested | {"SD3Transformer2DModel"} >= {
        kind for kind, family in FAMILIES.items() if family.component == "transformer"
    }


def test_recipe_takes_the_architectures_defaults_unless_it_names_a_value() -> None:
    flux = FAMILIES["FluxTransformer2DModel"]
    assert flux.complete(Recipe.create(instance_prompt="a")).weighting_scheme == "none"
    assert flux.complete(Recipe.create(instance_prompt="a", weighting_scheme="logit_normal")).weighting_scheme == "logit_normal"
    assert flux.complete(Recipe.create(instance_prompt="a", precondition_outputs=True)).precondition_outputs
    sd3, recipe = FAMILIES["SD3Transformer2DModel"], Recipe.create(instance_prompt="a")
    assert sd3.complete(recipe) == recipe
    assert (sd3.guidance, flux.guidance) == (7.0, 3.5)


def test_gradients_that_float16_cannot_hold_are_refused_before_anything_starts() -> None:
    flux, sd3 = (FAMILIES[f"{name}Transformer2DModel"] for name in ("Flux", "SD3"))
    recipe = Recipe.create(instance_prompt="a", weighting_scheme="sigma_sqrt", dtype="float16")
    with pytest.raises(RecipeError, match="Set precondition_outputs to true"):
        flux.complete(recipe)
    sd3.complete(recipe)  # preconditioned by default
    flux.complete(recipe.changed(precondition_outputs=True))
    flux.complete(recipe.changed(dtype="bfloat16"))
    flux.complete(recipe.changed(gradient="zeroth_order"))  # which has no gradients


def test_flux_that_edits_images_is_refused(tiny_pipelines: Pipelines) -> None:
    from diffusers import FluxTransformer2DModel

    config = dict(tiny_pipelines("flux").denoiser_config) | {"in_channels": 32, "out_channels": 16}
    with pytest.raises(ModelError, match="edits a given image"):
        FAMILIES["FluxTransformer2DModel"].adapter(FluxTransformer2DModel.from_config(config))


@pytest.mark.parametrize(
    ("name", "blocks", "parameters"),
    [
        ("sd3-medium", 24, 2.03e9),  # the card says 2 billion
        ("sd35-medium", 24, 2.24e9),  # with its position table, a buffer of 0.23e9, the card's 2.5 billion
        ("flux1-dev", 57, 11.90e9),  # the card says 12 billion
        ("pixart-sigma-xl-1024", 28, 0.61e9),
        ("sana-1600m-1024", 20, 1.60e9),
        ("sana-600m-1024", 28, 0.59e9),
    ],
)
def test_published_configurations_have_the_published_sizes(name: str, blocks: int, parameters: float) -> None:
    adapter = published(name)
    assert all(value.is_meta for value in adapter.model.parameters())
    assert adapter.block_count == blocks == family_of(adapter.model).sizes(adapter.model.config).blocks
    assert sum(value.numel() for value in adapter.model.parameters()) == pytest.approx(parameters, rel=0.005)


def test_there_are_no_other_published_configurations() -> None:
    folder = Path(load.__file__).parent / "configs"
    assert {path.stem for path in folder.iterdir()} == set(PUBLISHED)
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in PUBLISHED)
    with pytest.raises(ModelError, match="flux1-dev"):
        published("flux9")


def test_models_that_take_further_inputs_are_refused(tiny_pipelines: Pipelines) -> None:
    for name, changes, reason in (
        ("pixart", {"use_additional_conditions": True}, "use PixArt-Sigma"),
        ("sana", {"guidance_embeds": True}, "SANA-Sprint"),
    ):
        model = tiny_pipelines(name)
        changed = model.family.denoiser.from_config(dict(model.denoiser_config) | changes)
        with pytest.raises(ModelError, match=f"(?i){reason}"):
            model.family.adapter(changed)
