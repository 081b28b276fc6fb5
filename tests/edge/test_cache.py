"""The feature cache keeps whole shards, goes on after an interruption, and notices damage."""

from pathlib import Path

import numpy as np
import pytest

from pocketune.errors import CacheError
from pocketune.features import shards
from pocketune_edge.cache import FeatureCache, from_bfloat16, to_bfloat16


def features(seed: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((1, 4, 8)).astype(np.float32) for name in ("features_0_2_image", "features_0_2_text")}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_is_put_comes_back(tmp_path: Path, bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 250)
    cache = FeatureCache(tmp_path / "c", bfloat16=bfloat16)
    for draw in (1, 11, 2):
        assert draw not in cache
        cache.put(draw, features(draw))
        assert draw in cache
    cache.flush()
    assert len(list((tmp_path / "c").glob("shard-*.safetensors"))) == (2 if bfloat16 else 3)
    again = FeatureCache(tmp_path / "c", bfloat16=bfloat16)
    for draw in (1, 2, 11):
        found = again.get(draw)
        for name, value in features(draw).items():
            assert found[name].dtype == np.float32
            assert np.array_equal(found[name], from_bfloat16(to_bfloat16(value)) if bfloat16 else value)
    assert again.size_bytes == sum(path.stat().st_size for path in (tmp_path / "c").glob("shard-*"))


def test_only_finished_shards_survive(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "c", bfloat16=False)
    cache.put(1, features(1))
    cache.flush()
    cache.put(2, features(2))
    again = FeatureCache(tmp_path / "c", bfloat16=False)
    assert 1 in again and 2 not in again
    with pytest.raises(CacheError, match="no draw 2"):
        again.get(2)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "index", "escape", "other draw", "older index"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    cache = FeatureCache(tmp_path / "c", bfloat16=False)
    cache.put(1, features(1))
    cache.flush()
    shard, index = tmp_path / "c" / "shard-0000.safetensors", tmp_path / "c" / "index.json"
    content = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        shard.write_bytes(content[:-8])
    elif damage == "remove":
        shard.unlink()
    elif damage == "index":
        index.write_text("[1]")
    elif damage == "other draw":
        index.write_text(index.read_text().replace('"1":', '"2":'))
    elif damage == "older index":
        index.write_text(index.read_text().replace('"sums"', '"squared"'))
    else:
        shard.rename(tmp_path / "shard-0000.safetensors")
        index.write_text(index.read_text().replace("shard-0000", "../shard-0000"))
    with pytest.raises(CacheError, match="damaged"):
        FeatureCache(tmp_path / "c", bfloat16=False)
