"""Writes one bundle: lowers captures, stores their weights, collects what the manifest says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from pocketune.errors import PlanError
from pocketune_edge.agreement import SCHEMA_MINOR, SCHEMA_VERSION, Role
from pocketune_export import manifest as m
from pocketune_export.bundle import describe_file, seal
from pocketune_export.capture import Capture
from pocketune_export.cutting import cut_by_bytes
from pocketune_export.graphspec import Graph
from pocketune_export.onnx import lower
from pocketune_export.onnx_builder import OPSET
from pocketune_export.planning import activation_bytes, planned_memory
from pocketune_export.quantize import Storage
from pocketune_export.weights import Packing, WeightPart, WeightStore


@dataclass(frozen=True)
class Traced:
    """A captured graph and its place in a bundle.

    Attributes:
        name: of the graph.
        role: what it is for.
        block: which block or encoder, where there is one graph for each.
        parameters: the slice of the flat vector that it takes, if it takes any.
        capture: the graph.
        part: which piece of a block's graph.
    """

    name: str
    role: Role
    block: int | None
    parameters: tuple[int, int] | None
    capture: Capture
    part: int = 0

    def pieces(self) -> tuple[Traced, ...]:
        """A block's graph in pieces of bounded weights, if it has more; any other as it is."""
        parts = cut_by_bytes(self.capture) if self.role in ("block_forward", "block_vjp") else ()
        if len(parts) < 2:
            return (self,)
        return tuple(
            replace(self, name=f"{self.name}-{number:02d}", part=number, capture=part) for number, part in enumerate(parts)
        )


@dataclass(frozen=True)
class Component:
    """A part of the model whose graphs share weights.

    Attributes:
        prefix: put before the names of its weights.
        load: a weight by name.
        file: bundle path of the file for its weights; those that a block uses first lie in a file of that block.
        packing: which of them the recipe packs.
    """

    prefix: str
    load: Callable[[str], Tensor]
    file: str
    packing: Packing | None = None


@dataclass(frozen=True)
class Described:
    """What the manifest says of the model and the recipe, whatever the bundle's weights are."""

    model: m.Model
    recipe: dict[str, object]
    plan: m.Plan
    batch: m.Batch
    tuned: m.Tuned
    optimizer: m.Optimizer
    noise_schedule: m.NoiseSchedule
    text_encoders: tuple[m.TextEncoder, ...]
    vae: m.Vae


class BundleWriter:
    """A bundle in the making."""

    def __init__(self, folder: Path, *, weights: Storage, block: int | None) -> None:
        """Write into an empty folder.

        Args:
            folder: exists.
            weights: how matrices are stored.
            block: int8 and int4 weights that share a scale; None for a row.
        """
        self._folder = folder
        self._store = WeightStore(folder, wanted=weights, block=block)
        self._parts: dict[str, WeightPart] = {}
        self._graphs: list[Graph] = []
        self._files: list[str] = []

    def add_graph(self, traced: Traced, component: Component) -> None:
        """Lower a capture and write it, with the weights that no graph used before.

        Raises:
            ModelError: it cannot be lowered.
        """
        if component.prefix not in self._parts:
            self._parts[component.prefix] = WeightPart(self._store, component.prefix, component.load, component.packing)
        file = f"weights/block-{traced.block:02d}.bin" if traced.role == "block_forward" else component.file
        lowered = lower(traced.capture, self._parts[component.prefix], file=file)
        self.add_file(f"{traced.name}.onnx", lowered.content)
        graph = Graph(
            name=traced.name,
            file=f"{traced.name}.onnx",
            role=traced.role,
            block=traced.block,
            part=traced.part,
            parameters=traced.parameters,
            inputs=traced.capture.inputs,
            outputs=traced.capture.outputs,
            weights=lowered.files,
            weight_bytes=lowered.weight_bytes,
            activation_bytes=activation_bytes(lowered.content),
        )
        self._graphs.append(graph)

    def add_file(self, path: str, content: bytes) -> None:
        """Write a file of its own."""
        (self._folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self._folder / path).write_bytes(content)
        self._files.append(path)

    def finish(self, described: Described, *, points: int = 1) -> m.Manifest:
        """Close the weight files and write the manifest; points: where a zeroth-order step measures the loss, else 1.

        Raises:
            PlanError: the block divides no row of a quantized matrix, or the manifest is larger than devices read.
        """
        if self._store.block is not None and not self._store.blocked:
            msg = (
                f"a block of {self._store.block} weights divides no row of this model's matrices. Give another --weight-block."
            )
            raise PlanError(msg)
        files = [m.File(path=path, bytes=size, sha256=digest) for path, (size, digest) in self._store.close().items()]
        files += [describe_file(self._folder, path) for path in self._files]
        manifest = m.Manifest(
            schema_version=SCHEMA_VERSION,
            schema_minor=SCHEMA_MINOR,
            pocketune_version=version("pocketune"),
            backend="onnx",
            opset=OPSET,
            **vars(described),
            weights=m.Weights(storage=self._store.wanted, block=self._store.block),
            memory=planned_memory(self._graphs, points=points),
            graphs=tuple(self._graphs),
            files=tuple(sorted(files, key=lambda file: file.path)),
        )
        seal(self._folder, manifest)
        return manifest
