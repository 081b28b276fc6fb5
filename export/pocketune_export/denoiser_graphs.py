"""The graphs of a denoiser: the whole training step, and the same by blocks, which serve sampling and features too."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from pocketune.models.base import Context, DenoiserAdapter, SkipConnected, Streams
from pocketune.plan.blocks import BlockPlan, Span
from pocketune.recipe import Recipe
from pocketune.step import Batch
from pocketune.train import loss_of, output_loss
from pocketune_edge.agreement import Role
from pocketune_export.capture import Capture, capture, with_weights
from pocketune_export.graphspec import TensorSpec
from pocketune_export.layout import Layout, layout_of, without_gradient, without_use
from pocketune_export.step_inputs import Sizes, batch_inputs, batch_of, prompt_of
from pocketune_export.streams import CONTEXT_MEANINGS, by_name, context_by_name, context_of, place_of, stream_name
from pocketune_export.training import (
    MEANINGS,
    Named,
    adamw,
    leaves,
    loss_alone,
    optimizer_inputs,
    parameter_input,
    part_input,
    spec,
    train_step,
    values_of,
)
from pocketune_export.tuned import take_out
from pocketune_export.writer import Traced


class DenoiserGraphs:
    """Captures the graphs of one denoiser, one at a time."""

    def __init__(
        self, adapter: DenoiserAdapter, parameters: Mapping[str, Tensor], plan: BlockPlan, recipe: Recipe, sizes: Sizes
    ) -> None:
        """Decide the layout of the parameters.

        Args:
            adapter: with what trains; its weights may lie on the meta device. What the loss does not depend on is taken out.
            parameters: what trains, by name.
            plan: what is skipped.
            recipe: loss settings, and whether residuals are used.
            sizes: of every graph.
        """
        self._adapter = adapter
        self._model: nn.Module = adapter.model
        self._plan = plan
        self._recipe = recipe
        self._sizes = sizes
        self.layout = layout_of(parameters)
        self._embed = self._capture_embed()
        self._context_inputs = tuple(out for out in self._embed.outputs if out.name in CONTEXT_MEANINGS)
        self._entering: list[dict[str, TensorSpec]] = []
        self._blocks = self._capture_forwards()
        untouched = without_gradient if self._backpropagates else without_use
        self.untouched = untouched(self._model, parameters, self._loss_of_nothing)
        self.layout = layout_of(parameters, without=self.untouched)
        take_out(self._model, self.untouched)
        for index in self._plan.kept:
            if any(name.startswith(self._prefixes(index)) for name in self.untouched):
                self._blocks[index] = self._capture_forward(index)

    @property
    def _backpropagates(self) -> bool:
        return self._recipe.gradient != "zeroth_order"

    @property
    def stream_names(self) -> tuple[str, ...]:
        """What flows from block to block."""
        names = {name for streams in self._entering for name in streams}
        return tuple(sorted(names, key=lambda name: place_of(self._adapter, name)))

    def replaces(self, span: Span) -> bool:
        """Whether a skipped span's features take the place of streams; else they are added."""
        return span.skipped and (span.is_prefix or isinstance(self._adapter, SkipConnected))

    def features(self, span: Span) -> tuple[TensorSpec, ...]:
        """The inputs of the training step that stand for a skipped span."""
        if not span.skipped or not self._recipe.use_residuals:
            return ()
        kind = "stream leaving" if self.replaces(span) else "change made by"
        leaving = self._entering[span.stop]
        names = ["image"] if isinstance(self._adapter, SkipConnected) else leaving
        return tuple(
            spec(
                f"{_feature_prefix(span)}{name}",
                leaving[name].shape,
                f"{kind} the skipped blocks {span.start} to {span.stop - 1}",
            )
            for name in names
        )

    def trace(self) -> Iterator[Traced]:
        """Capture every graph, blocks in order, so that weight files are written in the order of use."""
        yield Traced("embed", "embed", None, self._outer(before=True)[1], self._embed)
        for index, forward in enumerate(self._blocks):
            yield Traced(f"block-{index:02d}.forward", "block_forward", index, self._slice(index), forward)
        of_head = self._outer(before=False)[1]
        yield Traced("head", "head", None, of_head, self._capture_head())
        whole = (0, self.layout.elements)
        outside = of_head is not None or self._outer(before=True)[1] is not None
        if not (self._backpropagates and outside):  # gradients of embedding and head have no graphs of their own
            yield Traced("head_loss", "head_loss", None, of_head, self._capture_head_loss())
        if self._backpropagates and not outside:
            yield from self._trace_vjps()
        if self._backpropagates or self._recipe.zo_optimizer == "adam":
            yield Traced("adamw", "adamw", None, whole, self._capture_adamw())
        step: Role = "train_step" if self._backpropagates else "loss"
        yield Traced(step, step, None, whole, self._capture_step())

    def _capture_embed(self) -> Capture:
        part, _ = self._outer(before=True)

        def embed(given: Named) -> dict[str, Tensor]:
            prompt = prompt_of(given)

            def embedded() -> dict[str, Tensor]:
                context = self._adapter.context(given["noisy"], given["timesteps"], prompt)
                return context_by_name(context) | by_name(self._adapter, self._adapter.embed(given["noisy"], prompt))

            return with_weights(self._model, values_of(part, given), embedded)

        names = (stream_name(self._adapter, place) for place in range(len(self._adapter.stream_names) + 1))
        meanings = CONTEXT_MEANINGS | {name: f"the {name} stream that enters block 0" for name in names}
        sample = batch_inputs(self._sizes)
        noisy = spec("noisy", sample["latents"].shape, "alpha latents + sigma noise")
        taken = (sample[name] for name in ("timesteps", "prompt_hidden", "prompt_pooled", "prompt_sizes") if name in sample)
        return capture(self._model, embed, (noisy, *taken, *part_input(part)), meanings)

    def _capture_forwards(self) -> list[Capture]:
        """The forward graph of each block, with its LoRA; on the way, what enters each block and the head is noted."""
        streams = {out.name: out for out in self._embed.outputs if out.name not in CONTEXT_MEANINGS}
        captures: list[Capture] = []
        for index in range(self._adapter.block_count):
            self._entering.append(streams)
            captures.append(self._capture_forward(index))
            taken = {given.name for given in captures[-1].inputs}
            passing = {name: stream for name, stream in streams.items() if name not in taken}
            leaving = {out.name.removeprefix("new_"): out for out in captures[-1].outputs}
            fresh = {name: spec(name, out.shape, f"the {name} stream that enters the block") for name, out in leaving.items()}
            ordered = sorted((passing | fresh).items(), key=lambda item: place_of(self._adapter, item[0]))
            streams = dict(ordered)
        self._entering.append(streams)
        return captures

    def _capture_forward(self, index: int) -> Capture:
        part, _, _ = self.layout.part(self._prefixes(index))
        entering = self._entering[index]

        def forward(given: Named) -> dict[str, Tensor]:
            return self._run_block(index, given, values_of(part, given))

        names = (stream_name(self._adapter, place) for place in range(len(entering) + 2))
        meanings = {f"new_{name}": f"the {name} stream that leaves block {index}" for name in names}
        return capture(self._model, forward, (*entering.values(), *self._context_inputs, *part_input(part)), meanings)

    def _run_block(self, index: int, given: Named, values: Named) -> dict[str, Tensor]:
        """Run a block; the streams that it makes, without those that pass it by."""
        streams, context = tuple(given[name] for name in self._entering[index]), self._context(given)
        leaving = with_weights(self._model, values, lambda: self._adapter.block(index, streams, context))
        return {
            f"new_{name}": stream
            for place, (name, stream) in enumerate(by_name(self._adapter, leaving).items())
            if place >= len(streams) or stream is not streams[place]
        }

    def _trace_vjps(self) -> Iterator[Traced]:
        """The backward graphs, in the order in which they run; the first trained block's is the last."""
        alive = {"image"}
        trained = [index for index in self._plan.kept if self._slice(index) is not None]
        for span in reversed(self._plan.spans):
            if span.skipped:
                if self.replaces(span):
                    alive -= {out.name.removeprefix(_feature_prefix(span)) for out in self.features(span)}
                continue
            for index in reversed(range(span.start, span.stop)):
                if not trained or index < trained[0]:
                    return
                made = {out.name.removeprefix("new_") for out in self._blocks[index].outputs}
                traced = self._capture_vjp(index, alive & made, first=index == trained[0])
                passed = {out.name.removeprefix("grad_") for out in traced.outputs if out.name.startswith("grad_")}
                alive = (alive - made) | passed
                yield Traced(f"block-{index:02d}.vjp", "block_vjp", index, self._slice(index), traced)

    def _capture_vjp(self, index: int, alive: Collection[str], *, first: bool) -> Capture:
        """One block's backward graph, which runs its forward pass again.

        Args:
            index: of the block.
            alive: those of the streams that the block makes on which the loss depends.
            first: whether nothing before it trains, so that no gradient is passed on.
        """
        part, _, _ = self.layout.part(self._prefixes(index))
        taken = {given.name for given in self._blocks[index].inputs}
        entering = [name for name in self._entering[index] if name in taken]
        outs = {out.name: out for out in self._blocks[index].outputs if out.name.removeprefix("new_") in alive}

        def backward(given: Named) -> dict[str, Tensor]:
            values = leaves(part, given["parameters"]) if part.slots else {}
            streams = {name: given[name].detach().requires_grad_() for name in entering}
            leaving = self._run_block(index, {**given, **streams}, values)
            wanted = {} if first else {f"grad_{name}": stream for name, stream in streams.items()}
            gradients = torch.autograd.grad(
                [leaving[name] for name in outs],
                [*wanted.values(), *values.values()],
                grad_outputs=[given[f"grad_{name}"] for name in outs],
                allow_unused=True,
            )
            found = dict(zip([*wanted, *values], gradients, strict=True))
            results = {name: found[name] for name in wanted if found[name] is not None}
            return results | ({"gradients": part.join(found)} if values else {})

        inputs = (*self._entering[index].values(), *self._context_inputs, *part_input(part))
        given = [spec(f"grad_{name}", out.shape, f"of the loss, for the leaving {name[4:]}") for name, out in outs.items()]
        meanings = {f"grad_{name}": f"of the loss, for the entering {name}" for name in entering}
        return capture(self._model, backward, (*inputs, *given), meanings | MEANINGS)

    def _capture_head(self) -> Capture:
        def head(given: Named) -> dict[str, Tensor]:
            return {"prediction": self._run_head(given["image"], given)}

        meanings = {"prediction": f"the denoiser's output: {self._sizes.objective}"}
        return capture(self._model, head, self._head_inputs(), meanings)

    def _capture_head_loss(self) -> Capture:
        def head_loss(given: Named) -> dict[str, Tensor]:
            image = given["image"].detach().requires_grad_()
            loss = output_loss(self._run_head(image, given), self._recipe, self._batch(given))
            if not self._backpropagates:
                return {"loss": loss}
            return {"loss": loss, "grad_image": torch.autograd.grad(loss, [image])[0]}

        sample = batch_inputs(self._sizes)
        taken = (sample[name] for name in ("latents", "noise", "sigmas", "alphas", "loss_weights") if name in sample)
        meanings = MEANINGS | {"grad_image": "of the loss, for the image stream"}
        return capture(self._model, head_loss, (*self._head_inputs(), *taken), meanings)

    def _run_head(self, image: Tensor, given: Named) -> Tensor:
        values = values_of(self._outer(before=False)[0], given)
        return with_weights(self._model, values, lambda: self._adapter.head((image,), self._context(given)))

    def _capture_adamw(self) -> Capture:
        gradients = spec("gradients", (self.layout.elements,), MEANINGS["gradients"])
        return capture(nn.Module(), adamw, (*self._optimizer_inputs(), gradients), MEANINGS)

    def _optimizer_inputs(self) -> tuple[TensorSpec, ...]:
        own_rates = self._recipe.method == "scales" and self._backpropagates
        return optimizer_inputs(self.layout.elements, own_rates=own_rates)

    def _capture_step(self) -> Capture:
        def loss(given: Named) -> Tensor:
            return loss_of(self._adapter, self._plan, self._recipe, self._batch(given))

        features = [feature for span in self._plan.spans for feature in self.features(span)]
        taken = (*batch_inputs(self._sizes).values(), *features)
        make = train_step if self._backpropagates else loss_alone
        given = self._optimizer_inputs() if self._backpropagates else (parameter_input(self.layout.elements),)
        return capture(self._model, make(self._model, self.layout, loss), (*given, *taken), MEANINGS)

    def _loss_of_nothing(self) -> Tensor:
        inputs = [*batch_inputs(self._sizes).values(), *(out for span in self._plan.spans for out in self.features(span))]
        batch = self._batch({out.name: torch.empty(out.shape) for out in inputs})
        return loss_of(self._adapter, self._plan, self._recipe, batch)

    def _batch(self, given: Named) -> Batch:
        """The batch of named inputs; what a graph does not take is empty, and must not be needed."""
        features: dict[Span, Streams] = {}
        for span in self._plan.skipped_spans:
            features[span] = tuple(given[out.name] for out in self.features(span) if out.name in given)
        return batch_of(given, self._sizes, features if self._recipe.use_residuals else {})

    def _context(self, given: Named) -> Context:
        return context_of(given, height=self._sizes.latents[1], width=self._sizes.latents[2])

    def _slice(self, index: int) -> tuple[int, int] | None:
        part, start, stop = self.layout.part(self._prefixes(index))
        return (start, stop) if part.slots else None

    def _prefixes(self, index: int) -> tuple[str, ...]:
        """Of the names of a block's parameters."""
        return tuple(f"{part}." for part in self._adapter.block_parts(index))

    def _outer(self, *, before: bool) -> tuple[Layout, tuple[int, int] | None]:
        """What trains before the blocks or behind them, and its slice, if anything does."""
        names = [name for index in range(self._adapter.block_count) for name in self._prefixes(index)]
        part, start, stop = self.layout.beside(names, before=before)
        return part, (start, stop) if part.slots else None

    def _head_inputs(self) -> tuple[TensorSpec, ...]:
        image, (part, _) = self._entering[-1]["image"], self._outer(before=False)
        streams = spec("image", image.shape, "the image stream that leaves the last block"), *self._context_inputs
        return (*streams, *part_input(part))


def _feature_prefix(span: Span) -> str:
    return f"features_{span.start}_{span.stop}_"
