"""The manifest of a bundle, read without pydantic; what each field means is told in `docs/bundle.md` and its JSON Schema.

Fields with defaults are newer than schema 1.0; the default is what bundles meant that did not have the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pocketune_edge.agreement import Role
from pocketune_edge.errors import BundleError
from pocketune_edge.fields import SOME, BundlePath, Count, Decay, Digest, Name, NotNegative, Positive, Share, Size
from pocketune_edge.strict import Rule


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph."""

    name: Name
    shape: Annotated[tuple[Count, ...], Rule(high=8)]
    dtype: Literal["float32", "int64"]
    meaning: Name

    @property
    def elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Graph:
    """One graph of the bundle."""

    name: Name
    file: BundlePath
    role: Role
    block: Count | None
    parameters: tuple[Count, Count] | None
    inputs: Annotated[tuple[TensorSpec, ...], SOME]
    outputs: Annotated[tuple[TensorSpec, ...], SOME]
    weights: tuple[BundlePath, ...]
    weight_bytes: Count
    activation_bytes: Count
    part: Count = 0

    def takes(self, name: str) -> bool:
        """Whether it has an input of that name."""
        return any(spec.name == name for spec in self.inputs)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of an input or output.

        Raises:
            BundleError: it has none of that name.
        """
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec.shape
        msg = f"the bundle's graph {self.name} has no input or output {name}. Export the bundle again."
        raise BundleError(msg)


@dataclass(frozen=True)
class Model:
    """The model that was exported."""

    name: Name
    kind: Name
    sha256: Digest
    note: str | None
    block_count: Size
    streams: Annotated[tuple[Name, ...], SOME]
    zero_negative: bool = False


@dataclass(frozen=True)
class Span:
    """Neighbouring blocks, all skipped or all trained."""

    start: Count
    stop: Size
    skipped: bool
    features: tuple[Name, ...]
    replaces: bool


@dataclass(frozen=True)
class Plan:
    """Which blocks train."""

    spans: Annotated[tuple[Span, ...], SOME]
    use_residuals: bool


@dataclass(frozen=True)
class Batch:
    """The static sizes of every graph."""

    rows: Size
    photos: Size
    class_images: Count
    resolution: Size
    latent_shape: tuple[Size, Size, Size]
    text_tokens: Size
    text_width: Size
    pooled_width: Count


@dataclass(frozen=True)
class Optimizer:
    """AdamW, or plain descent."""

    kind: Literal["adamw", "descent"]
    beta1: Decay
    beta2: Decay
    learning_rate: Positive
    in_learning_rate: Positive | None
    weight_decay: NotNegative
    epsilon: Positive
    max_grad_norm: Positive | None


@dataclass(frozen=True)
class DdimSteps:
    """Where the steps of DDIM lie."""

    spacing: Literal["leading", "trailing", "linspace"]
    offset: Count
    final_signal: Annotated[float, Rule(above=0, high=1)]


@dataclass(frozen=True)
class NoiseSchedule:
    """Which noise a timestep has."""

    kind: Literal["flow_match_euler", "ddpm"]
    objective: Literal["flow", "epsilon", "v_prediction"]
    train_timesteps: Size
    shift: Positive
    signal: tuple[Share, ...] | None
    ddim: DdimSteps | None = None


@dataclass(frozen=True)
class Parameter:
    """One trained tensor."""

    name: Name
    key: Name
    shape: Annotated[tuple[Size, ...], Rule(low=1, high=2)]
    interval: Count
    block: Count | None
    offset: Count | None


@dataclass(frozen=True)
class Lora:
    """Of LoRA matrices."""

    rank: Size
    alpha: Positive
    targets: tuple[Name, ...]


@dataclass(frozen=True)
class Tuned:
    """What trains. Vectors of a run hold the flat vectors of all intervals, one after the other."""

    method: Literal["lora", "scales"]
    lora: Lora | None
    intervals: Size
    parameters: Annotated[tuple[Parameter, ...], SOME]
    flat_elements: Size
    initial: BundlePath

    @property
    def elements(self) -> int:
        """Of all intervals."""
        return self.intervals * self.flat_elements

    def place(self, interval: int) -> slice:
        """Where an interval lies in a vector of all."""
        return slice(interval * self.flat_elements, (interval + 1) * self.flat_elements)


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder and its tokenizer."""

    number: Count
    graphs: Annotated[tuple[Name, ...], SOME]
    tokenizer: BundlePath
    tokens: Size
    pad_id: Count
    pad_token: Name


@dataclass(frozen=True)
class Vae:
    """The image encoder and decoder."""

    encoder: Annotated[tuple[Name, ...], SOME]
    decoder: Annotated[tuple[Name, ...], SOME]
    scaling_factor: float
    shift_factor: float
    downscale: Size


@dataclass(frozen=True)
class Weights:
    """How frozen weights are stored."""

    storage: Literal["fp32", "fp16", "int8", "int4"]
    block: Size | None


@dataclass(frozen=True)
class Memory:
    """Planned bytes of the training phase, without the runtime itself."""

    one_graph_anonymous: Count
    one_graph_mapped: Count
    streaming_anonymous: Count
    streaming_mapped: Count


@dataclass(frozen=True)
class File:
    """A file of the bundle."""

    path: BundlePath
    bytes: Count
    sha256: Digest


@dataclass(frozen=True)
class Manifest:
    """All that a device must know to train and sample from a bundle."""

    schema_version: Literal[1]
    pocketune_version: Name
    backend: Literal["onnx"]
    opset: Annotated[int, Rule(low=1, high=20)]
    model: Model
    recipe: dict[str, Any]
    plan: Plan
    batch: Batch
    weights: Weights
    tuned: Tuned
    optimizer: Optimizer
    noise_schedule: NoiseSchedule
    text_encoders: tuple[TextEncoder, ...]
    vae: Vae
    memory: Memory
    graphs: Annotated[tuple[Graph, ...], SOME]
    files: Annotated[tuple[File, ...], SOME]
    schema_minor: Count = 0

    @property
    def step_graph(self) -> Graph:
        """The graph that runs all trained blocks: the whole step, or its loss where steps are of zeroth order.

        Raises:
            BundleError: the bundle has neither.
        """
        return self.graph("loss" if any(graph.role == "loss" for graph in self.graphs) else "train_step")

    def named(self, names: Iterable[str]) -> list[Graph]:
        """The graphs of some names, in the order of the names, all of which the manifest was checked to have."""
        graphs = {graph.name: graph for graph in self.graphs}
        return [graphs[name] for name in names]

    def pieces(self, role: Role, block: int) -> tuple[Graph, ...]:
        """The graphs that together are one of a block, in the order in which they run; none if it has no such role."""
        found = [graph for graph in self.graphs if graph.role == role and graph.block == block]
        return tuple(sorted(found, key=lambda graph: graph.part))

    def graph(self, role: Role, block: int | None = None) -> Graph:
        """The graph with a role, of one block where there is one a block.

        Raises:
            BundleError: the bundle has none.
        """
        for graph in self.graphs:
            if graph.role == role and graph.block == block:
                return graph
        msg = f"the bundle has no graph {role}{'' if block is None else f' of block {block}'}. Export it again."
        raise BundleError(msg)
