"""What bundles are made of: plain ONNX, the same bytes each time, weights in one form; nothing is altered unseen."""

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_edge.errors import BundleError
from pocketune_export.bundle import pack
from pocketune_export.exporter import export_trainable
from pocketune_export.quantize import MIN_ELEMENTS

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


def test_graphs_are_plain_onnx(bundles: Mapping[str, Bundle]) -> None:
    for bundle in bundles.values():
        for graph in bundle.manifest.graphs:
            model = onnx.load_model_from_string(bundle.read(graph.file))
            [imported] = model.opset_import
            assert (imported.domain, imported.version) == ("", bundle.manifest.opset)
            assert imported.version <= 20
            assert {node.domain for node in model.graph.node} <= {""}
            assert not model.functions


def test_the_same_model_and_recipe_give_the_same_bytes(
    bundles: Mapping[str, Bundle], small_model: ModelFolder, tmp_path: Path
) -> None:
    """Also where the first bundle was one of several that were written from one capture."""
    first, second = bundles["int4"].path, tmp_path / "int4"
    recipe = Recipe.create(instance_prompt="a photo of sks toy", skip="1")
    export_trainable(recipe=recipe, out=second, model=small_model.path, weights="int4", weight_block=32)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()] == []
    pack(first, tmp_path / "first.ptb")
    pack(second, tmp_path / "second.ptb")
    assert (tmp_path / "first.ptb").read_bytes() == (tmp_path / "second.ptb").read_bytes()


@pytest.mark.parametrize("storage", ["fp16", "int8", "int4"])
def test_no_matrix_becomes_float32_again(bundles: Mapping[str, Bundle], tmp_path: Path, storage: str) -> None:
    """Neither in the files nor in what ONNX Runtime makes of a graph when it loads it as the device does."""
    bundle = bundles[storage]
    for role in ("block_forward", "block_vjp", "train_step"):
        graph = bundle.manifest.graph(role, 2 if role.startswith("block") else None)  # type: ignore[arg-type]
        found = onnx.load_model_from_string(bundle.read(graph.file))
        assert large_floats(found) == []
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = str(tmp_path / f"{graph.name}.onnx")
        onnxruntime.InferenceSession(str(bundle.path / graph.file), options, providers=["CPUExecutionProvider"])
        assert large_floats(onnx.load(tmp_path / f"{graph.name}.onnx", load_external_data=False)) == []


def large_floats(model: onnx.ModelProto) -> list[str]:
    return [
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type in FLOATS and len(tensor.dims) > 1 and np.prod(tensor.dims) >= MIN_ELEMENTS
    ]


def test_alterations_of_an_archive_are_refused(bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    """One flipped bit, a cut or an added byte anywhere: refused, or without effect on what is used."""
    bundle, archive = bundles["int8"], tmp_path / "bundle.ptb"
    pack(bundle.path, archive)
    content = archive.read_bytes()
    rng = random.Random(0)
    refused = 0
    for number in range(60):
        place = rng.randrange(len(content))
        inserted = bytes([content[place] ^ (1 << rng.randrange(8))]) if number % 3 else b""
        end = b"" if number % 3 == 0 else content[place + (number % 3 == 1) :]
        archive.write_bytes(content[:place] + inserted + end)
        try:
            opened = open_bundle(archive)
        except BundleError:
            refused += 1
            continue
        assert all(opened.read(file.path) == bundle.read(file.path) for file in bundle.manifest.files)
    assert refused > 50
