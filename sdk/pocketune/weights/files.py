"""Which files hold a model's weights, and what tells them from those of another model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pocketune.errors import ModelError


def weight_files(folder: Path, *, name: str) -> list[Path]:
    """The safetensors files of a model's part: the shards that an index names, else those of `plain_weights`.

    Args:
        folder: of the part.
        name: of the model, for the message.

    Raises:
        ModelError: there are none, or a shard is missing.
    """
    found = [file.name for file in folder.glob("*.safetensors")]
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if index.name.count(".") > 3:
            continue  # of a variant
        shards = _indexed_shards(index)
        missing = sorted(shards - set(found))
        if missing:
            msg = (
                f"{name} lacks {len(missing)} of {len(shards)} weight files in {folder}, first {missing[0]}. Download it again."
            )
            raise ModelError(msg)
        return [folder / shard for shard in sorted(shards)]
    if not found:
        msg = f"{name} has no safetensors weights in {folder}. Other formats are not read; convert the model with diffusers."
        raise ModelError(msg)
    return [folder / file for file in plain_weights(found)]


def plain_weights(names: Iterable[str]) -> list[str]:
    """Of the files in one folder, the safetensors files of the model itself, sorted, and a variant's where there are no others.

    Variants, as `fp16` and `non_ema`, have one more part in their names; each is the whole model again.
    """
    found = sorted(name for name in names if name.endswith(".safetensors"))
    chosen = variant_of(found)
    return [name for name in found if _variant(name) == chosen]


def variant_of(names: Iterable[str]) -> str | None:
    """The variant to which `plain_weights` belong, as diffusers calls it; None: they belong to none."""
    variants = {_variant(name) for name in names if name.endswith(".safetensors")}
    return min(variants, key=lambda variant: ((variant or "").count("."), variant or ""), default=None)


def file_sha256(path: Path) -> str:
    """The sha256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(path: Path) -> str:
    """Hash a safetensors file's header and the first KiB of each tensor: retraining changes every tensor from its start."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 2**27))
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    file.seek(8 + length + start)
                    digest.update(file.read(min(end - start, 1024)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"the weights {path} are damaged ({str(error)[:100]}). Download the model again."
        raise ModelError(msg) from error
    return digest.hexdigest()


def _indexed_shards(index: Path) -> set[str]:
    try:
        shards = {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"the index {index} is damaged ({error}). Download the model again."
        raise ModelError(msg) from error
    if not shards or any(Path(shard).name != shard for shard in shards):
        msg = f"the index {index} names no files, or some outside of its folder. Download the model from its publisher."
        raise ModelError(msg)
    return shards


def _variant(name: str) -> str | None:
    """What stands in a file's name between the stem and "safetensors", without the number of a shard."""
    return ".".join(part.partition("-0")[0] for part in name.split(".")[1:-1]) or None
