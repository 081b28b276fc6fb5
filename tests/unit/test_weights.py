"""Weight stores and packed weights: exact where they promise it, and clear about damage."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pocketune.budget.tracing import LiveBytes
from pocketune.errors import ModelError, PlanError
from pocketune.models.hub import download
from pocketune.weights import quant
from pocketune.weights.files import weight_files
from pocketune.weights.packed import packed_copy
from pocketune.weights.prefetch import Prefetcher
from pocketune.weights.quant import pack, packed_bytes, unpack
from pocketune.weights.store import WeightStore


def matrix(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    bits=st.sampled_from([4, 8]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
)
def test_packing_rounds_to_half_a_step_and_keeps_zero(rows: int, groups: int, bits: int, scale: float, shift: float) -> None:
    values = (matrix(rows, groups * 8) + shift) * scale
    values[:, 0] = 0
    packed = pack(values, bits=bits, group=8)
    found = unpack(packed, torch.empty(values.shape))
    step = packed.scales.repeat_interleave(8, dim=1)
    # Half a step for the value and half a step for the zero, and float32's own rounding.
    assert ((found - values).abs() <= step * 1.001).all()
    assert (found[:, 0] == 0).all()
    size = packed.codes.nbytes + packed.scales.nbytes + packed.zeros.nbytes
    assert size == packed_bytes(rows, groups * 8, bits=bits, group=8)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8)])
def test_rows_are_packed_alike_in_one_slice_or_many(monkeypatch: pytest.MonkeyPatch, bits: int, group: int | None) -> None:
    matrix = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = pack(matrix, bits=bits, group=group)
    monkeypatch.setattr(quant, "SLICE_VALUES", 40)  # two rows, and a last one alone
    parts = pack(matrix, bits=bits, group=group)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales, whole.scales) and torch.equal(parts.zeros, whole.zeros)


def test_packing_a_constant_or_zero_matrix_is_exact() -> None:
    for value in (0.0, 2.5, -1.0):
        values = torch.full((3, 8), value)
        torch.testing.assert_close(unpack(pack(values, bits=4), torch.empty(3, 8)), values)


@pytest.mark.parametrize(("columns", "bits", "group"), [(10, 4, 4), (9, 4, 9), (8, 5, 8)])
def test_impossible_groups_are_refused(columns: int, bits: int, group: int) -> None:
    with pytest.raises(PlanError, match="cannot pack"):
        pack(matrix(2, columns), bits=bits, group=group)


def test_store_reads_every_part_of_every_shard(tmp_path: Path) -> None:
    tensors = {"a": matrix(100, 70).bfloat16(), "b": torch.arange(5), "c": torch.randn(16, 4, 3, 3)}
    save_file({"a": tensors["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, tmp_path / "model-00002-of-00002.safetensors")
    store = WeightStore(weight_files(tmp_path, name="a model"))
    assert set(store.names) == set(tensors)
    assert torch.equal(store.load("a", dtype=torch.float32), tensors["a"].float())
    assert torch.equal(store.load("b", dtype=torch.float32), tensors["b"])
    part = torch.empty(10, 30, 1)
    store.matrix("a").read(range(5, 15), range(40, 70), part)
    assert torch.equal(part.squeeze(2), tensors["a"][5:15, 40:70].float())
    kernel = torch.empty(2, 3, 9)
    store.matrix("c").read(range(1, 3), range(1, 4), kernel)
    assert torch.equal(kernel.view(2, 3, 3, 3), tensors["c"][1:3, 1:4])


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_copy_is_made_once_and_holds_what_packing_gives(tmp_path: Path, bits: int) -> None:
    weights = {"w": matrix(128, 192), "k": torch.randn(256, 64, 3, 3), "norm": torch.randn(2**20 + 7), "odd": matrix(128, 130)}
    save_file(weights, tmp_path / "model.safetensors")
    store = WeightStore([tmp_path / "model.safetensors"])
    path = packed_copy(store, ["w", "k", "odd"], bits=bits, fingerprint="x", folder=tmp_path / "cache")
    made = path.stat().st_mtime_ns
    assert packed_copy(store, ["w", "k", "odd"], bits=bits, fingerprint="x", folder=tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == made
    assert packed_copy(store, ["w", "k"], bits=bits, fingerprint="y", folder=tmp_path / "cache") != path
    copy = WeightStore([path])
    assert set(copy.names) == set(weights)
    for name in ("norm", "odd"):
        assert torch.equal(copy.load(name), weights[name])
    for name in ("w", "k"):
        flat = weights[name].flatten(1)
        expected = unpack(pack(flat, bits=bits, group=64 if bits == 4 else None), torch.empty(flat.shape))
        assert torch.equal(copy.load(name, dtype=torch.float32), expected.view(weights[name].shape))
    part = torch.empty(3, 64, 1)
    copy.matrix("w").read(range(2, 5), range(64, 128), part)
    assert torch.equal(part.squeeze(2), copy.load("w", dtype=torch.float32)[2:5, 64:128])


def test_packing_holds_no_whole_weight(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2048, 4096, dtype=torch.float16)}, tmp_path / "model.safetensors")
    store = WeightStore([tmp_path / "model.safetensors"])
    live = LiveBytes()
    with live:
        packed_copy(store, ["w"], bits=8, fingerprint="x", folder=tmp_path)
    assert 0 < live.peak_bytes < 2048 * 4096


def test_variants_beside_a_model_are_left_alone(tmp_path: Path) -> None:
    """A U-Net of Stable Diffusion 1.5 lies on the hub four times, each time whole."""
    variants = ("", ".fp16", ".non_ema", ".non_ema.fp16")
    for variant in variants:
        save_file({"w": matrix(2, 2)}, tmp_path / f"diffusion_pytorch_model{variant}.safetensors")
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors.index.json").write_text("{}")
    assert weight_files(tmp_path, name="it") == [tmp_path / "diffusion_pytorch_model.safetensors"]
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "diffusion_pytorch_model.non_ema.safetensors").unlink()
    assert weight_files(tmp_path, name="it") == [tmp_path / "diffusion_pytorch_model.fp16.safetensors"]


def test_what_is_downloaded_of_a_hub_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [
        *(f"unet/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16", ".non_ema")),
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "text_encoders/t5xxl_fp16.safetensors",
        "sd3.5_medium.safetensors",
        "model_index.json",
    ]
    asked: dict[str, Any] = {}

    def download_all(hub_id: str, **given: Any) -> str:
        asked.update(given)
        return str(tmp_path)

    def wanted() -> list[str]:
        assert download("owner/name") == tmp_path
        return list(huggingface_hub.utils.filter_repo_objects(names, **asked))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_all)
    files = [SimpleNamespace(rfilename=name) for name in names]
    monkeypatch.setattr(huggingface_hub, "model_info", lambda _: SimpleNamespace(siblings=files))
    kept = ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors", "model_index.json"]
    assert wanted() == kept

    def offline(_: str) -> None:
        raise huggingface_hub.errors.OfflineModeIsEnabled

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    assert wanted() == [kept[0], kept[2]]

    logger = logging.getLogger("huggingface_hub.some_module")
    assert logger.isEnabledFor(logging.WARNING)

    def missing(*_: Any, **__: Any) -> str:
        assert not logger.isEnabledFor(logging.WARNING)
        raise OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(ModelError, match="cannot download owner/name: OSError; there is no folder owner/name here"):
        download("owner/name")
    assert logger.isEnabledFor(logging.WARNING)


def test_damage_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no safetensors"):
        weight_files(tmp_path, name="it")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    save_file({"a": matrix(2, 2)}, tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files .* first two.safetensors"):
        weight_files(tmp_path, name="it")
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(ModelError, match="outside of its folder"):
        weight_files(tmp_path, name="it")
    save_file({"a": matrix(2, 2)}, tmp_path / "copy.safetensors")
    with pytest.raises(ModelError, match="both hold a"):
        WeightStore([tmp_path / "one.safetensors", tmp_path / "copy.safetensors"])
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-3])
    with pytest.raises(ModelError, match="damaged"):
        WeightStore([tmp_path / "copy.safetensors"])


def test_prefetcher_asks_for_what_followed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({name: matrix(64, 64) for name in "abc"}, tmp_path / "model.safetensors")
    store = WeightStore([tmp_path / "model.safetensors"])
    a, b, c = (store.matrix(name) for name in "abc")
    prefetcher = Prefetcher()
    asked: list[object] = []
    monkeypatch.setattr(prefetcher, "_ask", asked.append)
    for used in (a, b, c, a, b, c):
        prefetcher.using(used)
    assert asked == [c, a]
    asked.clear()
    for used in (c, b, a, c, b, a):
        prefetcher.using(used)
    assert asked == [a, c]
