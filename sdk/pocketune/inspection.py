"""What is this file or folder? A LoRA, other tensors, a run, a model or a bundle; read without running or loading anything."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pocketune.bundlefile import describe_bundle, is_archived_bundle
from pocketune.errors import FileFormatError, reading
from pocketune.jsonfile import read_object
from pocketune.lorafile import describe_lora, find_blocks, find_pairs
from pocketune.runfolder import (
    CHECKPOINTS,
    CLASS_IMAGES,
    DEVICE_RECORD_FILE,
    JOB_FILE,
    LORA_FILE,
    METHOD_KEY,
    RECORD_FILE,
    REPORT_FILE,
    SCALES_FILE,
    SLOW,
    TOKEN_FILE,
)
from pocketune.scalesfile import describe_scales
from pocketune.tensorfile import TensorFile, open_tensor_file
from pocketune.weights.files import weight_files

_PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What something is.

    Attributes:
        kind: "lora", "scales" (of a quantized denoiser), "token" (a tuned word), "tensors" (a .safetensors file of another
            sort), "run", "model" or "bundle".
        path: what was looked at.
        size_bytes: of the file, or of all files in the folder.
        facts: by name; JSON-able; which ones there are depends on the kind.
        notes: what a person should know, worst first: an adapter that changes nothing, damaged values, unmatched halves.
    """

    kind: Literal["lora", "scales", "token", "tensors", "run", "model", "bundle"]
    path: str
    size_bytes: int
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Give the inspection as JSON-able values."""
        return asdict(self)


def inspect(path: Path | str) -> Inspection:
    """Recognise a file or folder and describe it. Pickles are never opened.

    Raises:
        FileFormatError: it is missing, damaged, a pickle, or none of the known kinds.
        ModelError: a model lacks some of its weight files.
    """
    path = Path(path)
    head = None
    with reading(path):
        if path.is_dir():
            return _inspect_folder(path)
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(16)
    if head is None:
        msg = f"{path} is no file or folder. Check the path."
        raise FileFormatError(msg)
    if path.suffix.lower() == ".ptb" or is_archived_bundle(path):  # also one that was cut off
        return _inspect_bundle(path)
    tensors = path.suffix.lower() == ".safetensors" or head[8:9] == b"{"
    if path.suffix.lower() in _PICKLED or (not tensors and _is_pickle(head)):
        msg = (
            f"{path} is a pickle or an archive of one: opening it can run any program, so it is not opened. "
            "Get the .safetensors version from its author, or convert it in a sandbox that you trust."
        )
        raise FileFormatError(msg)
    if not tensors:
        msg = (
            f"{path} is not recognised: expected a .safetensors file, or the folder of a run, a diffusers model or a bundle, "
            f"got a file that begins with {head[:8]!r}. Check the path."
        )
        raise FileFormatError(msg)
    return _inspect_tensors(open_tensor_file(path))


def _is_pickle(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _inspect_folder(folder: Path) -> Inspection:
    if (folder / "model_index.json").is_file():
        return _inspect_model(folder)
    if (folder / "manifest.json").is_file():
        return _inspect_bundle(folder)
    of_a_run = any((folder / name).is_file() for name in (RECORD_FILE, JOB_FILE, LORA_FILE, SCALES_FILE, TOKEN_FILE))
    if of_a_run or (folder / CHECKPOINTS).is_dir():
        return _inspect_run(folder)
    tensors = [entry for entry in sorted(folder.glob("*.safetensors")) if not entry.name.startswith(".")]
    if len(tensors) == 1:
        return _inspect_tensors(open_tensor_file(tensors[0]))
    msg = (
        f"{folder} is not recognised: expected {RECORD_FILE} or checkpoints (a run), model_index.json (a diffusers model), "
        f"manifest.json (a bundle) or a single .safetensors file, found {len(tensors)} of the latter. Name the file itself."
    )
    raise FileFormatError(msg)


def _inspect_tensors(file: TensorFile) -> Inspection:
    pairs = find_pairs(file)
    facts: dict[str, Any] = {
        "parameters": file.parameters,
        "dtypes": list(file.dtypes),
        "tensors": len(file.tensors),
        "metadata": {key[:200]: value[:2000] for key, value in file.metadata.items()},
    }
    if file.metadata.get(METHOD_KEY) == "scales":
        scales, notes = describe_scales(file)
        return Inspection(kind="scales", path=str(file.path), size_bytes=file.size_bytes, facts=facts | scales, notes=notes)
    if file.metadata.get(METHOD_KEY) == "token":
        facts |= {"token": file.metadata.get("token", "unknown"), "text_encoders": sorted(file.tensors)}
        return Inspection(kind="token", path=str(file.path), size_bytes=file.size_bytes, facts=facts)
    if not pairs:
        facts["blocks"] = find_blocks(file.tensors)
        return Inspection(kind="tensors", path=str(file.path), size_bytes=file.size_bytes, facts=facts)
    lora, notes = describe_lora(file, pairs)
    return Inspection(kind="lora", path=str(file.path), size_bytes=file.size_bytes, facts=facts | lora, notes=notes)


def _inspect_run(folder: Path) -> Inspection:
    found = next((name for name in (RECORD_FILE, DEVICE_RECORD_FILE) if (folder / name).is_file()), None)
    record = read_object(folder / found) if found is not None else {}
    checkpoints = [name for name in _names(folder / CHECKPOINTS) if name.endswith(".safetensors")]
    notes: tuple[str, ...] = ()
    steps = None
    if checkpoints:
        try:
            steps = open_tensor_file(folder / CHECKPOINTS / checkpoints[-1]).metadata.get("step")
        except FileFormatError as error:
            notes = (f"The newest checkpoint cannot be used: {error}",)
    begun = not record and not checkpoints and (folder / JOB_FILE).is_file() and any(any(folder.glob(made)) for made in SLOW)
    facts: dict[str, Any] = {
        "finished": bool(record),
        "resumable": steps is not None or begun,
        "checkpoint_step": int(steps) if steps is not None and steps.isdecimal() else None,
        "checkpoints": checkpoints,
        "report": (folder / REPORT_FILE).is_file(),
        "samples": len([name for name in _names(folder / "samples") if name.endswith("-after.png")]),
        "photos": len(_names(folder / "photos")),
        "class_images": len(_names(folder / CLASS_IMAGES)),
    }
    facts |= {key: record[key] for key in ("model", "model_kind", "started", "recipe", "check") if key in record}
    if (folder / LORA_FILE).is_file():
        lora = _inspect_tensors(open_tensor_file(folder / LORA_FILE))
        facts["lora"], notes = lora.facts, (*lora.notes, *notes)
    elif results := [folder / name for name in (SCALES_FILE, TOKEN_FILE) if (folder / name).is_file()]:
        result = _inspect_tensors(open_tensor_file(results[0]))
        facts[result.kind], notes = result.facts, (*result.notes, *notes)
    elif record:
        notes = (f"{found} is there but {LORA_FILE} is not: the result of this run was removed.", *notes)
    return Inspection(kind="run", path=str(folder), size_bytes=_size(folder), facts=facts, notes=notes)


def _inspect_model(folder: Path) -> Inspection:
    index = read_object(folder / "model_index.json")
    components: dict[str, Any] = {}
    notes = []
    for name, value in index.items():
        named = isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)
        if not named or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            continue
        components[name] = {"library": value[0], "class": value[1]}
        if not (folder / name).is_dir():
            notes.append(f"Component {name} is listed in model_index.json but its folder is missing.")
            continue
        if any((folder / name).glob("*.safetensors*")):
            files = [open_tensor_file(path) for path in weight_files(folder / name, name=name)]
            entries = [entry for file in files for entry in file.tensors]
            components[name] |= {
                "parameters": sum(file.parameters for file in files),
                "dtypes": sorted({dtype for file in files for dtype in file.dtypes}),
                "size_bytes": sum(file.size_bytes for file in files),
                "blocks": find_blocks(entries),
            }
        elif any(path.suffix in _PICKLED for path in (folder / name).iterdir()):
            notes.append(f"Component {name} has only pickled weights, which are not opened. Get its .safetensors files.")
    facts = {
        "pipeline": str(index.get("_class_name", "unknown")),
        "diffusers_version": str(index.get("_diffusers_version", "unknown")),
        "parameters": sum(component.get("parameters", 0) for component in components.values()),
        "components": components,
    }
    return Inspection(kind="model", path=str(folder), size_bytes=_size(folder), facts=facts, notes=tuple(notes))


def _inspect_bundle(path: Path) -> Inspection:
    facts, notes = describe_bundle(path)
    size = _size(path) if path.is_dir() else path.stat().st_size
    return Inspection(kind="bundle", path=str(path), size_bytes=size, facts=facts, notes=notes)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _size(folder: Path) -> int:
    paths = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return sum(path.stat().st_size for path in paths if path.is_file())
