"""What exporter and device must agree on: names of files and roles, bounds, and what must hold between a manifest's parts.

Nothing here imports anything but the standard library. Each rule yields a complaint for every breach, and reads attributes that
the manifests of both sides have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from pocketune_edge.manifest import Graph, Manifest, Tuned

SCHEMA_VERSION: Final = 1
"""Others are not read."""
SCHEMA_MINOR: Final = 1
"""Older ones are read: they lack fields for which the device has defaults.

1: `noise_schedule.ddim`, `model.zero_negative`, `part` of graphs.
"""
MANIFEST_FILE = "manifest.json"
SEAL_FILE = "manifest.sha256"
MAX_ELEMENTS = 2**40
"""Of a tensor, and the largest count anywhere."""
MAX_PATH_CHARACTERS = 300
MAX_MANIFEST_BYTES = 32 * 2**20
"""Of a larger one, devices read nothing."""
MAX_TIMESTEPS = 10_000
"""Of a noise schedule: the device makes a table of them."""
MAX_TOKENS = 2**16
"""Of a prompt."""
CARRIED = "carried_"
"""Begins the names of what pieces of one graph hand to each other."""

Role = Literal[
    "train_step",
    "loss",
    "embed",
    "block_forward",
    "block_vjp",
    "head",
    "head_loss",
    "adamw",
    "text_encoder",
    "text_join",
    "vae_encoder",
    "vae_decoder",
]

_SMALLEST_VALUE_BYTES = 2
"""Of start values: half precision."""
_FLAT = frozenset({"parameters", "exp_avg", "exp_avg_sq", "gradients", "new_parameters", "new_exp_avg", "new_exp_avg_sq"})


def path_fault(path: str) -> str | None:
    """Why a path does not name a file inside the bundle on every system, or None.

    It must be relative, of at most four parts of the characters A-Z a-z 0-9 . _ and -, none of them only dots.
    """
    parts = path.split("/")
    plain = all(re.fullmatch(r"[A-Za-z0-9_.-]{1,120}", part) and set(part) != {"."} for part in parts)
    if plain and len(parts) <= 4 and len(path) <= MAX_PATH_CHARACTERS:
        return None
    return f"the path {path[:80]!r} leaves the bundle or is not plain"


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
    if noise.ddim is not None and noise.kind != "ddpm":
        yield "a noise schedule that is no diffusion's has steps of DDIM"
    if noise.train_timesteps > MAX_TIMESTEPS:
        yield f"the noise schedule claims {noise.train_timesteps} timesteps"
    if (noise.kind == "ddpm") == (noise.objective == "flow"):
        yield "the noise schedule's objective does not fit its kind"
    if manifest.batch.rows != manifest.batch.photos + manifest.batch.class_images:
        yield "the batch's rows are not its photos and class images"


def parameter_faults(tuned: Tuned) -> Iterable[str]:
    """The flat vectors have no gaps, and there is one for each interval."""
    if (tuned.lora is None) == (tuned.method == "lora") or (tuned.method == "lora" and tuned.intervals != 1):
        yield f"the method {tuned.method} does not fit its settings and intervals"
    positions = [0] * min(tuned.intervals, len(tuned.parameters))
    for parameter in tuned.parameters:
        if parameter.interval >= len(positions):
            yield f"the parameter {parameter.name} is of interval {parameter.interval} of {tuned.intervals}"
        elif parameter.offset is not None:
            if parameter.offset != positions[parameter.interval]:
                yield f"the parameter {parameter.name} is at {parameter.offset}, expected {positions[parameter.interval]}"
            positions[parameter.interval] += math.prod(parameter.shape)
    if len(positions) < tuned.intervals or set(positions) != {tuned.flat_elements}:
        yield f"a flat vector claims {tuned.flat_elements} elements, its parameters have {positions[0]}"
    if len({parameter.name for parameter in tuned.parameters}) != len(tuned.parameters):
        yield "two parameters have one name"


def tensor_faults(graph: Graph) -> Iterable[str]:
    """Inputs and outputs have names of their own and shapes that can be."""
    specs = (*graph.inputs, *graph.outputs)
    if len({spec.name for spec in specs}) != len(specs):
        yield f"graph {graph.name} has two inputs or outputs of one name"
    for spec in specs:
        if math.prod(spec.shape) > MAX_ELEMENTS:
            yield f"graph {graph.name} claims an impossible shape for {spec.name}"


def graph_faults(manifest: Manifest) -> Iterable[str]:
    """Names are distinct, files are listed, every block can run, flat inputs have the length of their slice."""
    paths = [file.path for file in manifest.files]
    if len({path.lower() for path in paths}) != len(paths):
        yield "two files have one path"
    named = [manifest.tuned.initial, *(encoder.tokenizer for encoder in manifest.text_encoders)]
    named += [path for graph in manifest.graphs for path in (graph.file, *graph.weights)]
    missing = set(named) - set(paths)
    if missing:
        yield f"the file {min(missing)} is used but not listed"
    names = [graph.name for graph in manifest.graphs]
    places = {(graph.role, graph.block, graph.part) for graph in manifest.graphs}
    if len(set(names)) != len(names) or len(places) != len(names):
        yield "two graphs have one name or role"
    for role, block, part in places:
        if part and ((role, block, part - 1) not in places or role not in ("block_forward", "block_vjp")):
            yield f"a graph is part {part} of {role} and has no part {part - 1}"
    parts = [*manifest.vae.encoder, *manifest.vae.decoder, *(name for of in manifest.text_encoders for name in of.graphs)]
    unknown = set(parts) - set(names)
    if unknown:
        yield f"the graph {min(unknown)} is used but not there"
    count = manifest.model.block_count
    able = sum(role == "block_forward" and part == 0 and block is not None and block < count for role, block, part in places)
    if able != count:
        yield f"{able} of {count} blocks have a graph block_forward"
    for graph in manifest.graphs:
        start, stop = graph.parameters or (0, 0)
        if start > stop or stop > manifest.tuned.flat_elements:
            yield f"graph {graph.name} takes parameters {start} to {stop} of {manifest.tuned.flat_elements}"
        for spec in (*graph.inputs, *graph.outputs):
            if spec.name in _FLAT and spec.shape != (stop - start,):
                yield f"graph {graph.name}: {spec.name} has shape {spec.shape}, expected ({stop - start},)"


def size_faults(manifest: Manifest) -> Iterable[str]:
    """The sizes that the device makes its inputs of are those that graphs take, and there are values for all that trains."""
    elements = sum(math.prod(parameter.shape) for parameter in manifest.tuned.parameters)
    values = sum(file.bytes for file in manifest.files if file.path == manifest.tuned.initial) // _SMALLEST_VALUE_BYTES
    if elements > values:
        yield f"its parameters have {elements} elements, of which {manifest.tuned.initial} can hold {values}"
    shapes = {(graph.name, spec.name): spec.shape for graph in manifest.graphs for spec in graph.inputs}
    batch = manifest.batch
    embed = next((graph.name for graph in manifest.graphs if graph.role == "embed"), "embed")
    if shapes.get((embed, "noisy")) != (batch.rows, *batch.latent_shape):
        yield f"the graph embed does not take the batch's latents, {batch.rows} of {batch.latent_shape}"
    pixels = shapes.get((manifest.vae.encoder[0], "pixels"), ())
    if pixels[1:] != (3, batch.resolution, batch.resolution):
        yield f"the image encoder does not take images of {batch.resolution} pixels"
    for encoder in manifest.text_encoders:
        if encoder.tokens > MAX_TOKENS or shapes.get((encoder.graphs[0], "ids"), ())[1:] != (encoder.tokens,):
            yield f"text encoder {encoder.number} does not take {encoder.tokens} tokens"
