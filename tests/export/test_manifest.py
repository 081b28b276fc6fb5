"""The manifest's schema file is current, and no manifest is written that devices do not read."""

from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pocketune.errors import PlanError
from pocketune_edge.agreement import MAX_MANIFEST_BYTES
from pocketune_export.bundle import seal
from pocketune_export.manifest import schema_json


def test_schema_file_is_the_models_schema() -> None:
    assert files("pocketune_export").joinpath("manifest.schema.json").read_text(encoding="utf-8") == schema_json()


def test_a_manifest_that_devices_do_not_read_is_not_written(tmp_path: Path) -> None:
    def of_size(size: int) -> Any:
        return SimpleNamespace(to_json=lambda: b" " * size)

    with pytest.raises(PlanError, match="devices read at most 33554432"):
        seal(tmp_path, of_size(MAX_MANIFEST_BYTES + 1))
    assert list(tmp_path.iterdir()) == []
    seal(tmp_path, of_size(MAX_MANIFEST_BYTES))
