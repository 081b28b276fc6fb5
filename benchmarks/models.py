"""The models that benchmarks run on: how they are told apart, and how they load without noise."""

from __future__ import annotations

import hashlib
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


def quiet_loading() -> None:
    """Turn off the progress bars that diffusers and transformers draw whenever they load a part."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def checkpoint_id(folder: Path) -> str:
    """First 12 hex digits of the SHA-256 of the denoiser's weights; tells one checkpoint of a model from another."""
    digest = hashlib.sha256()
    for file in sorted(file for part in ("transformer", "unet") for file in (folder / part).glob("*.safetensors")):
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]
