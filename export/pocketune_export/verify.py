"""Verify a bundle: the same steps with eager PyTorch and on the edge runtime, compared by name.

The frozen weights of the PyTorch model are first rounded as the bundle stores them, so that int8 and int4 meet the same bar. Of
steps of zeroth order, whose gradients follow from losses, losses and parameters are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from pocketune.errors import FileFormatError
from pocketune.methods.base import Tuned
from pocketune.methods.scales import quantization_of
from pocketune.models.base import DenoiserAdapter
from pocketune.models.fingerprint import training_fingerprint
from pocketune.models.load import ModelFolder, open_model
from pocketune.plan.blocks import BlockPlan, Span
from pocketune.recipe import Recipe
from pocketune.step import Batch
from pocketune.train import new_optimizer, train_step, zeroth_order_step
from pocketune.tuning import METHODS
from pocketune_edge.bundle import Bundle
from pocketune_edge.delta import Adapter, by_name
from pocketune_edge.manifest import Manifest, TensorSpec
from pocketune_edge.session import Sessions
from pocketune_edge.settings import settings_of
from pocketune_edge.state import fresh_state
from pocketune_edge.steps import Mode, Stepper, stepper_of
from pocketune_export.quantize import Storage, stored_value
from pocketune_export.step_inputs import prompt_of
from pocketune_export.training import optimizer_inputs
from pocketune_export.weights import plain_name

TOLERANCE = 1e-5
"""Largest allowed difference: of the loss, relative; of a parameter, absolute.

