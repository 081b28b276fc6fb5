"""Write the inference model of a bundle as a folder for optimum's `ORTDiffusionPipeline`, a client that knows nothing of us.

The block graphs are joined into one denoiser with the names that optimum gives inputs and outputs; the trained LoRA becomes a
constant. Weights stay the files they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, helper, numpy_helper

from pocketune.errors import ModelError
from pocketune.models import mmdit
from pocketune.models.load import ModelFolder, open_model
from pocketune_edge.agreement import path_fault
from pocketune_edge.bundle import Bundle
from pocketune_edge.delta import load_result, neutral
from pocketune_edge.errors import BundleError
from pocketune_edge.manifest import Graph
from pocketune_export.bundle import check_new, new_folder

Names = Mapping[str, str]

_DENOISER_INPUTS = {
    "noisy": "hidden_states",
    "timesteps": "timestep",
    "prompt_hidden": "encoder_hidden_states",
    "prompt_pooled": "pooled_projections",
}
_COPIED = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")


def write_ort_pipeline(bundle: Bundle, out: Path, *, lora: Path | None = None, model: str | Path | None = None) -> None:
    """Write the folder.

    The graphs stay static: one image at the bundle's resolution. A bundle of two rows can be guided, one of one row cannot.

    Args:
        bundle: checked.
        out: does not exist.
        lora: a RUN folder or LoRA file of the bundle; default: the base model.
        model: what was exported, for configurations and tokenizers; default: the bundle's model name.

    Raises:
        BundleError: a graph of the bundle names a file outside it.
        LoraError: the LoRA is not one of the bundle.
        ModelError: there is no such model, or it is no Stable Diffusion 3, or has a text encoder other than CLIP, or the bundle
            trains scales.
        RunError: `out` exists, or cannot be written.
    """
    check_new(out)
    folder = open_model(model or bundle.manifest.model.name)
    if folder.family is not mmdit.FAMILY:
        msg = f"{folder.name} is a {folder.family.title}, which this folder cannot hold yet. Run it with pocketune-edge."
        raise ModelError(msg)
    if folder.has("text_encoder_3"):
        msg = f"{folder.name} has a T5 encoder, which this folder cannot hold yet. Run it with pocketune-edge."
        raise ModelError(msg)
    if bundle.manifest.tuned.method != "lora":
        msg = "scales follow the timestep, which one denoiser of this folder cannot. Sample with pocketune-edge."
        raise ModelError(msg)
    flat = neutral(bundle.manifest.tuned) if lora is None else load_result(bundle, lora).flat
    with new_folder(out) as partial:
        _write_parts(bundle, folder, flat, partial)


def _write_parts(bundle: Bundle, folder: ModelFolder, flat: NDArray[np.float32], out: Path) -> None:
    """All of the folder, into one that is there."""
    for part in _COPIED:
        if (folder.path / part).is_dir():
            shutil.copytree(folder.path / part, out / part)
    index = folder.index | {name: ["transformers", "CLIPTokenizerFast"] for name in ("tokenizer", "tokenizer_2")}
    _write_json(out / "model_index.json", index)
    _write(bundle, out / "transformer", _denoiser(bundle, flat), folder.denoiser_config)
    manifest = bundle.manifest
    decoder = _joined(bundle, manifest.named(manifest.vae.decoder), {"latents": "latent_sample"}, {"pixels": "sample"})
    # The graph itself unscales latents.
    _write(bundle, out / "vae_decoder", decoder, folder.vae_config | {"scaling_factor": 1.0, "shift_factor": 0.0})
    for encoder in manifest.text_encoders:
        name = "text_encoder" if encoder.number == 0 else f"text_encoder_{encoder.number + 1}"
        _write(bundle, out / name, _text_encoder(bundle, manifest.named(encoder.graphs)), _one_layer(folder, name))


def _denoiser(bundle: Bundle, flat: NDArray[np.float32]) -> ModelProto:
    manifest = bundle.manifest
    blocks = [piece for block in range(manifest.model.block_count) for piece in manifest.pieces("block_forward", block)]
    graphs = [manifest.graph("embed"), *blocks, manifest.graph("head")]
    constants = {f"{graph.name}/parameters": flat[slice(*graph.parameters)] for graph in graphs if graph.parameters is not None}
    return _joined(bundle, graphs, _DENOISER_INPUTS, {"prediction": "out_hidden_states"}, constants)


def _text_encoder(bundle: Bundle, graphs: list[Graph]) -> ModelProto:
    """With the outputs that optimum looks for; the pipeline uses the pooled one and the last but one hidden state."""
    outputs = {"pooled": "text_embeds", "hidden": "hidden_states.0"}
    joined = _joined(bundle, graphs, {"ids": "input_ids"}, outputs)
    joined.graph.output.sort(key=lambda port: port.name, reverse=True)  # text_embeds first: pipelines take output 0
    last = joined.graph.output.add()
    last.CopyFrom(next(port for port in joined.graph.output if port.name == "hidden_states.0"))
    last.name = "last_hidden_state"
    joined.graph.node.append(helper.make_node("Identity", ["hidden_states.0"], ["last_hidden_state"]))
    return joined


def _one_layer(folder: ModelFolder, name: str) -> dict[str, Any]:
    """A configuration that makes optimum expect no more hidden states than there are."""
    return folder.config(name) | {"num_hidden_layers": 1}


def _joined(
    bundle: Bundle,
    graphs: list[Graph],
    inputs: Names,
    outputs: Names,
    constants: Mapping[str, NDArray[np.float32]] | None = None,
) -> ModelProto:
    """One model of graphs that follow each other: what one gives as NAME or new_NAME, a later one takes as NAME.

    A new_NAME is for the graphs behind all pieces of a block; those pieces still take the NAME that enters it.

    Args:
        bundle: of the graphs.
        graphs: in order.
        inputs: new names of the inputs that no graph gives.
        outputs: new names of the results.
        constants: inputs that become initializers, by GRAPH/NAME.
    """
    result = GraphProto(name="main")
    current: dict[str, str] = {}
    leaving: dict[str, str] = {}
    for graph in graphs:
        if graph.part == 0:
            current |= leaving
            leaving = {}
        part = onnx.load_model_from_string(bundle.read(graph.file)).graph
        names: dict[str, str] = {}
        for port in part.input:
            own = f"{graph.name}/{port.name}"
            if constants and own in constants:
                names[port.name] = own
                result.initializer.append(numpy_helper.from_array(constants[own], own))
            elif port.name in current:
                names[port.name] = current[port.name]
            else:
                names[port.name] = current[port.name] = inputs[port.name]
                added = result.input.add()
                added.CopyFrom(port)
                added.name = inputs[port.name]
        for port in part.output:
            names[port.name] = outputs.get(port.name, f"{graph.name}/{port.name}")
            if port.name.startswith("new_"):
                leaving[port.name.removeprefix("new_")] = names[port.name]
            else:
                current[port.name] = names[port.name]
            if port.name in outputs:
                added = result.output.add()
                added.CopyFrom(port)
                added.name = outputs[port.name]
        _append(result, part, names, graph.name)
    opset = helper.make_opsetid("", bundle.manifest.opset)
    return helper.make_model(result, opset_imports=[opset], ir_version=8, producer_name="pocketune")


def _append(result: GraphProto, part: GraphProto, names: dict[str, str], prefix: str) -> None:
    """Add nodes and weights; every value without a name yet gets the graph's name before its own."""

    def renamed(name: str) -> str:
        return names.get(name, f"{prefix}/{name}") if name else ""

    for tensor in part.initializer:
        result.initializer.add().CopyFrom(tensor)
        result.initializer[-1].name = renamed(tensor.name)
    for node in part.node:
        added = result.node.add()
        added.CopyFrom(node)
        added.name = f"{prefix}/{node.name}"
        added.input[:] = [renamed(name) for name in node.input]
        added.output[:] = [renamed(name) for name in node.output]


def _write(bundle: Bundle, folder: Path, model: ModelProto, config: dict[str, Any]) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            fault = path_fault(entry.value)
            if fault is not None:
                msg = f"a graph of {bundle.path} reads another file: {fault}. Export the bundle again."
                raise BundleError(msg)
            if not (folder / entry.value).exists():
                (folder / entry.value).parent.mkdir(parents=True, exist_ok=True)
                (folder / entry.value).write_bytes(bundle.place(entry.value).read())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    _write_json(folder / "config.json", config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
