"""The law of the exporter: a bundle trains as PyTorch does, in one graph and block by block, however its weights are stored."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest

from pocketune.models.load import ModelFolder
from pocketune_edge.bundle import Bundle
from pocketune_edge.delta import Adapter
from pocketune_edge.state import fresh_state
from pocketune_export.verify import TOLERANCE, open_steps, random_batch, verify
from tests.export.conftest import Exporting

STEPS = 20


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8", "int4"])
def test_twenty_steps_equal_pytorch(bundles: Mapping[str, Bundle], small_model: ModelFolder, storage: str) -> None:
    found = verify(bundles[storage], model=small_model.path, steps=STEPS)
    assert found.passed, (found.worst_parameter, found.parameters[found.worst_parameter], found.loss)
    assert found.parameters[found.worst_parameter] <= TOLERANCE
    trained = [parameter.name for parameter in bundles[storage].manifest.tuned.parameters]
    assert sorted(found.gradients) == sorted(found.parameters) == sorted(trained)


def test_storages_differ(bundles: Mapping[str, Bundle]) -> None:
    """Else the tests above would compare the same weights four times."""
    losses = {}
    for name, bundle in bundles.items():
        given = {key: tensor.numpy() for key, tensor in random_batch(bundle.manifest, seed=3).items()}
        state = fresh_state(Adapter(np.full(bundle.manifest.tuned.flat_elements, 0.01, np.float32), {}))
        losses[name] = open_steps(bundle)(state, [given]).state.losses[0]
    assert len(set(losses.values())) == len(losses)
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=1e-3)
    assert losses["int4"] == pytest.approx(losses["fp32"], rel=0.2)


@pytest.mark.parametrize("storage", ["fp32", "int4"])
def test_streaming_equals_one_graph(bundles: Mapping[str, Bundle], storage: str) -> None:
    bundle = bundles[storage]
    whole, parts = open_steps(bundle), open_steps(bundle, "streaming")
    generator = np.random.default_rng(1)
    start = (generator.standard_normal(bundle.manifest.tuned.flat_elements) * 0.05).astype(np.float32)
    state = fresh_state(Adapter(start, {}))
    for number in (1, 2):
        given = {name: tensor.numpy() for name, tensor in random_batch(bundle.manifest, seed=number).items()}
        first, second = (take_step(state, [given]) for take_step in (whole, parts))
        assert second.state.losses == pytest.approx(first.state.losses, rel=1e-6)
        largest = np.abs(first.gradients).max()
        np.testing.assert_allclose(second.gradients, first.gradients, rtol=0, atol=1e-6 * largest)
        np.testing.assert_allclose(second.state.parameters, first.state.parameters, rtol=0, atol=TOLERANCE)
        state = first.state


def test_blocks_in_pieces_train_alike(
    bundle_in_pieces: Bundle, small_model: ModelFolder, bundles: Mapping[str, Bundle]
) -> None:
    """Large blocks are cut so that less of their weights is mapped at once; here small ones are."""
    bundle = bundle_in_pieces
    for role in ("block_forward", "block_vjp"):
        pieces = bundle.manifest.pieces(role, 2)  # type: ignore[arg-type]
        [whole] = bundles["fp32"].manifest.pieces(role, 2)  # type: ignore[arg-type]
        assert [piece.part for piece in pieces] == list(range(len(pieces)))
        assert max(piece.weight_bytes for piece in pieces) < whole.weight_bytes / 2
    assert bundle.manifest.memory.streaming_mapped < bundles["fp32"].manifest.memory.streaming_mapped
    found = verify(bundle, model=small_model.path, steps=3, mode="streaming")
    assert found.passed, (found.worst_parameter, found.parameters[found.worst_parameter], found.loss)
    total = sum(path.stat().st_size for path in bundle.path.glob("weights/*"))
    assert total == sum(path.stat().st_size for path in bundles["fp32"].path.glob("weights/*"))


def test_verification_finds_a_wrong_weight(bundles: Mapping[str, Bundle], small_model: ModelFolder) -> None:
    """A changed weight must show, or passing would mean nothing."""
    bundle = bundles["fp32"]
    path = bundle.path / "weights/block-02.bin"
    original = path.read_bytes()
    try:
        weights = np.frombuffer(original, np.float32).copy()
        weights[:64] += 0.01
        path.write_bytes(weights.tobytes())
        assert not verify(bundle, model=small_model.path, steps=2).passed
    finally:
        path.write_bytes(original)


def test_weights_are_stored_once(bundles: Mapping[str, Bundle]) -> None:
    """All graphs that read a weight read it at one place, and every matrix of a quantized bundle is there in no other form."""
    for storage, bundle in bundles.items():
        places: dict[str, tuple[str, ...]] = {}
        for graph in bundle.manifest.graphs:
            model = onnx.load_model_from_string(bundle.read(graph.file))
            for tensor in model.graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    place = tuple(entry.value for entry in tensor.external_data)
                    assert places.setdefault(tensor.name, place) == place
        assert len(set(places.values())) == len(places)
        matrix = "transformer.transformer_blocks.2.attn.to_q.weight"
        expected = matrix if storage in ("fp32", "fp16") else f"{matrix}.{storage}.weight"
        assert [name for name in places if name.startswith(matrix) and "scale" not in name] == [expected]


def test_edges_of_the_model_can_be_skipped(export_small: Exporting, small_model: ModelFolder) -> None:
    """A skipped prefix and suffix, where the last trained block's text is used by nobody; class images; the plain loss."""
    settings = {
        "skip": "0,2",
        "class_prompt": "a toy",
        "prior_loss_weight": 0.5,
        "batch_size": 2,
        "precondition_outputs": False,
    }
    bundle = export_small(**settings)["fp32"]
    untouched = [parameter.name for parameter in bundle.manifest.tuned.parameters if parameter.offset is None]
    assert {name.split(".lora_")[0] for name in untouched} == {"transformer_blocks.1.attn.to_add_out"}
    for mode in ("one graph", "streaming"):
        found = verify(bundle, model=small_model.path, steps=3, mode=mode)  # type: ignore[arg-type]
        assert found.passed, (mode, found.worst_parameter, found.parameters[found.worst_parameter])
