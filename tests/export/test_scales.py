"""The law of bundles over packed weights: scales and LoRA train as PyTorch's do, and the weights stay packed in the graphs."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from torch import Tensor

from pocketune.models.load import ModelFolder
from pocketune.weights.quant import Packed
from pocketune.weights.quantizers import QUANTIZERS, minmax
from pocketune_edge.bundle import Bundle
from pocketune_edge.delta import neutral, start_values
from pocketune_edge.state import fresh_state
from pocketune_edge.steps import Mode
from pocketune_export.verify import TOLERANCE, open_steps, random_batch, verify
from tests.export.conftest import Exporting

KINDS: dict[str, dict[str, object]] = {
    "scales of a block": {"method": "scales", "weight_bits": 4, "skip": "0,2", "scale_intervals": 3, "batch_size": 2},
    "peqa": {"method": "scales", "weight_bits": 8, "skip": "0,2", "scale_intervals": 1, "scale_inputs": False},
    # Adam divides by gradients of any size: where softmax all but cancels them, rounding moves scales by a share of the rate.
    "all scales": {"method": "scales", "weight_bits": 8, "scale_learning_rate": 1e-3},
    "zeroth order": {"method": "scales", "weight_bits": 8, "gradient": "zeroth_order", "zo_learning_rate": 1e-3},
    "lora": {"weight_bits": 4, "skip": "0,2"},
}


FAST = "scales of a block"


@pytest.fixture(scope="module")
def bundle_of(export_small: Exporting) -> Callable[[str], Bundle]:
    """Exports a kind when a test first asks for it."""
    return cache(lambda kind: export_small(**KINDS[kind])["fp32"])


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("scales of a block", "one graph"),
        ("scales of a block", "streaming"),
        pytest.param("peqa", "streaming", marks=pytest.mark.slow),
        pytest.param("all scales", "one graph", marks=pytest.mark.slow),
        pytest.param("all scales", "streaming", marks=pytest.mark.slow),
        pytest.param("zeroth order", "streaming", marks=pytest.mark.slow),
        pytest.param("lora", "one graph", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_equal_pytorch(
    bundle_of: Callable[[str], Bundle], small_model: ModelFolder, kind: str, mode: Mode
) -> None:
    """PyTorch's side trains its own packed layers, which share no code with the graphs."""
    found = verify(bundle_of(kind), model=small_model.path, steps=20, mode=mode)
    assert found.passed, (found.worst_parameter, found.parameters[found.worst_parameter], found.worst_gradient, found.loss)
    assert bool(found.gradients) == (kind != "zeroth order")


def test_every_interval_trains_its_own(bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of(FAST)
    tuned, state = bundle.manifest.tuned, fresh_state(start_values(bundle), intervals=3)
    given = {name: tensor.numpy() for name, tensor in random_batch(bundle.manifest, seed=0).items()}
    after = open_steps(bundle)(state, [given | {"timesteps": np.array([900.0, 20.0], np.float32)}]).state
    moved = [float(np.abs(after.parameters - 1)[tuned.place(interval)].max()) for interval in range(3)]
    assert moved[0] > 50 * TOLERANCE and moved[1] == 0 and moved[2] > 50 * TOLERANCE
    assert after.updates == (1, 0, 1)


def test_fresh_scales_change_nothing(bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of(FAST)
    assert np.array_equal(start_values(bundle).flat, neutral(bundle.manifest.tuned))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind != FAST else ()) for kind in KINDS])
def test_packed_weights_are_stored_once_and_dequantized_where_used(bundle_of: Callable[[str], Bundle], kind: str) -> None:
    bits = KINDS[kind]["weight_bits"]
    name = f"transformer.transformer_blocks.1.attn.to_q.weight.packed{bits}.weight"
    readers = 0
    for graph in bundle_of(kind).manifest.graphs:
        model = onnx.load_model_from_string(bundle_of(kind).read(graph.file))
        found = {tensor.name: tensor for tensor in model.graph.initializer}
        assert not any(
            key.startswith("transformer.transformer_blocks.1.attn.to_q.weight") and "packed" not in key for key in found
        )
        if name in found:
            readers += 1
            assert found[name].data_type == TensorProto.UINT8
            assert list(found[name].dims) == [64, 64 * int(str(bits)) // 8]
    assert readers >= 2


@pytest.mark.slow
def test_zeros_that_a_quantizer_fits_need_not_be_whole(
    export_small: Exporting, small_model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of torchao's HQQ, which is not needed here."""

    def fitted(matrix: Tensor, bits: int) -> Packed:
        packed = minmax(matrix, bits)
        return replace(packed, zeros=packed.zeros.float() + 0.25)

    monkeypatch.setitem(QUANTIZERS, "hqq", fitted)
    bundle = export_small(weight_bits=4, quantizer="hqq", skip="0,2")["fp32"]
    assert verify(bundle, model=small_model.path, steps=3).passed
