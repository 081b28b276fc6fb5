"""Run a bundle's training steps on ONNX Runtime, in one graph or block by block, as `docs/bundle.md` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pocketune_export.bundle import Bundle
from pocketune_export.manifest import Graph, Role, Span

Array = NDArray[Any]
Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class State:
    """Flat float32 vectors: LoRA matrices and AdamW's moments."""

    parameters: Array
    exp_avg: Array
    exp_avg_sq: Array

    @classmethod
    def start(cls, parameters: Array) -> State:
        """Before the first step."""
        return cls(parameters, np.zeros_like(parameters), np.zeros_like(parameters))

    def as_inputs(self) -> dict[str, Array]:
        """As graphs take them."""
        return {"parameters": self.parameters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


@dataclass(frozen=True)
class Stepped:
    """The result of one step."""

    loss: float
    gradients: Array
    state: State


StepFunction = Callable[[State, Arrays], Stepped]


def open_session(bundle: Bundle, graph: Graph) -> onnxruntime.InferenceSession:
    """Load a graph as it is: weights stay mapped from their files, nothing is packed, folded or fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(bundle.path(graph.file)), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, graph: Graph, given: Arrays) -> dict[str, Array]:
    """Run a graph on those of the given arrays that it takes."""
    results = session.run(None, {spec.name: given[spec.name] for spec in graph.inputs})
    return dict(zip((spec.name for spec in graph.outputs), results, strict=True))


def hyper_parameters(bundle: Bundle, step: int) -> dict[str, Array]:
    """The scalars of a step, 1 at first, as the manifest sets them."""
    optimizer = bundle.manifest.optimizer
    names = ("learning_rate", "weight_decay", "epsilon", "max_grad_norm")
    return {"step": np.array(step, np.int64)} | {name: np.array(getattr(optimizer, name), np.float32) for name in names}


def one_graph(bundle: Bundle) -> StepFunction:
    """Steps by the graph `train_step`."""
    graph = bundle.manifest.graph("train_step")
    session = open_session(bundle, graph)

    def step(state: State, given: Arrays) -> Stepped:
        results = run(session, graph, {**given, **state.as_inputs()})
        return Stepped(float(results["loss"]), results["gradients"], _updated(results))

    return step


def streaming(bundle: Bundle) -> StepFunction:
    """Steps by the graphs of single blocks; each is opened, run and closed."""
    manifest = bundle.manifest

    def call(role: Role, block: int | None, given: Arrays, state: State) -> dict[str, Array]:
        graph = manifest.graph(role, block)
        part = {"parameters": state.parameters[slice(*graph.parameters)]} if graph.parameters else {}
        return run(open_session(bundle, graph), graph, {**given, **part})

    def step(state: State, given: Arrays) -> Stepped:
        sigmas = given["sigmas"].reshape(-1, 1, 1, 1)
        noisy = (1 - sigmas) * given["latents"] + sigmas * given["noise"]
        streams = call("embed", None, {**given, "noisy": noisy}, state)
        embedding = {"embedding": streams.pop("embedding")}
        entered: dict[int, dict[str, Array]] = {}
        for span in manifest.plan.spans:
            if span.skipped:
                streams = _skip(streams, span, given)
                continue
            for block in range(span.start, span.stop):
                entered[block] = streams
                leaving = call("block_forward", block, {**streams, **embedding}, state)
                streams = {name.removeprefix("new_"): stream for name, stream in leaving.items()}
        results = call("head_loss", None, {**given, **streams, **embedding}, state)
        loss = float(results.pop("loss"))
        gradients = np.zeros_like(state.parameters)
        backward = {graph.block: graph for graph in manifest.graphs if graph.role == "block_vjp"}
        for block in reversed([block for block in entered if block in backward]):
            passed = {name.replace("grad_", "grad_new_"): gradient for name, gradient in results.items()}
            results = call("block_vjp", block, {**entered[block], **embedding, **passed}, state)
            place = backward[block].parameters
            if place is not None:
                gradients[slice(*place)] = results.pop("gradients")
        updated = call("adamw", None, {**given, **state.as_inputs(), "gradients": gradients}, state)
        return Stepped(loss, gradients, _updated(updated))

    return step


def _skip(streams: dict[str, Array], span: Span, given: Arrays) -> dict[str, Array]:
    """Put the cached features of a skipped span in its place; a stream without a feature ends in the span."""
    if not span.features:
        return streams
    prefix = f"features_{span.start}_{span.stop}_"
    cached = {name.removeprefix(prefix): given[name] for name in span.features}
    return cached if span.start == 0 else {name: streams[name] + cached[name] for name in cached}


def _updated(results: Arrays) -> State:
    return State(results["new_parameters"], results["new_exp_avg"], results["new_exp_avg_sq"])
