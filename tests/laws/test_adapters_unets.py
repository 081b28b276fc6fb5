"""Laws of the U-Net adapter: its forward is diffusers' own, and a hollowed U-Net is the intact one while the LoRA is fresh."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from pocketune.delta import save_lora
from pocketune.errors import ModelError, PlanError
from pocketune.features.precompute import feature_shape
from pocketune.methods.lora import add_lora
from pocketune.models.base import DenoiserAdapter, Prompt, denoise
from pocketune.models.load import ModelFolder
from pocketune.models.published import published
from pocketune.models.registry import family_of
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.plan.skipping import plan_for
from pocketune.sampling.batches import BatchMaker, Posterior, encode_crops
from pocketune.sampling.draws import Crop, Draw
from pocketune.step import Batch, Objective, diffusion_loss, predict, span_features
from tests.tiny_models import with_values

CPU = torch.device("cpu")
Pipelines = Callable[[str], ModelFolder]
every_unet = pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
ALL_PLANS = ("4", "3-5", "2-6", "1-8", "3-6", "4-5")


def make_batch(name: str, objective: Objective = "epsilon", height: int = 8) -> Batch:
    g = torch.Generator().manual_seed(1)
    sigmas = torch.tensor([0.3, 0.8])
    sdxl = name == "sdxl"
    return Batch(
        latents=torch.randn(2, 4, height, 12, generator=g),
        noise=torch.randn(2, 4, height, 12, generator=g),
        timesteps=torch.tensor([873, 107]),
        sigmas=sigmas,
        alphas=(1 - sigmas**2).sqrt(),
        objective=objective,
        prompt=Prompt(
            hidden=torch.randn(2, 20, 128 if sdxl else 64, generator=g),
            pooled=torch.randn(2, 64, generator=g) if sdxl else None,
            sizes=torch.tensor([[96.0, 128, 0, 8, 64, 64], [80, 120, 4, 0, 64, 64]]) if sdxl else None,
        ),
        loss_weights=torch.tensor([0.5, 0.5]),
    )


def with_features(batch: Batch, adapter: DenoiserAdapter, plan: BlockPlan) -> Batch:
    return Batch(**{**vars(batch), "features": span_features(adapter, plan, batch)})


def loaded(model: ModelFolder, blocks: tuple[int, ...] | None = None) -> DenoiserAdapter:
    return model.load_denoiser(dtype=torch.float32, device=CPU, blocks=blocks)


def stock_forward(model: UNet2DConditionModel, latents: Tensor, batch: Batch) -> Tensor:
    prompt = batch.prompt
    return model(
        latents,
        batch.timesteps,
        encoder_hidden_states=prompt.hidden,
        added_cond_kwargs={"text_embeds": prompt.pooled, "time_ids": prompt.sizes},
        return_dict=False,
    )[0]


@every_unet
@pytest.mark.parametrize("height", [8, 16])
def test_equals_diffusers_bit_for_bit(tiny_pipelines: Pipelines, name: str, height: int) -> None:
    adapter, batch = loaded(tiny_pipelines(name)), make_batch(name, height=height)
    with torch.no_grad():
        ours = denoise(adapter, batch.noisy, batch.timesteps, batch.prompt)
        assert torch.equal(ours, stock_forward(adapter.model, batch.noisy, batch))


def test_sizes_matter_to_sdxl(tiny_pipelines: Pipelines) -> None:
    adapter, batch = loaded(tiny_pipelines("sdxl")), make_batch("sdxl")
    other = Prompt(batch.prompt.hidden, batch.prompt.pooled, sizes=batch.prompt.sizes + 100)
    with torch.no_grad():
        output = denoise(adapter, batch.noisy, batch.timesteps, batch.prompt)
        assert not torch.equal(output, denoise(adapter, batch.noisy, batch.timesteps, other))


@every_unet
def test_streams_are_as_many_as_said(tiny_pipelines: Pipelines, name: str) -> None:
    adapter, batch = loaded(tiny_pipelines(name)), make_batch(name)
    with torch.no_grad():
        context = adapter.context(batch.noisy, batch.timesteps, batch.prompt)
        streams = adapter.embed(batch.noisy, batch.prompt)
        for index in range(adapter.block_count):
            assert len(streams) == adapter.stream_count(index)
            streams = adapter.block(index, streams, context)
    assert len(streams) == adapter.stream_count(adapter.block_count) == 1


@every_unet
def test_loads_what_diffusers_loads(tiny_pipelines: Pipelines, name: str) -> None:
    model = tiny_pipelines(name)
    adapter = loaded(model)
    theirs = UNet2DConditionModel.from_pretrained(model.path, subfolder="unet").state_dict()
    found = adapter.model.state_dict()
    assert family_of(adapter.model) is model.family
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[key], theirs[key]) for key in theirs)
    assert all(any(key.startswith(adapter.block_name(index) + ".") for key in theirs) for index in range(adapter.block_count))
    assert adapter.block_count == model.block_count


@every_unet
def test_hollowed_model_holds_no_weights_of_the_middle(tiny_pipelines: Pipelines, name: str) -> None:
    model = tiny_pipelines(name)
    plan = parse_plan("2-6", model.block_count)
    part, batch = loaded(model, plan.kept), make_batch(name)
    names = {key for key, _ in part.model.named_parameters()}
    gone = ("down_blocks.1.", "mid_block.", "up_blocks.0.resnets.0.", "up_blocks.0.resnets.1.", "up_blocks.0.attentions.0.")
    kept = ("down_blocks.0.resnets.1.", "down_blocks.0.downsamplers.", "up_blocks.0.resnets.2.", "up_blocks.0.upsamplers.")
    assert not [key for key in names if key.startswith(gone)]
    assert all(any(key.startswith(start) for key in names) for start in kept)
    with pytest.raises(PlanError, match="removed block"):
        denoise(part, batch.noisy, batch.timesteps, batch.prompt)


@every_unet
@pytest.mark.parametrize("skip", ALL_PLANS)
def test_hollowed_forward_is_exact_while_the_adapter_is_fresh(tiny_pipelines: Pipelines, name: str, skip: str) -> None:
    """Bit for bit: the middle's activation is cached as it is, not as a difference."""
    model, batch = tiny_pipelines(name), make_batch(name)
    plan = parse_plan(skip, model.block_count)
    whole = loaded(model)
    with torch.no_grad():
        expected = denoise(whole, batch.noisy, batch.timesteps, batch.prompt)
        found = predict(loaded(model, plan.kept), plan, with_features(batch, whole, plan))
    assert torch.equal(found, expected)


