"""Read a manifest that may come from anywhere."""

from __future__ import annotations

import json

from pydantic import ValidationError

from pocketune.errors import FileFormatError
from pocketune_export.manifest import SCHEMA_VERSION, Manifest

MAX_MANIFEST_BYTES = 32 * 2**20


def read_manifest(content: bytes, where: str) -> Manifest:
    """Check and read a manifest.

    Args:
        content: of `manifest.json`.
        where: how messages name the bundle.

    Raises:
        FileFormatError: it is no manifest, of a newer schema, or contradicts itself.
    """
    if len(content) > MAX_MANIFEST_BYTES:
        msg = f"{where} has a manifest of {len(content)} bytes; at most {MAX_MANIFEST_BYTES} are read. It is not a bundle."
        raise FileFormatError(msg)
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        msg = f"{where} has a damaged manifest ({str(error)[:100]}). Copy or export the bundle again."
        raise FileFormatError(msg) from error
    schema = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > SCHEMA_VERSION:
        msg = f"{where} has schema version {schema}; this Pocketune reads up to {SCHEMA_VERSION}. Update Pocketune."
        raise FileFormatError(msg)
    try:
        return Manifest.model_validate_json(content)
    except (ValidationError, RecursionError) as error:
        faults = error.errors() if isinstance(error, ValidationError) else []
        first = f"{'.'.join(map(str, faults[0]['loc'])) or 'manifest'}: {faults[0]['msg']}" if faults else "nested too deep"
        msg = f"{where} has an invalid manifest: {first[:300]}. Copy or export the bundle again."
        raise FileFormatError(msg) from error
