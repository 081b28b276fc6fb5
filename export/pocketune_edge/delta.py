"""What a bundle trains: its start values, and result files, which are those of PyTorch's side; stock diffusers loads a LoRA."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from pocketune.atomic import replacing
from pocketune.headers import with_sorted_metadata
from pocketune.runfolder import LORA_FILE, SCALES_FILE
from pocketune_edge.bundle import Bundle
from pocketune_edge.denoiser import Floats
from pocketune_edge.errors import BundleError, LoraError
from pocketune_edge.manifest import Lora, Parameter, Tuned

RESULTS = {"lora": LORA_FILE, "scales": SCALES_FILE}
"""By method that a bundle may have, the result in a RUN folder."""
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Adapter:
    """The values of what trains.

    Attributes:
        flat: the vectors that the graphs take, of all intervals.
        fixed: by name, the parameters that no loss depends on and that keep their start values.
    """

    flat: Floats
    fixed: dict[str, Floats]


def start_values(bundle: Bundle) -> Adapter:
    """The values that the bundle starts from.

    Raises:
        BundleError: they do not fit its manifest.
    """
    place = bundle.place(bundle.manifest.tuned.initial)
    if place.size > _MAX_HEADER_BYTES + 8 * sum(_elements(bundle.manifest.tuned)):
        msg = f"{bundle.path} has start values of an impossible size. Export the bundle again."
        raise BundleError(msg)
    try:
        tensors, _ = _parse(place.read())
        return _adapter(bundle.manifest.tuned, tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"the start values of {bundle.path} do not fit its manifest ({str(error)[:200]}). Export the bundle again."
        raise BundleError(msg) from error


def neutral(tuned: Tuned) -> Floats:
    """The vectors of all intervals that change nothing: those of the base model."""
    return np.full(tuned.elements, 1.0 if tuned.method == "scales" else 0.0, np.float32)


def save_result(bundle: Bundle, adapter: Adapter, run: Path) -> Path:
    """Write the result into a RUN folder, in the form of the bundle's start values, whole or not at all."""
    _, metadata = _parse(bundle.read(bundle.manifest.tuned.initial))
    values = by_name(bundle.manifest.tuned, adapter.flat) | adapter.fixed
    tensors = {parameter.key: values[parameter.name] for parameter in bundle.manifest.tuned.parameters}
    path = run / RESULTS[bundle.manifest.tuned.method]
    with replacing(path) as partial:
        partial.write_bytes(with_sorted_metadata(save(tensors, metadata)))
    return path


def load_result(bundle: Bundle, path: str | Path) -> Adapter:
    """Read a result file that belongs to the bundle's model and blocks.

    Args:
        bundle: says which tensors there must be.
        path: a file, a folder that holds one, or a RUN folder.

    Raises:
        LoraError: it is missing, damaged, or of other blocks, rank, strength or packed weights than the bundle's.
    """
    tuned = bundle.manifest.tuned
    file = find_result(Path(path), tuned.method)
    try:
        with safe_open(file, framework="np") as opened:  # the library checks the header before anything is read
            metadata = opened.metadata() or {}
            keys = {parameter.key for parameter in tuned.parameters}
            strange = sorted(set(opened.keys()) - keys)
            if strange:
                msg = f"it has {strange[0][:120]}, which the bundle does not train"
                raise ValueError(msg)
            tensors = {key: opened.get_tensor(key) for key in sorted(keys)}
        if tuned.lora is not None:
            _check_strength(metadata, tuned.lora, component=tuned.parameters[0].key.partition(".")[0])
        else:
            _check_codes(metadata, _parse(bundle.read(tuned.initial))[1])
        return _adapter(tuned, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"{file} does not fit the bundle {bundle.path} ({str(error)[:200]}). Use what was trained with it."
        raise LoraError(msg) from error


def find_result(path: Path, *methods: str) -> Path:
    """The result file of one of some methods; that it is one is not looked at.

    Args:
        path: a file, a folder that holds one, or a RUN folder.
        methods: keys of `RESULTS`.

    Raises:
        LoraError: there is none, or the path cannot be read.
    """
    try:
        for result in (RESULTS[method] for method in methods):
            for candidate in (path, path / result.name, path / result):
                if candidate.is_file() and candidate.suffix == ".safetensors":
                    return candidate
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}. Check the path and its permissions."
        raise LoraError(msg) from error
    what = " or ".join("LoRA" if method == "lora" else method for method in methods)
    files = " or ".join(RESULTS[method].name for method in methods)
    msg = f"no {what} at {path}: expected a .safetensors file, or a folder (or RUN) that holds {files}."
    raise LoraError(msg)