@every_unet
def test_hollowed_gradients_are_those_of_a_constant_middle(tiny_pipelines: Pipelines, name: str) -> None:
    """Encoder layers learn through the skip connections: gradients equal the full model's with the middle's output detached."""
    model, batch = tiny_pipelines(name), make_batch(name)
    plan = parse_plan("2-6", model.block_count)
    part = loaded(model, plan.kept)
    parameters = add_lora(part, blocks=plan.kept, rank=2, seed=7)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    found = torch.autograd.grad(
        diffusion_loss(predict(part, plan, with_features(batch, loaded(model), plan)), batch), list(parameters.values())
    )

    cached = span_features(loaded(model), plan, batch)[plan.skipped_spans[0]][0]
    whole = loaded(model)
    full = add_lora(whole, blocks=plan.kept, rank=2, seed=7)
    with torch.no_grad():
        for key, parameter in full.items():
            parameter.copy_(parameters[key])
    # the last module of block 6: diffusers' own forward with its output replaced
    stage = whole.model.up_blocks[0]
    last = stage.attentions[1] if hasattr(stage, "attentions") else stage.resnets[1]
    last.register_forward_hook(lambda *call: (cached,) if isinstance(call[-1], tuple) else cached)
    loss = diffusion_loss(stock_forward(whole.model, batch.noisy, batch), batch)
    expected = torch.autograd.grad(loss, list(full.values()))
    assert list(full) == list(parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    encoder = [value for key, value in zip(full, found, strict=True) if key.startswith("down_blocks")]
    assert all(bool(value.any()) for value in encoder)
    assert bool(encoder) == (name != "sdxl")  # the tiny SDXL has no attention in its first stage


@every_unet
def test_lora_of_the_hollowed_model_goes_back_into_the_intact_one(tiny_pipelines: Pipelines, tmp_path: Path, name: str) -> None:
    """The file, loaded by stock diffusers, makes the intact U-Net compute what the adapter computes with the same LoRA."""
    model, batch = tiny_pipelines(name), make_batch(name)
    plan = plan_for(model.empty_denoiser(), "hollow:0.5")
    part, whole = loaded(model, plan.kept), loaded(model)
    trained, same = (add_lora(adapter, blocks=plan.kept, rank=2, seed=7) for adapter in (part, whole))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in sorted(trained.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
            same[key].copy_(parameter)
    save_lora(part, tmp_path)
    pipeline = model.family.pipeline.from_pretrained(model.path)
    with torch.no_grad():
        plain = stock_forward(pipeline.unet, batch.noisy, batch)
        pipeline.load_lora_weights(tmp_path)
        found = stock_forward(pipeline.unet, batch.noisy, batch)
        assert torch.equal(found, denoise(whole, batch.noisy, batch.timesteps, batch.prompt))
    assert not torch.allclose(found, plain, atol=1e-3)


@every_unet
def test_hollowing_nothing_changes_nothing(tiny_pipelines: Pipelines, name: str) -> None:
    model, batch = tiny_pipelines(name), make_batch(name)
    adapter = loaded(model)
    with torch.no_grad():
        found = predict(adapter, plan_for(adapter, "hollow:0"), batch)
        assert torch.equal(found, denoise(adapter, batch.noisy, batch.timesteps, batch.prompt))


def test_loss_equals_the_script(tiny_pipelines: Pipelines) -> None:
    """The lines of diffusers' train_dreambooth_lora.py with prior preservation, run by hand."""
    scheduler = DDPMScheduler()
    g = torch.Generator().manual_seed(1)
    latents, noise, model_pred = (torch.randn(4, 4, 8, 8, generator=g) for _ in range(3))
    timesteps = torch.tensor([3, 500, 870, 999])
    for prediction in ("epsilon", "v_prediction"):
        alphas = scheduler.alphas_cumprod[timesteps]
        batch = Batch(
            latents=latents,
            noise=noise,
            timesteps=timesteps,
            sigmas=(1 - alphas) ** 0.5,
            alphas=alphas**0.5,
            objective=prediction,
            prompt=Prompt(hidden=latents),
            loss_weights=torch.tensor([1 / 2, 1 / 2, 0.7 / 2, 0.7 / 2]),
        )
        assert torch.equal(batch.noisy, scheduler.add_noise(latents, noise, timesteps))
        target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        pred, pred_prior = model_pred.chunk(2)
        target, target_prior = target.chunk(2)
        expected = torch.nn.functional.mse_loss(pred, target) + 0.7 * torch.nn.functional.mse_loss(pred_prior, target_prior)
        variance = torch.randn(4, 4, 8, 8, generator=g)
        for output in (model_pred, torch.cat((model_pred, variance), 1)):
            torch.testing.assert_close(diffusion_loss(output, batch), expected, rtol=1e-6, atol=0)


def test_batches_hold_the_schedule_and_the_sizes_of_photo_and_crop(tiny_pipelines: Pipelines, toy_photos: Path) -> None:
    from PIL import Image

    model = tiny_pipelines("sd2")
    image = Image.open(toy_photos / "1.jpg")
    draw = Draw(index=0, kind="instance", image=0, crop=Crop(left=16, top=0, side=96), timestep_index=400, noise_seed=5)
    posteriors = encode_crops(model.load_vae(device=CPU), {"instance": [image]}, [draw], resolution=64, on_crop=lambda *_: None)
    (posterior,) = posteriors.values()
    assert isinstance(posterior, Posterior)
    assert posterior.sizes.tolist() == [[96, 128, 0, 11, 64, 64]]
    prompt, scheduler = Prompt(hidden=torch.zeros(1, 20, 64)), model.scheduler()
    settings = {"prior_loss_weight": 1.0, "device": CPU, "dtype": torch.float32}
    batch = BatchMaker(posteriors, {"instance": prompt}, scheduler, with_sizes=True, **settings)([draw, draw])
    assert batch.objective == "v_prediction" and batch.timesteps.tolist() == [599, 599]
    assert torch.equal(batch.noisy, scheduler.add_noise(batch.latents, batch.noise, batch.timesteps))
    assert batch.prompt.sizes.tolist() == posterior.sizes.tolist() * 2
    assert BatchMaker(posteriors, {"instance": prompt}, scheduler, **settings)([draw]).prompt.sizes is None


@every_unet
def test_shape_of_cached_features_is_said_beforehand(tiny_pipelines: Pipelines, name: str) -> None:
    model = tiny_pipelines(name)
    adapter = loaded(model)
    batch = Batch(**{**vars(make_batch(name)), "latents": torch.zeros(2, 4, 8, 8), "noise": torch.zeros(2, 4, 8, 8)})
    for skip in ALL_PLANS:
        plan = parse_plan(skip, model.block_count)
        features = span_features(adapter, plan, batch)
        (streams,) = features.values()
        assert [feature_shape(model, plan, side=8)] == [stream[:1].shape for stream in streams]


def test_a_share_is_the_nearest_run_around_the_middle(tiny_pipelines: Pipelines) -> None:
    adapter = tiny_pipelines("sd15").empty_denoiser()
    shares = {"0": "none", "0.1": "4", "0.3": "3-5", "0.5": "2-6", "0.99": "1-8"}
    assert {share: plan_for(adapter, f"hollow:{share}").describe() for share in shares} == shares
    assert plan_for(adapter, "auto") == plan_for(adapter, "hollow:0.5")
    assert plan_for(tiny_pipelines("flux").empty_denoiser(), "hollow:0.5").describe() == "1-3"


@pytest.mark.parametrize(("changes", "reason"), [({"in_channels": 9}, "in_channels"), ({"mid_block_type": None}, "mid_block")])
def test_other_unets_are_refused(tiny_pipelines: Pipelines, changes: dict[str, object], reason: str) -> None:
    model = tiny_pipelines("sd15")
    unet = UNet2DConditionModel.from_config(dict(model.denoiser_config) | changes)
    with pytest.raises(ModelError, match=reason):
        model.family.adapter(unet)


def test_the_refiner_of_sdxl_is_refused_when_it_is_opened(tiny_pipelines: Pipelines, tmp_path: Path) -> None:
    """One text encoder, and in the place of the target's height and width an aesthetic score."""
    changes = {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 64 + 5 * 8}
    folder = with_values(tiny_pipelines("sdxl").path, tmp_path / "refiner", "unet/config.json", changes)
    with pytest.raises(ModelError, match="this is the refiner"):
        ModelFolder("refiner", folder)


@pytest.mark.parametrize(
    ("name", "blocks", "middle", "parameters"),
    [("sd15", 21, 8, 859_520_964), ("sd21", 21, 8, 865_910_724), ("sdxl", 16, 6, 2_567_463_684)],
)
def test_published_configurations_have_the_published_sizes(name: str, blocks: int, middle: int, parameters: int) -> None:
    adapter = published(name)
    assert (adapter.block_count, adapter.middle()) == (blocks, middle)
    assert sum(value.numel() for value in adapter.model.parameters()) == parameters
