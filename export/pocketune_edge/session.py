"""Graphs on stock ONNX Runtime, opened and closed so that only what is needed is in memory.

The graphs of a bundle are final. The runtime's optimizations, prepacking and arena are off: they would copy mapped weights into
anonymous memory, unfold fp16 to fp32, and undo the recomputation of activations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketune_edge.bundle import Bundle
from pocketune_edge.errors import RuntimeFault, SettingError
from pocketune_edge.manifest import Graph

Array = NDArray[Any]
Values = Mapping[str, Array]

_DTYPES = {"float32": np.dtype(np.float32), "int64": np.dtype(np.int64)}


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that the runtime would take for another one.

    Raises:
        SettingError: it is not between 1 and 1024.
    """
    if threads is not None and not 1 <= threads <= 1024:
        msg = f"the number of threads must be between 1 and 1024, got {threads}."
        raise SettingError(msg)


class Session:
    """One opened graph."""

    def __init__(self, bundle: Bundle, graph: Graph, *, threads: int | None) -> None:
        """Load the graph and map its weights.

        Raises:
            RuntimeFault: the runtime refuses it.
        """
        self.graph = graph
        content, folder = bundle.model(graph)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        options.add_session_config_entry("session.load_model_format", "ONNX")  # not what the bytes claim to be
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            self._session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has a dozen exception types of its own, without a common base
            msg = f"ONNX Runtime {ort.__version__} cannot load {graph.file} of {bundle.path}: {_first_line(error)}"
            raise RuntimeFault(msg) from error

    def run(self, values: Values) -> dict[str, Array]:
        """Run the graph.

        Args:
            values: by name, all that the graph takes; more is passed over.

        Raises:
            RuntimeFault: an input is missing or has another shape or dtype, or the graph fails.
        """
        feeds = {}
        for spec in self.graph.inputs:
            value = values.get(spec.name)
            if value is None or value.shape != spec.shape or value.dtype != _DTYPES[spec.dtype]:
                got = "nothing" if value is None else f"{value.dtype} {value.shape}"
                msg = f"graph {self.graph.name} takes {spec.name} as {spec.dtype} {spec.shape}, got {got}. Please report this."
                raise RuntimeFault(msg)
            feeds[spec.name] = np.ascontiguousarray(value).reshape(spec.shape)
        names = [spec.name for spec in self.graph.outputs]
        try:
            results = self._session.run(names, feeds)
        except Exception as error:  # as above
            msg = f"ONNX Runtime {ort.__version__} failed in {self.graph.file}: {_first_line(error)}"
            raise RuntimeFault(msg) from error
        return dict(zip(names, results, strict=True))

    def close(self) -> None:
        """Give its memory back, whoever still holds this object."""
        del self._session


class Sessions:
    """Opens graphs of a bundle. With `keep`, what was opened stays open; without, it is closed after use."""

    def __init__(self, bundle: Bundle, *, keep: bool, threads: int | None = None) -> None:
        """Nothing is opened yet. threads: of the runtime; None leaves the choice to it."""
        self.bundle = bundle
        self._keep = keep
        self._threads = threads
        self._open: dict[str, Session] = {}

    @contextmanager
    def opened(self, graph: Graph) -> Iterator[Session]:
        """A graph, open within the block."""
        session = self._open.get(graph.name) or Session(self.bundle, graph, threads=self._threads)
        if self._keep:
            self._open[graph.name] = session
        try:
            yield session
        finally:
            if not self._keep:
                session.close()

    def run(self, graph: Graph, values: Values) -> dict[str, Array]:
        """Run a graph once."""
        with self.opened(graph) as session:
            return session.run(values)

    def run_parts(self, graphs: Sequence[Graph], values: Values, wanted: Collection[str]) -> dict[str, Array]:
        """Run the parts of one whole one after the other, each on what was given and what earlier parts gave.

        Args:
            graphs: the parts in order; with streaming, one is in memory at a time.
            values: by name, what is given.
            wanted: names of the results; those that no part gives are absent.
        """
        return self.run_parts_of_all(graphs, [values], wanted)[0]

    def run_parts_of_all(
        self, graphs: Sequence[Graph], batches: Sequence[Values], wanted: Collection[str]
    ) -> list[dict[str, Array]]:
        """As `run_parts` for each of `batches`; every graph is opened once for all."""
        known = [dict(values) for values in batches]
        for number, graph in enumerate(graphs):
            needed = {spec.name for later in graphs[number + 1 :] for spec in later.inputs}.union(wanted)
            with self.opened(graph) as session:
                for place, values in enumerate(known):
                    found = values | session.run(values)
                    known[place] = {name: value for name, value in found.items() if name in needed}
        return known

    def close(self) -> None:
        """Close what stayed open."""
        for session in self._open.values():
            session.close()
        self._open.clear()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0][:300]}. Export the bundle again, or update onnxruntime."
