"""Laws of the gradient estimators: what backpropagation leaves as it was, and what forward passes alone find."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pocketune.checkpoint import CheckpointFolder
from pocketune.errors import PlanError, RunError
from pocketune.gradients.zeroth_order import ZerothOrder
from pocketune.methods.base import Tuned
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.recipe import Recipe
from pocketune.step import Batch
from pocketune.train import descend, loss_of, new_optimizer, train_step, zeroth_order_step
from tests.laws.test_step import NO_SKIP, make_batch, tuned, with_features
from tests.tolerances import DIRECTIONAL_DERIVATIVE

RECIPE = Recipe.create(instance_prompt="a photo of sks toy", gradient="zeroth_order", zo_epsilon=1e-3)


def bits(parameters: dict[str, nn.Parameter]) -> dict[str, tuple[int, Tensor]]:
    """Where each parameter's numbers lie, and a copy of them."""
    return {name: (parameter.data_ptr(), parameter.detach().clone()) for name, parameter in parameters.items()}


def same_bits(parameters: dict[str, nn.Parameter], before: dict[str, tuple[int, Tensor]]) -> bool:
    return all(
        parameters[name].data_ptr() == address and torch.equal(parameters[name], values)
        for name, (address, values) in before.items()
    )


def case(model: ModelFolder, plan: BlockPlan) -> tuple[DenoiserAdapter, dict[str, nn.Parameter], Batch]:
    adapter, parameters = tuned(model, plan)
    batch = make_batch()
    if plan.skipped:
        batch = with_features(batch, model.load_denoiser(dtype=torch.float32, device=torch.device("cpu")), plan)
    return adapter, parameters, batch


def test_backpropagation_is_the_plain_step(tiny_model: ModelFolder) -> None:
    """The same bits as the lines of a training script."""
    found_adapter, found = tuned(tiny_model)
    train_step(found_adapter, found, NO_SKIP, RECIPE, make_batch(), new_optimizer(found, RECIPE))

    adapter, expected = tuned(tiny_model)
    optimizer = torch.optim.AdamW(expected.values(), lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay, fused=True)
    loss_of(adapter, NO_SKIP, RECIPE, make_batch()).backward()
    torch.nn.utils.clip_grad_norm_(expected.values(), RECIPE.max_grad_norm)
    optimizer.step()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(parameter.grad is None for parameter in found.values())


@pytest.mark.parametrize("plan", ["none", "0-1,5", "2-3"])
def test_slopes_are_directional_derivatives(tiny_model: ModelFolder, plan: str) -> None:
    """Each query's slope equals the exact gradient's product with the direction, over skipped blocks too."""
    adapter, parameters, batch = case(tiny_model, parse_plan(plan, 6))
    loss = lambda: loss_of(adapter, parse_plan(plan, 6), RECIPE, batch)  # noqa: E731
    estimator = ZerothOrder(adapter.model, seed=1, queries=2, epsilon=1e-3)
    estimate = estimator(loss, parameters, step=3)
    exact = loss()
    exact.backward()
    directions = [estimator.direction(parameters, step=3, query=query) for query in (0, 1)]
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    products = [sum(float((gradients[name] * direction(name)).sum()) for name in gradients) for direction in directions]
    norm = sum(float((gradient**2).sum()) for gradient in gradients.values()) ** 0.5
    for name in parameters:
        expected = sum(product * direction(name) for product, direction in zip(products, directions, strict=True)) / 2
        gradient = estimate.gradient(name)
        assert gradient is not None
        torch.testing.assert_close(gradient, expected, rtol=0, atol=DIRECTIONAL_DERIVATIVE * norm)
    assert estimate.loss == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("two_sided", [True, False])
def test_losses_are_those_of_moved_parameters(tiny_model: ModelFolder, two_sided: bool) -> None:
    """Bit for bit what the formula gives when the parameters themselves are moved."""
    adapter, parameters, batch = case(tiny_model, NO_SKIP)
    loss = lambda: loss_of(adapter, NO_SKIP, RECIPE, batch)  # noqa: E731
    estimator = ZerothOrder(adapter.model, seed=1, epsilon=0.5, two_sided=two_sided)
    estimate = estimator(loss, parameters, step=2)
    direction = estimator.direction(parameters, step=2, query=0)
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def moved(scale: float) -> float:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(originals[name].add(direction(name), alpha=scale))
            return loss().item()

    slope = (moved(0.5) - moved(-0.5)) / 1.0 if two_sided else (moved(0.5) - moved(0.0)) / 0.5
    for name in parameters:
        assert torch.equal(estimate.gradient(name), torch.zeros_like(parameters[name]).add(direction(name), alpha=slope))


def test_the_restore_is_exact_and_nothing_is_kept(tiny_model: ModelFolder) -> None:
    """Adding and subtracting would change the last bits; here every tensor is the very one it was, even after a failure."""
    adapter, parameters, batch = case(tiny_model, NO_SKIP)
    before, random_state = bits(parameters), torch.get_rng_state()
    estimator = ZerothOrder(adapter.model, seed=1, queries=2, epsilon=0.1)
    estimator(lambda: loss_of(adapter, NO_SKIP, RECIPE, batch), parameters, step=0)
    assert same_bits(parameters, before)

    handle = adapter.model.proj_out.register_forward_pre_hook(_fail)
    with pytest.raises(InterruptedError):
        estimator(lambda: loss_of(adapter, NO_SKIP, RECIPE, batch), parameters, step=0)
    handle.remove()
    assert same_bits(parameters, before)
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in adapter.model.modules())


