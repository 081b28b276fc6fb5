"""What must hold between the parts of a manifest; each rule yields a complaint for every breach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketune_export.manifest import Lora, Manifest

_FLAT = frozenset({"parameters", "exp_avg", "exp_avg_sq", "gradients", "new_parameters", "new_exp_avg", "new_exp_avg_sq"})


def plan_faults(manifest: Manifest) -> Iterable[str]:
    """Spans cover all blocks once; rows add up."""
    position = 0
    for span in manifest.plan.spans:
        if span.start != position or span.stop <= span.start:
            yield f"the plan's spans do not follow each other at block {span.start}"
        position = span.stop
    if position != manifest.model.block_count:
        yield f"the plan covers {position} of {manifest.model.block_count} blocks"
    noise = manifest.noise_schedule
    if (noise.kind == "ddpm") != (noise.signal is not None) or (noise.signal and len(noise.signal) != noise.train_timesteps):
        yield "the noise schedule's signal does not fit its kind and timesteps"
    if manifest.batch.rows != manifest.batch.photos + manifest.batch.class_images:
        yield "the batch's rows are not its photos and class images"


def parameter_faults(lora: Lora) -> Iterable[str]:
    """The flat vector has no gaps."""
    position = 0
    for parameter in lora.parameters:
        if parameter.offset is None:
            continue
        if parameter.offset != position:
            yield f"the parameter {parameter.name} is at {parameter.offset}, expected {position}"
        position += parameter.shape[0] * parameter.shape[1]
    if position != lora.flat_elements:
        yield f"the flat vector claims {lora.flat_elements} elements, its parameters have {position}"
    if len({parameter.name for parameter in lora.parameters}) != len(lora.parameters):
        yield "two parameters have one name"


def graph_faults(manifest: Manifest) -> Iterable[str]:
    """Names are distinct, files are listed, flat inputs have the length of their slice."""
    paths = [file.path for file in manifest.files]
    if len({path.lower() for path in paths}) != len(paths):
        yield "two files have one path"
    named = [manifest.lora.initial, *(encoder.tokenizer for encoder in manifest.text_encoders)]
    named += [path for graph in manifest.graphs for path in (graph.file, *graph.weights)]
    missing = set(named) - set(paths)
    if missing:
        yield f"the file {min(missing)} is used but not listed"
    names = [graph.name for graph in manifest.graphs]
    if len(set(names)) != len(names) or len({(graph.role, graph.block) for graph in manifest.graphs}) != len(names):
        yield "two graphs have one name or role"
    parts = [*manifest.vae.encoder, *manifest.vae.decoder, *(name for of in manifest.text_encoders for name in of.graphs)]
    unknown = set(parts) - set(names)
    if unknown:
        yield f"the graph {min(unknown)} is used but not there"
    for graph in manifest.graphs:
        start, stop = graph.parameters or (0, 0)
        if start > stop or stop > manifest.lora.flat_elements:
            yield f"graph {graph.name} takes parameters {start} to {stop} of {manifest.lora.flat_elements}"
        for spec in (*graph.inputs, *graph.outputs):
            if spec.name in _FLAT and spec.shape != (stop - start,):
                yield f"graph {graph.name}: {spec.name} has shape {spec.shape}, expected ({stop - start},)"