def by_name(tuned: Tuned, flat: Floats) -> dict[str, Floats]:
    """The parameters of the vectors of all intervals by their PyTorch names."""
    values = {}
    for parameter in tuned.parameters:
        place = _place(tuned, parameter)
        if place is not None:
            values[parameter.name] = np.ascontiguousarray(flat[place].reshape(parameter.shape))
    return values


def flatten(tuned: Tuned, values: dict[str, Floats]) -> Floats:
    """The vectors of all intervals, of parameters by name; those without an offset are passed over.

    Raises:
        KeyError: a parameter is missing.
        ValueError: it has another shape.
    """
    flat = np.empty(tuned.elements, np.float32)
    for parameter in tuned.parameters:
        place = _place(tuned, parameter)
        if place is not None:
            flat[place] = _checked(values[parameter.name], parameter.shape, parameter.name).reshape(-1)
    return flat


def _place(tuned: Tuned, parameter: Parameter) -> slice | None:
    if parameter.offset is None:
        return None
    start = tuned.place(parameter.interval).start + parameter.offset
    return slice(start, start + math.prod(parameter.shape))


def _adapter(tuned: Tuned, tensors: dict[str, Any]) -> Adapter:
    values = {item.name: _checked(tensors[item.key], item.shape, item.key) for item in tuned.parameters}
    fixed = {item.name: values[item.name] for item in tuned.parameters if item.offset is None}
    return Adapter(flatten(tuned, values), fixed)


def _checked(value: Any, shape: tuple[int, ...], name: str) -> Floats:
    if value.shape != shape or value.dtype not in (np.float32, np.float16):
        msg = f"{name} is {value.dtype} {value.shape}, expected float32 {shape}"
        raise ValueError(msg)
    floats: Floats = value.astype(np.float32)
    if not np.isfinite(floats).all():
        msg = f"{name} holds infinity or NaN"
        raise ValueError(msg)
    return floats


def _check_codes(metadata: dict[str, str], expected: dict[str, str]) -> None:
    """Scales mean something for the codes alone that they were trained with."""
    odd = [name for name, value in expected.items() if metadata.get(name) != value]
    if odd:
        msg = f"its {odd[0]} is {metadata.get(odd[0], 'not given')[:80]}, the bundle's {expected[odd[0]]}"
        raise ValueError(msg)


def _check_strength(metadata: dict[str, str], lora: Lora, *, component: str) -> None:
    """Alpha and rank are fixed in the graphs, so a file with another strength would silently look different."""
    stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    alpha, rank = (stored.get(f"{component}.{name}") for name in ("lora_alpha", "r"))
    if alpha is not None and rank and alpha / rank != lora.alpha / lora.rank:
        msg = f"its strength is alpha {alpha} over rank {rank}, the bundle's is {lora.alpha} over {lora.rank}"
        raise ValueError(msg)


def _parse(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a safetensors file in memory; the library checks offsets and shapes."""
    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, dict(header.get("__metadata__", {}))


def _elements(tuned: Tuned) -> list[int]:
    return [math.prod(parameter.shape) for parameter in tuned.parameters]
