"""The training loop: AdamW or plain descent over the adapter's parameters, replaying draws, with checkpoints."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from pocketune.checkpoint import CheckpointFolder
from pocketune.errors import Interrupted, RunError
from pocketune.features.cache import FeatureCache
from pocketune.gradients.zeroth_order import Estimate, ZerothOrder
from pocketune.methods.base import Tuned, unchanged
from pocketune.models.base import DenoiserAdapter
from pocketune.plan.blocks import BlockPlan
from pocketune.progress import ignore
from pocketune.recipe import Recipe
from pocketune.recompute import recompute, saved_to
from pocketune.sampling.batches import BatchMaker
from pocketune.sampling.draws import Draw
from pocketune.scratch import Scratch
from pocketune.step import Batch, Features, diffusion_loss, flow_matching_loss, predict

ZO_ADAM_EPSILON = 1e-3
"""Added to the root of Adam's second moment in zeroth-order steps, as in ZOODiP's code: it damps what is all noise."""

LOSS_SCALE = 2.0**12
"""What float16 training multiplies the loss with and divides gradients by: exactly, as it is a power of two.

The loss is a mean. At 1024 pixels and 16 channels of latents the gradient of an output is some 2 / 2**18 = 8e-6, beneath the
normal numbers of float16, which go from 6e-5 to 65504. Scaled it is 0.03, and with the 2 / 2**14 of smaller latents 0.5: both
lie where gradients may shrink by more than two decimal orders on their way back, and grow by five.
"""


def train(
    adapter: DenoiserAdapter,
    tuned: Tuned,
    plan: BlockPlan,
    recipe: Recipe,
    batches: Sequence[Sequence[Draw]],
    make_batch: BatchMaker,
    *,
    cache: FeatureCache | None,
    checkpoints: CheckpointFolder,
    scratch: Scratch | None = None,
    on_step: Callable[[int, int, float], None],
    stop: int | None = None,
) -> tuple[float, ...]:
    """Train to a step, from the newest checkpoint if there is one, and save a checkpoint there.

    Args:
        adapter: the denoiser with its adapter; skipped blocks may be gone.
        tuned: what trains.
        plan: what is skipped.
        recipe: optimizer settings and checkpoint interval.
        batches: the draws of each step.
        make_batch: turns draws into tensors.
        cache: features of the draws; None when nothing is skipped or residuals are off.
        checkpoints: where to save and resume.
        scratch: where activations go, if the recipe wants them on disk.
        on_step: called with (finished steps, steps, loss).
        stop: steps that are finished then; default: the recipe's.

    Returns:
        The loss of each step.

    Raises:
        Interrupted: on Ctrl-C, after a checkpoint was saved.
        RunError: a loss, a gradient or what trains is no number any more; no checkpoint holds it.
    """
    stop = recipe.steps if stop is None else stop
    parameters = tuned.parameters
    kept = {**parameters, **tuned.state}
    optimizer = new_optimizer(parameters, recipe)
    progressed = checkpoints.restore(kept, optimizer)
    if recipe.activations != "kept":
        forget_activations(adapter, recipe, lambda: update(parameters.values(), recipe, optimizer), scratch=scratch)
    losses = list(progressed.losses)

    def took(loss: float) -> None:
        check_finite("the loss", loss, where=f" at step {len(losses) + 1}")
        losses.append(loss)

    def save() -> None:
        for name, tensor in kept.items():
            check_finite(f"the largest number of {name}", tensor.detach().abs().max(), where=f" at step {len(losses)}")
        checkpoints.save(kept, optimizer, step=len(losses), losses=tuple(losses))

    try:
        for step in range(progressed.step, stop):
            batch = make_batch(batches[step], _features(cache, batches[step], make_batch))
            if recipe.gradient == "zeroth_order" or (recipe.gradient == "mixed" and not batches[step][0].low):
                loss = zeroth_order_step(adapter, tuned, plan, recipe, batch, optimizer, step=step, took=took)
            else:
                with saved_to(scratch), whole() if recipe.optimizer_in_backward else nullcontext():
                    loss = train_step(adapter, parameters, plan, recipe, batch, optimizer, inputs=tuned.inputs, took=took)
            on_step(step + 1, recipe.steps, loss)
            if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == stop:
                save()
    except KeyboardInterrupt as error:
        save()
        msg = f"stopped after step {len(losses)} of {recipe.steps}; a checkpoint is saved. Add --resume to go on."
        raise Interrupted(msg) from error
    return tuple(losses)


@contextmanager
def whole() -> Iterator[None]:
    """Let Ctrl-C wait for the end of an update: half of one, or one that was not counted, could not be resumed from."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):  # nothing interrupts
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def check_finite(what: str, value: float | Tensor, *, where: str = "") -> None:
    """Raise a RunError if a number of a training is infinite or none."""
    if not math.isfinite(value):
        msg = f"{what} became {float(value)}{where}. Try a lower learning rate or dtype float32, in a new run."
        raise RunError(msg)


