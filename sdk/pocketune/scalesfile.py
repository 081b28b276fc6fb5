"""What a file of scales holds, told from the names, shapes and values of its tensors."""

from __future__ import annotations

from typing import Any

from pocketune.tensorfile import TensorFile


def describe_scales(file: TensorFile) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the values, one tensor at a time, and describe the scales.

    Returns:
        JSON-able facts, and notes on what a person should know, worst first.
    """
    statistics = {name: file.statistics(name) for name in file.tensors}
    broken = [name for name, of in statistics.items() if not of.finite]
    zero = [name for name, of in statistics.items() if of.zero]
    layers = {name.rsplit(".scales.", 1)[0] for name in file.tensors}
    facts: dict[str, Any] = {
        "denoiser": file.metadata.get("denoiser", "unknown"),
        "bits": file.metadata.get("bits", "unknown"),
        "quantizer": file.metadata.get("quantizer", "unknown"),
        "intervals": file.metadata.get("intervals", "unknown"),
        "layers": len(layers),
        "input_scales": any(name.endswith(".s_in") for name in file.tensors),
        "largest": max((of.largest for of in statistics.values() if of.largest is not None), default=None),
    }
    notes = []
    if broken:
        notes.append(f"{len(broken)} tensor(s) hold infinity or NaN, the first is {broken[0][:120]!r}: images will be broken.")
    if zero:
        notes.append(f"{len(zero)} tensor(s) are zero, which turns their layers off: images will be broken.")
    return facts, tuple(notes)
