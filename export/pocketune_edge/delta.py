"""The LoRA of a bundle: its start values, and files that stock diffusers loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from pocketune.atomic import replacing
from pocketune.headers import with_sorted_metadata
from pocketune_edge.bundle import Bundle
from pocketune_edge.denoiser import Floats
from pocketune_edge.errors import BundleError, LoraError
from pocketune_edge.manifest import Lora

LORA_FILE = "pytorch_lora_weights.safetensors"
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Adapter:
    """The values of a LoRA.

    Attributes:
        flat: the vector that the graphs take.
        fixed: by name, the parameters that no loss depends on and that keep their start values.
    """

    flat: Floats
    fixed: dict[str, Floats]


def start_values(bundle: Bundle) -> Adapter:
    """The values that the bundle starts from.

    Raises:
        BundleError: they do not fit its manifest.
    """
    place = bundle.place(bundle.manifest.lora.initial)
    if place.size > _MAX_HEADER_BYTES + 8 * sum(_elements(bundle.manifest.lora)):
        msg = f"{bundle.path} has start values of an impossible size. Export the bundle again."
        raise BundleError(msg)
    try:
        tensors, _ = _parse(place.read())
        return _adapter(bundle.manifest.lora, tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"the start values of {bundle.path} do not fit its manifest ({str(error)[:200]}). Export the bundle again."
        raise BundleError(msg) from error


def save_lora(bundle: Bundle, adapter: Adapter, folder: Path) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors`, in the form of the bundle's start values, whole or not at all."""
    _, metadata = _parse(bundle.read(bundle.manifest.lora.initial))
    values = by_name(bundle.manifest.lora, adapter.flat) | adapter.fixed
    tensors = {parameter.key: values[parameter.name] for parameter in bundle.manifest.lora.parameters}
    path = folder / LORA_FILE
    with replacing(path) as partial:
        partial.write_bytes(with_sorted_metadata(save(tensors, metadata)))
    return path


def load_lora(bundle: Bundle, path: str | Path) -> Adapter:
    """Read a LoRA file that belongs to the bundle's model and blocks.

    Args:
        bundle: says which tensors there must be.
        path: a file, a folder that holds one, or a RUN folder.

    Raises:
        LoraError: it is missing, damaged, or of other blocks, rank or strength than the bundle's.
    """
    file = _find(Path(path))
    lora = bundle.manifest.lora
    try:
        with safe_open(file, framework="np") as opened:  # the library checks the header before anything is read
            metadata = opened.metadata() or {}
            keys = {parameter.key for parameter in lora.parameters}
            strange = sorted(set(opened.keys()) - keys)
            if strange:
                msg = f"it has {strange[0][:120]}, which the bundle does not train"
                raise ValueError(msg)
            tensors = {key: opened.get_tensor(key) for key in sorted(keys)}
        _check_strength(metadata, lora)
        return _adapter(lora, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"the LoRA {file} does not fit the bundle {bundle.path} ({str(error)[:200]}). Use a LoRA trained with it."
        raise LoraError(msg) from error


def by_name(lora: Lora, flat: Floats) -> dict[str, Floats]:
    """The parameters of the flat vector by their PyTorch names."""
    values = {}
    for parameter in lora.parameters:
        if parameter.offset is not None:
            stop = parameter.offset + parameter.shape[0] * parameter.shape[1]
            values[parameter.name] = np.ascontiguousarray(flat[parameter.offset : stop].reshape(parameter.shape))
    return values


def flatten(lora: Lora, values: dict[str, Floats]) -> Floats:
    """The flat vector of parameters by name; those without an offset are passed over.

    Raises:
        KeyError: a parameter is missing.
        ValueError: it has another shape.
    """
    flat = np.empty(lora.flat_elements, np.float32)
    for parameter in lora.parameters:
        if parameter.offset is not None:
            value = _checked(values[parameter.name], parameter.shape, parameter.name)
            flat[parameter.offset : parameter.offset + value.size] = value.reshape(-1)
    return flat


def _adapter(lora: Lora, tensors: dict[str, Any]) -> Adapter:
    values = {parameter.name: _checked(tensors[parameter.key], parameter.shape, parameter.key) for parameter in lora.parameters}
    fixed = {parameter.name: values[parameter.name] for parameter in lora.parameters if parameter.offset is None}
    return Adapter(flatten(lora, values), fixed)


def _checked(value: Any, shape: tuple[int, int], name: str) -> Floats:
    if value.shape != shape or value.dtype not in (np.float32, np.float16):
        msg = f"{name} is {value.dtype} {value.shape}, expected float32 {shape}"
        raise ValueError(msg)
    floats: Floats = value.astype(np.float32)
    if not np.isfinite(floats).all():
        msg = f"{name} holds infinity or NaN"
        raise ValueError(msg)
    return floats


def _check_strength(metadata: dict[str, str], lora: Lora) -> None:
    """Alpha and rank are fixed in the graphs, so a file with another strength would silently look different."""
    stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    alpha, rank = (stored.get(f"transformer.{name}") for name in ("lora_alpha", "r"))
    if alpha is not None and rank and alpha / rank != lora.alpha / lora.rank:
        msg = f"its strength is alpha {alpha} over rank {rank}, the bundle's is {lora.alpha} over {lora.rank}"
        raise ValueError(msg)


def _parse(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a safetensors file in memory; the library checks offsets and shapes."""
    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, dict(header.get("__metadata__", {}))


def _elements(lora: Lora) -> list[int]:
    return [parameter.shape[0] * parameter.shape[1] for parameter in lora.parameters]


def _find(path: Path) -> Path:
    for candidate in (path, path / LORA_FILE, path / "lora" / LORA_FILE):
        if candidate.is_file() and candidate.suffix == ".safetensors":
            return candidate
    msg = f"no LoRA at {path}: expected a .safetensors file, or a folder (or RUN) that holds {LORA_FILE}."
    raise LoraError(msg)
