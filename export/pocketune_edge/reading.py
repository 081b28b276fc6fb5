"""Reads a bundle's manifest from bytes that anyone may have written."""

from __future__ import annotations

import json

from pocketune.units import readable_size
from pocketune_edge.agreement import (
    MAX_MANIFEST_BYTES,
    SCHEMA_MINOR,
    SCHEMA_VERSION,
    graph_faults,
    parameter_faults,
    plan_faults,
    size_faults,
    tensor_faults,
)
from pocketune_edge.errors import BundleError
from pocketune_edge.manifest import Manifest
from pocketune_edge.strict import MisfitError, read


def read_manifest(content: bytes, where: str) -> Manifest:
    """Check and read a manifest.

    Args:
        content: of `manifest.json`.
        where: how messages name the bundle.

    Raises:
        BundleError: it is no manifest, of a newer schema, or contradicts itself.
    """
    if len(content) > MAX_MANIFEST_BYTES:
        most = readable_size(MAX_MANIFEST_BYTES)
        msg = f"{where} has a manifest of {readable_size(len(content))}; at most {most} are read. It is not a bundle."
        raise BundleError(msg)
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        msg = f"{where} has a damaged manifest ({str(error)[:100]}). Copy or export the bundle again."
        raise BundleError(msg) from error
    schema = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > SCHEMA_VERSION:
        msg = f"{where} has schema version {schema}; this Pocketune reads up to {SCHEMA_VERSION}. Update Pocketune."
        raise BundleError(msg)
    minor = raw.get("schema_minor", 0) if isinstance(raw, dict) else None
    if isinstance(minor, int) and minor > SCHEMA_MINOR:
        known = f"{SCHEMA_VERSION}.{SCHEMA_MINOR}"
        msg = f"{where} has schema version {schema}.{minor}; this Pocketune reads up to {known}. Update Pocketune."
        raise BundleError(msg)
    try:
        manifest = read(Manifest, raw, older=minor != SCHEMA_MINOR)
    except MisfitError as error:
        msg = f"{where} has an invalid manifest: {str(error)[:300]}. Copy or export the bundle again."
        raise BundleError(msg) from error
    for fault in _faults(manifest):
        msg = f"{where} has a manifest that contradicts itself: {fault[:300]}. Copy or export the bundle again."
        raise BundleError(msg)
    return manifest


def _faults(manifest: Manifest) -> list[str]:
    """What contradicts itself."""
    faults = [*plan_faults(manifest), *parameter_faults(manifest.tuned), *graph_faults(manifest), *size_faults(manifest)]
    return faults + [fault for graph in manifest.graphs for fault in tensor_faults(graph)]
