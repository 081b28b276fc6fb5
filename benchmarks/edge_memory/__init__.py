"""Memory of the edge runtime: one fresh process a row, on the built-in model and on one of SD3.5-medium's true size."""

from pathlib import Path


def bundle_path(work: Path, model: str, weights: str) -> Path:
    """Where the bundle of a model lies while it is measured."""
    return work / f"{model}-{weights}"