AdamW makes steps of about the learning rate out of gradients of any size, and so a tenth of a step out of the last digits of
those that are nearly zero: above a learning rate of 1e-4 parameters may differ by a tenth of it. Of the two rates of scales
the larger one counts. Plain descent of zeroth order makes far smaller steps: there parameters may differ by a hundredth of
the way that they went.
"""
GRADIENT_TOLERANCE = 1e-4
"""Largest allowed difference of a gradient, relative to the largest of all; a dozen blocks round to some 1e-5."""


@dataclass(frozen=True)
class Verification:
    """Largest differences over all steps.

    Attributes:
        mode: how the bundle was run.
        steps: how many.
        loss: of the loss; infinite, as the others, where one side gave no number.
        gradients: of each parameter's gradient, by name; empty for steps of zeroth order.
        parameters: of each parameter, by name.
        parameter_tolerance: largest allowed difference of a parameter.
    """

    mode: Mode
    steps: int
    loss: float
    gradients: Mapping[str, float]
    parameters: Mapping[str, float]
    parameter_tolerance: float = TOLERANCE

    @property
    def worst_gradient(self) -> str | None:
        """The name with the largest difference; None where there are no gradients."""
        return max(self.gradients, key=self.gradients.__getitem__, default=None)

    @property
    def worst_parameter(self) -> str:
        """The name with the largest difference."""
        return max(self.parameters, key=self.parameters.__getitem__)

    @property
    def passed(self) -> bool:
        """Whether every difference is within its tolerance."""
        gradients_pass = all(worst <= GRADIENT_TOLERANCE for worst in self.gradients.values())
        parameters_pass = all(worst <= self.parameter_tolerance for worst in self.parameters.values())
        return self.loss <= TOLERANCE and gradients_pass and parameters_pass


def verify(
    bundle: Bundle,
    *,
    model: str | Path | None = None,
    steps: int = 20,
    mode: Mode = "one graph",
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> Verification:
    """Train a few steps on random inputs, eagerly and with the bundle.

    Args:
        bundle: checked.
        model: what was exported; default: the bundle's model name.
        steps: of AdamW.
        mode: which graphs are run.
        seed: of the inputs.
        on_step: called with (done, total).

    Raises:
        FileFormatError: the model is not the one that was exported.
        ModelError: there is no such model.
        RunError: PyTorch's own training came to what is no number.
    """
    manifest = bundle.manifest
    folder = open_model(model or manifest.model.name)
    if training_fingerprint(folder) != manifest.model.sha256:
        msg = (
            f"{folder.name} is not the model that was exported ({manifest.model.name}). Give the right one with --model, or "
            "export again."
        )
        raise FileFormatError(msg)
    recipe = Recipe.create(**Recipe.relevant(manifest.recipe))
    skipped = [index for span in manifest.plan.spans if span.skipped for index in range(span.start, span.stop)]
    plan = BlockPlan(manifest.model.block_count, tuple(skipped))
    adapter, tuned = eager_model(bundle, folder, plan, recipe)
    parameters = tuned.parameters
    names = [parameter.name for parameter in manifest.tuned.parameters if parameter.offset is not None]
    gradients: dict[str, Tensor] = {}
    for name in names:
        _keep_gradient(parameters[name], name, gradients)
    optimizer = new_optimizer(parameters, recipe)
    take_step = open_steps(bundle, mode)
    start = torch.cat([parameters[name].detach().reshape(-1) for name in names]).numpy()
    state = fresh_state(Adapter(start, {}), intervals=manifest.tuned.intervals)
    worst = _Worst()
    for number in range(1, steps + 1):
        batch = random_batch(manifest, seed=seed + number)
        if recipe.gradient == "zeroth_order":
            loss = zeroth_order_step(adapter, tuned, plan, recipe, as_batch(manifest, batch), optimizer, step=number - 1)
        else:
            gradients.clear()
            given = as_batch(manifest, batch)
            loss = train_step(adapter, parameters, plan, recipe, given, optimizer, inputs=tuned.inputs)
        result = take_step(state, [{name: tensor.numpy() for name, tensor in batch.items()}])
        state = result.state
        worst.loss = max(worst.loss, _share(loss - state.losses[-1], loss))
        largest = max((float(gradient.abs().max()) for gradient in gradients.values()), default=0.0)
        found = by_name(manifest.tuned, state.parameters)
        found_gradients = by_name(manifest.tuned, result.gradients)
        for name in names:
            if name in gradients:  # of scales, those of the step's intervals alone have one
                difference = _largest_difference(gradients[name], found_gradients[name])
                worst.see(worst.gradients, name, _share(difference, largest))
            worst.see(worst.parameters, name, _share(_largest_difference(parameters[name], found[name]), 1.0))
        on_step(number, steps)
    if manifest.optimizer.kind == "descent":
        tolerance = (
            float(np.abs(torch.cat([parameters[name].detach().reshape(-1) for name in names]).numpy() - start).max()) / 100
        )
    else:
        tolerance = max(TOLERANCE, max(manifest.optimizer.learning_rate, manifest.optimizer.in_learning_rate or 0.0) / 10)
    return Verification(mode, steps, worst.loss, worst.gradients, worst.parameters, tolerance)


def open_steps(bundle: Bundle, mode: Mode = "one graph", *, threads: int = 1) -> Stepper:
    """The steps of a bundle on the device runtime, from any inputs.

    Args:
        bundle: checked.
        mode: by one graph, which stays open, or by the graphs of single blocks, each opened, run and closed.
        threads: of ONNX Runtime.
    """
    sessions = Sessions(bundle, keep=mode == "one graph", threads=threads)
    return stepper_of(sessions, settings_of(bundle.manifest, {})[0], mode=mode)


def random_batch(manifest: Manifest, *, seed: int) -> dict[str, Tensor]:
    """Random inputs of one step, by name, for every input of the training step that is not the optimizer's."""
    generator = torch.Generator().manual_seed(seed)
    rows, train_timesteps = manifest.batch.rows, manifest.noise_schedule.train_timesteps
    sigmas = torch.rand(rows, generator=generator) * 0.98 + 0.01
    batch = {"sigmas": sigmas, "timesteps": (sigmas * train_timesteps).floor()}
    if manifest.noise_schedule.objective != "flow":
        batch["alphas"] = (1 - sigmas**2).sqrt()
    photos, others, weight = manifest.batch.photos, manifest.batch.class_images, float(manifest.recipe["prior_loss_weight"])
    batch["loss_weights"] = torch.tensor([1.0 / photos] * photos + [weight / max(1, others)] * others)
    shapes = {spec.name: spec.shape for spec in _batch_specs(manifest)}
    for name, shape in shapes.items():
        if name not in batch:
            batch[name] = torch.randn(shape, generator=generator)
    return batch


