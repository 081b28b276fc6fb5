"""The manifest's schema file is current, and contradictions are refused."""

from importlib.resources import files

from pocketune_export.manifest import schema_json


def test_schema_file_is_the_models_schema() -> None:
    assert files("pocketune_export").joinpath("manifest.schema.json").read_text(encoding="utf-8") == schema_json()