def test_one_perturbed_tensor_exists_at_a_time(tiny_model: ModelFolder) -> None:
    """While a layer runs, all trained layers but it hold their own numbers."""
    adapter, parameters, batch = case(tiny_model, NO_SKIP)
    before = bits(parameters)
    moved: list[int] = []

    def count(module: nn.Module, _: object, __: object) -> None:
        if module in owners:
            moved.append(sum(parameters[name].data_ptr() != before[name][0] for name in before))

    owners = [m for m in adapter.model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    handles = [module.register_forward_hook(count) for module in owners]
    ZerothOrder(adapter.model, seed=1)(lambda: loss_of(adapter, NO_SKIP, RECIPE, batch), parameters, step=0)
    for handle in handles:
        handle.remove()
    assert set(moved) == {1}


def test_no_graph_is_kept(tiny_model: ModelFolder) -> None:
    adapter, parameters, batch = case(tiny_model, NO_SKIP)
    losses: list[Tensor] = []

    def loss() -> Tensor:
        losses.append(loss_of(adapter, NO_SKIP, RECIPE, batch))
        return losses[-1]

    estimate = ZerothOrder(adapter.model, seed=1, queries=3, two_sided=False)(loss, parameters, step=0)
    assert len(losses) == 4
    assert not any(value.requires_grad for value in losses)
    assert all(parameter.grad is None for parameter in parameters.values())
    assert all(estimate.gradient(name).grad_fn is None for name in parameters)


def test_the_mean_of_many_directions_is_the_gradient() -> None:
    """On a linear layer of twelve parameters."""
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    loss: Callable[[], Tensor] = lambda: (layer(torch.tensor([[1.0, -2.0, 0.5]])) ** 2).sum()  # noqa: E731
    parameters = dict(layer.named_parameters())
    estimate = ZerothOrder(layer, seed=0, queries=4000, epsilon=1e-2)(loss, parameters, step=0)
    loss().backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    found = torch.cat([estimate.gradient(name).flatten() for name in parameters])
    assert torch.cosine_similarity(found, exact, dim=0) > 0.995
    assert 0.9 < found.norm() / exact.norm() < 1.1


def test_unused_parameters_get_no_gradient_and_do_not_move() -> None:
    layers = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    parameters = dict(layers.named_parameters())
    before = bits(parameters)
    estimator = ZerothOrder(layers, seed=0)
    estimate = estimator(lambda: layers["used"](torch.ones(1, 2)).sum(), parameters, step=0)
    descend(parameters, estimate, learning_rate=0.1, weight_decay=0.1)
    assert estimate.gradient("idle.weight") is None
    assert torch.equal(parameters["idle.weight"], before["idle.weight"][1])
    assert not torch.equal(parameters["used.weight"], before["used.weight"][1])
    with pytest.raises(PlanError, match="none of the trained parameters"):
        estimator(lambda: torch.tensor(1.0), parameters, step=0)


def test_a_loss_along_a_direction_that_is_no_number_moves_nothing() -> None:
    """One-sided, the loss of the step is that of the parameters as they are, and finite."""
    layer = nn.Linear(2, 2)
    parameters = dict(layer.named_parameters())
    losses = iter((0.5, torch.inf))
    before = bits(parameters)
    estimator = ZerothOrder(layer, seed=0, two_sided=False)
    with pytest.raises(RunError, match=r"became \[0.5, inf\] at step 4"):
        estimator(lambda: layer(torch.ones(1, 2)).sum() * 0 + next(losses), parameters, step=3)
    assert same_bits(parameters, before)


def test_small_steps_descend(tiny_model: ModelFolder) -> None:
    adapter, parameters, batch = case(tiny_model, NO_SKIP)
    recipe = RECIPE.model_copy(update={"zo_learning_rate": 1e-4, "zo_queries": 4})
    tuned_lora = Tuned(parameters=parameters, owner=adapter.model)
    optimizer = new_optimizer(parameters, recipe)
    losses = [zeroth_order_step(adapter, tuned_lora, NO_SKIP, recipe, batch, optimizer, step=step) for step in range(20)]
    assert losses[-1] < losses[0]


def test_update_counts_survive_a_checkpoint(tmp_path: Path) -> None:
    """A parameter that some steps do not update keeps its own count of updates, on which AdamW's corrections depend."""
    often, seldom = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    parameters = {"often": often, "seldom": seldom}
    optimizer = new_optimizer(parameters, RECIPE)

    def step(names: tuple[str, ...]) -> None:
        for name in names:
            parameters[name].grad = torch.tensor([0.3, -2.0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(("often", "seldom"))
    step(("often",))
    folder = CheckpointFolder(tmp_path, fingerprint="x")
    folder.save(parameters, optimizer, step=2, losses=(1.0, 1.0))
    step(("often", "seldom"))
    expected = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    optimizer = new_optimizer(parameters, RECIPE)
    assert folder.restore(parameters, optimizer).step == 2
    step(("often", "seldom"))
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def _fail(*_: object) -> None:
    raise InterruptedError
