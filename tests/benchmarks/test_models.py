"""What rows of measurements call a model."""

from pathlib import Path

import pytest

from benchmarks.models import checkpoint_id


@pytest.mark.parametrize("part", ["transformer", "unet"])
def test_rows_of_earlier_measurements_name_the_same_checkpoint(part: str, tmp_path: Path) -> None:
    for name, content in (
        (f"{part}/a.safetensors", b"first"),
        (f"{part}/b.safetensors", b"second"),
        ("vae/c.safetensors", b""),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert checkpoint_id(tmp_path) == "da83f63e1a47"
