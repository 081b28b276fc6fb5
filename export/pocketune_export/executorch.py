"""Lower a capture to ExecuTorch: the seam of a second backend. It takes the same captures as ONNX, and nothing of ONNX's.

Bundles for ExecuTorch are not written yet; a program holds one graph and its frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn

from pocketune_export.capture import DTYPES, Capture


def lower(capture: Capture, load: Callable[[str], Tensor], *, delegate: bool = True) -> bytes:
    """A program (.pte) whose method "forward" takes the capture's inputs in order and gives its outputs in order.

    Args:
        capture: left as it is.
        load: a frozen weight by name; it is kept in float32.
        delegate: give XNNPACK what it takes; otherwise portable kernels compute everything.
    """
    examples = tuple(torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]) for spec in capture.inputs)
    program = torch.export.export(_WithWeights(capture, load), examples, strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()] if delegate else None)
    content: bytes = lowered.to_executorch().buffer
    return content


class _WithWeights(nn.Module):
    """A capture as a module that holds its weights."""

    def __init__(self, capture: Capture, load: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.captured = capture.module  # not "graph", which is an attribute of every module that export makes
        self.names = [name.replace(".", "_") for name in capture.weights]
        for own, name in zip(self.names, capture.weights, strict=True):
            derived = capture.derived.get(name)
            value = load(name) if derived is None else derived.make(load(derived.base))
            self.register_buffer(own, value.to(torch.float32) if value.is_floating_point() else value)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph."""
        results: tuple[Tensor, ...] = self.captured(*inputs, *(self.get_buffer(name) for name in self.names))
        return results
