"""Equal content gives equal bytes, and the library still reads them."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from pocketune.headers import with_sorted_metadata


def test_metadata_is_sorted_and_tensors_are_untouched(tmp_path: Path) -> None:
    tensors = {"b": np.arange(5, dtype=np.float32), "a": np.ones((2, 3), np.float16)}
    metadata = {name: name * 3 for name in ("zeta", "format", "alpha", "größe", "mid")}
    files = {with_sorted_metadata(save(tensors, metadata)) for _ in range(20)}
    assert len(files) == 1
    content = files.pop()
    length = int.from_bytes(content[:8], "little")
    assert list(json.loads(content[8 : 8 + length])["__metadata__"]) == sorted(metadata)
    assert length % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == metadata
        assert all(np.array_equal(file.get_tensor(name), tensors[name]) for name in tensors)
