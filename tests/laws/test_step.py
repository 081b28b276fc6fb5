"""Laws of the training step: equal to diffusers' script, and exact where it claims to be."""

from collections.abc import Sequence

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor, nn

from pocketune.errors import PlanError
from pocketune.methods.lora import add_lora
from pocketune.models.base import DenoiserAdapter, Prompt, denoise
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.step import Batch, flow_matching_loss, predict, span_features
from tests.tolerances import SCRIPT_GRADIENT, SCRIPT_LOSS

CPU = torch.device("cpu")
NO_SKIP = BlockPlan(6)


def make_batch(weights: Sequence[float] = (0.5, 0.5)) -> Batch:
    g = torch.Generator().manual_seed(2)
    n = len(weights)
    sigmas = torch.linspace(0.2, 0.8, n)
    return Batch(
        latents=torch.randn(n, 4, 8, 8, generator=g),
        noise=torch.randn(n, 4, 8, 8, generator=g),
        timesteps=1000 * sigmas,
        sigmas=sigmas,
        prompt=Prompt(hidden=torch.randn(n, 20, 128, generator=g), pooled=torch.randn(n, 128, generator=g)),
        loss_weights=torch.tensor(weights),
    )


def with_features(batch: Batch, adapter: DenoiserAdapter, plan: BlockPlan) -> Batch:
    return Batch(**{**vars(batch), "features": span_features(adapter, plan, batch)})


def tuned(
    model: ModelFolder, plan: BlockPlan = NO_SKIP, *, up_scale: float = 0.05
) -> tuple[DenoiserAdapter, dict[str, nn.Parameter]]:
    """A model whose LoRA is no longer fresh, so that its input gradients are not zero."""
    adapter = model.load_denoiser(dtype=torch.float32, device=CPU)
    parameters = add_lora(adapter, blocks=plan.kept, rank=4, seed=7)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(parameters.items()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * up_scale)
    return adapter, parameters


def gradients(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    values = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, values, strict=True))


def test_fresh_lora_changes_nothing(tiny_model: ModelFolder) -> None:
    batch = make_batch()
    plain = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    with torch.no_grad():
        expected = denoise(plain, batch.noisy, batch.timesteps, batch.prompt)
        add_lora(plain, blocks=range(6), rank=4)
        assert torch.equal(predict(plain, NO_SKIP, batch), expected)


@pytest.mark.parametrize("precondition", [True, False])
@pytest.mark.parametrize("prior_weight", [1.0, 0.7])
@pytest.mark.parametrize("scheme", ["logit_normal", "sigma_sqrt", "cosmap"])
def test_loss_and_gradients_equal_the_script(
    tiny_model: ModelFolder, precondition: bool, scheme: str, prior_weight: float
) -> None:
    """The lines of diffusers' train_dreambooth_lora_sd3.py with prior preservation, run by hand."""
    adapter, parameters = tuned(tiny_model)
    batch = make_batch((1 / 2, 1 / 2, prior_weight / 2, prior_weight / 2))
    ours = flow_matching_loss(
        predict(adapter, NO_SKIP, batch), batch, weighting_scheme=scheme, precondition_outputs=precondition
    )

    sigmas = batch.sigmas.view(-1, 1, 1, 1)
    noisy_model_input = (1.0 - sigmas) * batch.latents + sigmas * batch.noise
    model_pred = adapter.model(
        hidden_states=noisy_model_input,
        timestep=batch.timesteps,
        encoder_hidden_states=batch.prompt.hidden,
        pooled_projections=batch.prompt.pooled,
        return_dict=False,
    )[0]
    if precondition:
        model_pred = model_pred * (-sigmas) + noisy_model_input
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    target = batch.latents if precondition else batch.noise - batch.latents
    model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
    target, target_prior = torch.chunk(target, 2, dim=0)
    weighting, weighting_prior = torch.chunk(weighting, 2, dim=0)
    prior = torch.mean(
        (weighting_prior.float() * (model_pred_prior.float() - target_prior.float()) ** 2).reshape(2, -1), 1
    ).mean()
    loss = torch.mean((weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(2, -1), 1).mean()
    loss = loss + prior_weight * prior

    assert ours.item() == pytest.approx(loss.item(), rel=SCRIPT_LOSS)
    expected, found = gradients(loss, parameters), gradients(ours, parameters)
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=SCRIPT_GRADIENT * expected[name].abs().max().item()
        )


def test_empty_plan_has_the_plain_gradients(tiny_model: ModelFolder) -> None:
    adapter, parameters = tuned(tiny_model)
    batch = make_batch()
    plain = flow_matching_loss(denoise(adapter, batch.noisy, batch.timesteps, batch.prompt), batch)
    planned = flow_matching_loss(predict(adapter, parse_plan("none", 6), batch), batch)
    expected, found = gradients(plain, parameters), gradients(planned, parameters)
    assert plain.item() == planned.item()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(found[name].abs().max() > 0 for name in found if "add_" not in name or ".5." not in name)


def test_skipped_prefix_is_exact(tiny_model: ModelFolder) -> None:
    """Output and every gradient of the kept blocks, bit for bit in float32, without the skipped blocks' weights."""
    plan = parse_plan("0-2", 6)
    full, full_parameters = tuned(tiny_model, plan)
    batch = make_batch()
    expected_loss = flow_matching_loss(predict(full, NO_SKIP, batch), batch)
    expected = gradients(expected_loss, full_parameters)

    frozen = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    batch = with_features(batch, frozen, plan)
    partial = tiny_model.load_denoiser(dtype=torch.float32, device=CPU, blocks=plan.kept)
    parameters = add_lora(partial, blocks=plan.kept, rank=4, seed=7)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(full_parameters[name])
    loss = flow_matching_loss(predict(partial, plan, batch), batch)
    found = gradients(loss, parameters)
    assert loss.item() == expected_loss.item()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_plan_is_exact_while_the_adapter_is_fresh(tiny_model: ModelFolder) -> None:
    """With nothing learned yet, residuals are those of the very model; only the sum a + (b - a) rounds."""
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    batch = make_batch()
    with torch.no_grad():
        expected = denoise(adapter, batch.noisy, batch.timesteps, batch.prompt)
        for text in ("0-1", "4-5", "5", "0,2,4", "0-1,5", "1-3"):
            plan = parse_plan(text, 6)
            found = predict(adapter, plan, with_features(batch, adapter, plan))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_residuals_matter(tiny_model: ModelFolder) -> None:
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    plan = parse_plan("2-3", 6)
    batch = make_batch()
    with torch.no_grad():
        expected = denoise(adapter, batch.noisy, batch.timesteps, batch.prompt)
        without = predict(adapter, plan, batch, use_residuals=False)
        with_residuals = predict(adapter, plan, with_features(batch, adapter, plan))
    assert (without - expected).abs().mean() > 10 * (with_residuals - expected).abs().mean()


def test_missing_features_are_refused(tiny_model: ModelFolder) -> None:
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    with pytest.raises(PlanError, match="blocks 2-3"):
        predict(adapter, parse_plan("2-3", 6), make_batch())
