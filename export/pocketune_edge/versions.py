"""Versions of libraries, where an app may have brought them without the metadata of their distributions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

UNKNOWN = "unknown"


def installed_version(distribution: str) -> str:
    """The version of a distribution, or "unknown" where it has another name or no metadata."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return UNKNOWN
