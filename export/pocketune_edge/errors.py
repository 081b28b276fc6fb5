"""Every error that the edge runtime raises on purpose: what was found, what was expected, and the next step.

They are Pocketune's errors too, so one `except PocketuneError` serves both. Photos, runs, plans and caches have errors there.
"""

from __future__ import annotations

from pocketune.errors import PocketuneError


class EdgeError(PocketuneError):
    """Base of the errors of this package."""


class BundleError(EdgeError):
    """A bundle is damaged, hostile, of a newer version, or not a bundle."""


class SettingError(EdgeError):
    """A value given for a run makes no sense, or needs another bundle."""


class RuntimeFault(EdgeError):  # noqa: N818 - "RuntimeError" is taken
    """ONNX Runtime refused a graph or failed in it."""


class LoraError(EdgeError):
    """A LoRA file is damaged or does not belong to the bundle."""