def as_batch(manifest: Manifest, batch: Mapping[str, Tensor]) -> Batch:
    """The same inputs as PyTorch's step takes them."""
    features = {
        Span(span.start, span.stop, skipped=True): tuple(batch[name] for name in span.features)
        for span in manifest.plan.spans
        if span.features
    }
    return Batch(
        latents=batch["latents"],
        noise=batch["noise"],
        timesteps=batch["timesteps"],
        sigmas=batch["sigmas"],
        alphas=batch.get("alphas"),
        objective=manifest.noise_schedule.objective,
        prompt=prompt_of(batch),
        loss_weights=batch["loss_weights"],
        features=features,
    )


def _keep_gradient(parameter: nn.Parameter, name: str, kept: dict[str, Tensor]) -> None:
    """Copy a parameter's gradient as soon as it is there, before it is clipped and cleared."""

    def keep(of: Tensor) -> None:
        if of.grad is not None:
            kept[name] = of.grad.clone()

    parameter.register_post_accumulate_grad_hook(keep)


@dataclass
class _Worst:
    loss: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def see(of: dict[str, float], name: str, difference: float) -> None:
        of[name] = max(of.get(name, 0.0), difference)


def _largest_difference(of_torch: Tensor, of_bundle: NDArray[np.float32]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):  # of infinities: no number, which is judged as such
        return float(np.abs(of_torch.detach().numpy() - of_bundle).max())


def _share(difference: float, whole: float) -> float:
    """The size of a difference as a share of a whole; infinite where there is no such number, as `max` loses NaN."""
    if difference == 0:
        return 0.0
    share = abs(difference / whole) if whole else math.inf
    return share if math.isfinite(share) else math.inf


def _batch_specs(manifest: Manifest) -> list[TensorSpec]:
    """Inputs of the training step and of the embedding: a graph lacks what it does not need."""
    inputs = (*manifest.step_graph.inputs, *manifest.graph("embed").inputs)
    others = {"noisy"} | {spec.name for spec in optimizer_inputs(manifest.tuned.flat_elements)}
    return [spec for spec in inputs if spec.name not in others]


def eager_model(bundle: Bundle, folder: ModelFolder, plan: BlockPlan, recipe: Recipe) -> tuple[DenoiserAdapter, Tuned]:
    """The PyTorch model with what trains, its frozen weights rounded as the bundle stores them."""
    cpu, packed = torch.device("cpu"), quantization_of(recipe)
    adapter = folder.load_denoiser(dtype=torch.float32, device=cpu, blocks=plan.kept, quantization=packed)
    tuned = METHODS[recipe.method].attach(adapter, plan=plan, recipe=recipe, folder=folder)
    storages = stored_as(bundle, f"{folder.family.component}.")
    block = bundle.manifest.weights.block
    with torch.no_grad():
        for name, tensor in (*adapter.model.named_parameters(), *adapter.model.named_buffers()):
            storage = storages.get(plain_name(name), "fp32")
            if storage != "fp32":
                tensor.copy_(torch.from_numpy(stored_value(tensor.numpy(), storage=storage, block=block)))
    return adapter, tuned


def stored_as(bundle: Bundle, prefix: str) -> dict[str, Storage]:
    """How the weights of one component are stored, by name, as the graphs say."""
    found: dict[str, Storage] = {}
    for graph in bundle.manifest.graphs:
        for tensor in onnx.load_model_from_string(bundle.read(graph.file)).graph.initializer:
            if not tensor.name.startswith(prefix):
                continue
            name, storage = tensor.name.removeprefix(prefix), _STORAGES.get(tensor.data_type)
            for quantized in _QUANTIZED:
                if name.endswith(f".{quantized}.weight"):
                    name, storage = name.removesuffix(f".{quantized}.weight"), quantized
            base, _, part = name.rpartition(".part")
            if storage is not None:
                found[base if part.isdigit() else name] = storage
    return found


_STORAGES: dict[int, Storage] = {TensorProto.FLOAT16: "fp16"}
_QUANTIZED: tuple[Storage, ...] = ("int8", "int4")
