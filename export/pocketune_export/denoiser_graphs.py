"""The graphs of a denoiser: the whole training step, and the same by blocks, which serve sampling and features too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketune.models.base import Context, DenoiserAdapter, Prompt, Streams
from pocketune.plan.blocks import BlockPlan, Span
from pocketune.recipe import Recipe
from pocketune.step import Batch, flow_matching_loss, predict
from pocketune_export.capture import Capture, capture, with_weights
from pocketune_export.layout import Layout, layout_of, without_gradient
from pocketune_export.manifest import TensorSpec
from pocketune_export.training import MEANINGS, Named, adamw, leaves, optimizer_inputs, spec, train_step
from pocketune_export.writer import Traced


@dataclass(frozen=True)
class Sizes:
    """The static sizes of a step: rows of a batch, latent (channels, height, width), text tokens and widths."""

    rows: int
    latents: tuple[int, int, int]
    text_tokens: int
    text_width: int
    pooled_width: int


class DenoiserGraphs:
    """Captures the graphs of one denoiser, one at a time."""

    def __init__(
        self, adapter: DenoiserAdapter, parameters: Mapping[str, Tensor], plan: BlockPlan, recipe: Recipe, sizes: Sizes
    ) -> None:
        """Decide the layout of the parameters.

        Args:
            adapter: with its LoRA; its weights may lie on the meta device. LoRA that the loss does not depend on is taken out.
            parameters: the LoRA matrices by name.
            plan: what is skipped.
            recipe: loss settings, and whether residuals are used.
            sizes: of every graph.
        """
        self._adapter = adapter
        self._model: nn.Module = adapter.model
        self._plan = plan
        self._recipe = recipe
        self._sizes = sizes
        self._embed = self._capture_embed()
        self.layout = layout_of(parameters)
        self._blocks = self._capture_forwards()
        self.without_gradient = without_gradient(self._model, parameters, self._loss_of_nothing)
        self.layout = layout_of(parameters, without=self.without_gradient)
        _unwrap(self._model, self.without_gradient)
        for index in self._plan.kept:
            if any(name.startswith(adapter.block_name(index) + ".") for name in self.without_gradient):
                self._blocks[index] = self._capture_forward(index, self._blocks[index].inputs)

    @property
    def stream_names(self) -> tuple[str, ...]:
        """What flows from block to block."""
        return self._adapter.stream_names

    def features(self, span: Span) -> tuple[TensorSpec, ...]:
        """The inputs of the training step that stand for a skipped span."""
        if not span.skipped or not self._recipe.use_residuals:
            return ()
        kind = "streams leaving" if span.is_prefix else "change made by"
        return tuple(
            spec(
                f"features_{span.start}_{span.stop}_{out.name.removeprefix('new_')}",
                out.shape,
                f"{kind} the skipped blocks {span.start} to {span.stop - 1}",
            )
            for out in self._blocks[span.stop - 1].outputs
        )

    def trace(self) -> Iterator[Traced]:
        """Capture every graph, blocks in order, so that weight files are written in the order of use."""
        yield Traced("embed", "embed", None, None, self._embed)
        for index, forward in enumerate(self._blocks):
            yield Traced(f"block-{index:02d}.forward", "block_forward", index, self._slice(index), forward)
        yield Traced("head", "head", None, None, self._capture_head())
        yield Traced("head_loss", "head_loss", None, None, self._capture_head_loss())
        yield from self._trace_vjps()
        whole = (0, self.layout.elements)
        yield Traced("adamw", "adamw", None, whole, self._capture_adamw())
        yield Traced("train_step", "train_step", None, whole, self._capture_step())

    def _capture_embed(self) -> Capture:
        def embed(given: Named) -> dict[str, Tensor]:
            prompt = Prompt(given["prompt_hidden"], given["prompt_pooled"])
            context = self._adapter.context(given["noisy"], given["timesteps"], prompt)
            streams = self._adapter.embed(given["noisy"], prompt)
            return {"embedding": context.embedding, **dict(zip(self._adapter.stream_names, streams, strict=True))}

        meanings = {name: f"the {name} stream that enters block 0" for name in self._adapter.stream_names}
        meanings["embedding"] = "of timestep and pooled text, for all blocks and the head"
        sample = self._batch_inputs()
        inputs = (
            spec("noisy", sample["latents"].shape, "(1 - sigma) latents + sigma noise"),
            *(sample[name] for name in ("timesteps", "prompt_hidden", "prompt_pooled")),
        )
        return capture(self._model, embed, inputs, meanings)

    def _capture_forwards(self) -> list[Capture]:
        """The forward graph of each block, with its LoRA."""
        streams = {out.name: out for out in self._embed.outputs}
        embedding = streams.pop("embedding")
        captures = []
        for index in range(self._adapter.block_count):
            captures.append(self._capture_forward(index, (*streams.values(), embedding)))
            streams = {
                name: spec(name, out.shape, f"the {name} stream that enters the block")
                for name in streams
                for out in captures[-1].outputs
                if out.name == f"new_{name}"
            }
        return captures

    def _capture_forward(self, index: int, inputs: Iterable[TensorSpec]) -> Capture:
        part, _, _ = self.layout.part(self._adapter.block_name(index))
        given = [out for out in inputs if out.name != "parameters"]

        def forward(given: Named) -> dict[str, Tensor]:
            return self._run_block(index, given, part.split(given["parameters"]) if part.slots else {})

        meanings = {f"new_{name}": f"the {name} stream that leaves block {index}" for name in self._adapter.stream_names}
        return capture(self._model, forward, (*given, *_parameter_input(part)), meanings)

    def _run_block(self, index: int, given: Named, values: Named) -> dict[str, Tensor]:
        names = [name for name in self._adapter.stream_names if name in given]
        streams, context = tuple(given[name] for name in names), self._context(given["embedding"])
        leaving = with_weights(self._model, values, lambda: self._adapter.block(index, streams, context))
        return {f"new_{name}": stream for name, stream in zip(names, leaving, strict=False)}

    def _trace_vjps(self) -> Iterator[Traced]:
        """The backward graphs, in the order in which they run; the first trained block's is the last."""
        alive = [self._adapter.stream_names[0]]
        trained = [index for index in self._plan.kept if self._slice(index) is not None]
        for index in reversed(self._plan.kept):
            if not trained or index < trained[0]:
                return
            traced = self._capture_vjp(index, tuple(alive), first=index == trained[0])
            alive = [out.name.removeprefix("grad_") for out in traced.outputs if out.name.startswith("grad_")]
            yield Traced(f"block-{index:02d}.vjp", "block_vjp", index, self._slice(index), traced)

    def _capture_vjp(self, index: int, alive: tuple[str, ...], *, first: bool) -> Capture:
        """One block's backward graph, which runs its forward pass again.

        Args:
            index: of the block.
            alive: the leaving streams that the loss depends on.
            first: whether nothing before it trains, so that no gradient is passed on.
        """
        part, _, _ = self.layout.part(self._adapter.block_name(index))
        entering = [out for out in self._blocks[index].inputs if out.name in self._adapter.stream_names]

        def backward(given: Named) -> dict[str, Tensor]:
            values = leaves(part, given["parameters"]) if part.slots else {}
            streams = {out.name: given[out.name].detach().requires_grad_() for out in entering}
            leaving = self._run_block(index, {**given, **streams}, values)
            wanted = {} if first else {f"grad_{name}": stream for name, stream in streams.items()}
            gradients = torch.autograd.grad(
                [leaving[f"new_{name}"] for name in alive],
                [*wanted.values(), *values.values()],
                grad_outputs=[given[f"grad_new_{name}"] for name in alive],
                allow_unused=True,
            )
            found = dict(zip([*wanted, *values], gradients, strict=True))
            results = {name: found[name] for name in wanted if found[name] is not None}
            return results | ({"gradients": part.join(found)} if values else {})

        outs = {out.name: out for out in self._blocks[index].outputs}
        given = [spec(f"grad_new_{name}", outs[f"new_{name}"].shape, f"of the loss, for the leaving {name}") for name in alive]
        meanings = {f"grad_{out.name}": f"of the loss, for the entering {out.name}" for out in entering}
        return capture(self._model, backward, (*self._blocks[index].inputs, *given), meanings | MEANINGS)

    def _capture_head(self) -> Capture:
        def head(given: Named) -> dict[str, Tensor]:
            return {"velocity": self._adapter.head((given["image"],), self._context(given["embedding"]))}

        return capture(self._model, head, self._head_inputs(), {"velocity": "the denoiser's output, noise - latents"})

    def _capture_head_loss(self) -> Capture:
        def head_loss(given: Named) -> dict[str, Tensor]:
            image = given["image"].detach().requires_grad_()
            output = self._adapter.head((image,), self._context(given["embedding"]))
            loss = self._loss(output, self._batch(given))
            return {"loss": loss, "grad_image": torch.autograd.grad(loss, [image])[0]}

        sample = self._batch_inputs()
        inputs = (*self._head_inputs(), *(sample[name] for name in ("latents", "noise", "sigmas", "loss_weights")))
        return capture(self._model, head_loss, inputs, MEANINGS | {"grad_image": "of the loss, for the image stream"})

    def _capture_adamw(self) -> Capture:
        gradients = spec("gradients", (self.layout.elements,), MEANINGS["gradients"])
        return capture(nn.Module(), adamw, (*optimizer_inputs(self.layout.elements), gradients), MEANINGS)

    def _capture_step(self) -> Capture:
        def loss_of(given: Named) -> Tensor:
            batch = self._batch(given)
            return self._loss(predict(self._adapter, self._plan, batch, use_residuals=self._recipe.use_residuals), batch)

        features = [feature for span in self._plan.spans for feature in self.features(span)]
        inputs = (*optimizer_inputs(self.layout.elements), *self._batch_inputs().values(), *features)
        return capture(self._model, train_step(self._model, self.layout, loss_of), inputs, MEANINGS)

    def _loss(self, output: Tensor, batch: Batch) -> Tensor:
        scheme, precondition = self._recipe.weighting_scheme, self._recipe.precondition_outputs
        return flow_matching_loss(output, batch, weighting_scheme=scheme, precondition_outputs=precondition)

    def _loss_of_nothing(self) -> Tensor:
        inputs = [*self._batch_inputs().values(), *(out for span in self._plan.spans for out in self.features(span))]
        batch = self._batch({out.name: torch.empty(out.shape) for out in inputs})
        return self._loss(predict(self._adapter, self._plan, batch, use_residuals=self._recipe.use_residuals), batch)

    def _batch(self, given: Named) -> Batch:
        """The batch of named inputs; what a graph does not take is empty, and must not be needed."""
        nothing = torch.empty(0)
        features: dict[Span, Streams] = {}
        for span in self._plan.skipped_spans:
            features[span] = tuple(given[out.name] for out in self.features(span) if out.name in given)
        return Batch(
            latents=given["latents"],
            noise=given["noise"],
            timesteps=given.get("timesteps", nothing),
            sigmas=given["sigmas"],
            prompt=Prompt(given.get("prompt_hidden", nothing), given.get("prompt_pooled", nothing)),
            loss_weights=given["loss_weights"],
            features=features if self._recipe.use_residuals else {},
        )

    def _context(self, embedding: Tensor) -> Context:
        return Context(embedding=embedding, height=self._sizes.latents[1], width=self._sizes.latents[2])

    def _slice(self, index: int) -> tuple[int, int] | None:
        part, start, stop = self.layout.part(self._adapter.block_name(index))
        return (start, stop) if part.slots else None

    def _head_inputs(self) -> tuple[TensorSpec, ...]:
        image = next(out for out in self._blocks[-1].outputs if out.name == "new_image")
        embedding = next(out for out in self._embed.outputs if out.name == "embedding")
        return spec("image", image.shape, "the image stream that leaves the last block"), embedding

    def _batch_inputs(self) -> dict[str, TensorSpec]:
        sizes = self._sizes
        rows = sizes.rows
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "latents": ((rows, *sizes.latents), "clean, scaled and shifted"),
            "noise": ((rows, *sizes.latents), "Gaussian"),
            "timesteps": ((rows,), "as the denoiser takes them, sigma times train_timesteps"),
            "sigmas": ((rows,), "noise level of each timestep"),
            "prompt_hidden": ((rows, sizes.text_tokens, sizes.text_width), "encoded text"),
            "prompt_pooled": ((rows, sizes.pooled_width), "encoded text, pooled"),
            "loss_weights": ((rows,), "1 / photos for a photo, prior_loss_weight / class_images for a class image"),
        }
        return {name: spec(name, shape, meaning) for name, (shape, meaning) in shapes.items()}


def _unwrap(model: nn.Module, names: Iterable[str]) -> None:
    """Take the LoRA with these matrices out of a model: it stays as it started, which changes nothing."""
    for layer in {re.split(r"\.lora_[AB]\.", name)[0] for name in names}:
        owner, _, leaf = layer.rpartition(".")
        wrapped: nn.Module = model.get_submodule(layer)
        setattr(model.get_submodule(owner), leaf, wrapped.get_submodule("base_layer"))


def _parameter_input(part: Layout) -> tuple[TensorSpec, ...]:
    return (spec("parameters", (part.elements,), "LoRA matrices of this block, flat"),) if part.slots else ()