def new_optimizer(parameters: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW as in diffusers' script; scales of packed weights have their own learning rates, and do not decay to zero.

    It is fused: an adapter is hundreds of small tensors, of which the other kinds of AdamW take a dozen passes each.
    """
    adamw = partial(torch.optim.AdamW, fused=True)
    if recipe.zo_optimizer == "adam":
        return adamw(parameters.values(), lr=recipe.zo_learning_rate, eps=ZO_ADAM_EPSILON, weight_decay=0.0)
    rates = {"s_out": recipe.scale_learning_rate, "s_in": recipe.scale_in_learning_rate}
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(name.rpartition(".")[2], []).append(parameter)
    if not set(groups) & set(rates):
        return adamw(parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return adamw([{"params": some, "lr": rates[kind]} for kind, some in groups.items()], weight_decay=0.0)


def forget_activations(
    adapter: DenoiserAdapter, recipe: Recipe, use_gradients: Callable[[], None], *, scratch: Scratch | None = None
) -> None:
    """Let the denoiser's units compute in backward what they would keep, and use their gradients there if the recipe says so.

    Paper: Lv et al. 2023 (LOMO), section 3.1: a gradient is used and freed before the next is there.
    Differs: a whole block at a time, by AdamW; gradients are clipped by the norm of what is there: those of the block, and of
        layers behind it that are in none.
    """
    in_backward = (lambda _: use_gradients()) if recipe.optimizer_in_backward else None
    for module in adapter.model.modules():
        if isinstance(module, adapter.unit_kinds):
            recompute(module, scratch=scratch, on_gradients=in_backward)


def update(parameters: Collection[nn.Parameter], recipe: Recipe, optimizer: torch.optim.AdamW) -> None:
    """Clip the gradients that are there, take the optimizer's step for their parameters, and free them.

    Raises:
        RunError: a gradient is no number; nothing was updated.
    """
    if recipe.dtype == "float16":
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(LOSS_SCALE)
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
    check_finite("the norm of the gradient", norm)
    optimizer.step()  # skips all parameters without a gradient
    optimizer.zero_grad(set_to_none=True)


def train_step(
    adapter: DenoiserAdapter,
    parameters: dict[str, nn.Parameter],
    plan: BlockPlan,
    recipe: Recipe,
    batch: Batch,
    optimizer: torch.optim.AdamW,
    *,
    inputs: Callable[[Batch], Batch] = unchanged,
    took: Callable[[float], None] = ignore,
) -> float:
    """One step of backpropagation: loss, backward, clip, AdamW; the loss before the update, of which `took` hears with it."""
    loss = loss_of(adapter, plan, recipe, inputs(batch))
    torch.autograd.backward(loss * LOSS_SCALE if recipe.dtype == "float16" else loss)
    value = loss.item()
    with whole():
        update(parameters.values(), recipe, optimizer)
        took(value)
    return value


def zeroth_order_step(
    adapter: DenoiserAdapter,
    tuned: Tuned,
    plan: BlockPlan,
    recipe: Recipe,
    batch: Batch,
    optimizer: torch.optim.AdamW,
    *,
    step: int,
    took: Callable[[float], None] = ignore,
) -> float:
    """One step of forward passes alone: losses along random directions, then descent or Adam; the rest as of `train_step`.

    Paper: MeZO (Malladi et al. 2023), algorithm 1; with Adam ZOODiP (arXiv 2503.14868).
    """
    estimator = ZerothOrder(
        tuned.owner,
        seed=recipe.seed,
        queries=recipe.zo_queries,
        epsilon=recipe.zo_epsilon,
        two_sided=recipe.zo_two_sided,
    )
    estimate = estimator(lambda: loss_of(adapter, plan, recipe, tuned.inputs(batch)), tuned.parameters, step=step)

    def gradient(name: str) -> Tensor | None:
        found = estimate.gradient(name)
        return None if found is None else tuned.project(name, found)

    decay = 0.0 if recipe.method == "scales" else recipe.weight_decay
    with whole():
        if recipe.zo_optimizer == "adam":
            for name, parameter in tuned.parameters.items():
                parameter.grad = gradient(name)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            projected = Estimate(estimate.loss, gradient)
            descend(tuned.parameters, projected, learning_rate=recipe.zo_learning_rate, weight_decay=decay)
        tuned.after_step(step)
        took(estimate.loss)
    return estimate.loss


@torch.no_grad()
def descend(parameters: Mapping[str, nn.Parameter], estimate: Estimate, *, learning_rate: float, weight_decay: float) -> None:
    """Plain descent with decoupled weight decay, without moments, one parameter at a time."""
    for name, parameter in parameters.items():
        gradient = estimate.gradient(name)
        if gradient is not None:
            parameter.mul_(1 - learning_rate * weight_decay).sub_(gradient, alpha=learning_rate)


def loss_of(adapter: DenoiserAdapter, plan: BlockPlan, recipe: Recipe, batch: Batch) -> Tensor:
    """The loss of a step, a scalar."""
    return output_loss(predict(adapter, plan, batch, use_residuals=recipe.use_residuals), recipe, batch)


def output_loss(output: Tensor, recipe: Recipe, batch: Batch) -> Tensor:
    """The loss that the architecture is trained with, a scalar, of the denoiser's output for a batch."""
    if batch.objective == "flow":
        return flow_matching_loss(
            output, batch, weighting_scheme=recipe.weighting_scheme, precondition_outputs=recipe.precondition_outputs
        )
    return diffusion_loss(output, batch)


def _features(cache: FeatureCache | None, draws: Sequence[Draw], make_batch: BatchMaker) -> Features:
    if cache is None:
        return {}
    return cache.get([draw.cache_number for draw in draws], device=make_batch.device, dtype=make_batch.dtype)
