"""Model folders in the true size of published models: random weights in bfloat16, which do not change memory or time.

A block of 64 MB of normal values with deviation 0.02 is repeated over the whole file, so that it is written as fast as the disk
takes it, and has real pages: a sparse file would be read without a disk.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocketune.atomic import replacing, write_text
from pocketune.models.published import PublishedModel

_BLOCK_VALUES = 2**25
# A folder is opened with the sizes of its autoencoder, which is not loaded.
_VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}


def model_folder(name: str, root: Path) -> Path:
    """The folder of a published model with random weights of its denoiser, made if it is not there yet.

    Args:
        name: of `pocketune.models.published.PUBLISHED`.
        root: where such folders lie.
    """
    folder = root / name
    model = PublishedModel(name)
    denoiser = folder / model.family.component
    weights = denoiser / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        write_random(weights, shapes_of(model.empty_denoiser().model))
    write_text(folder / "model_index.json", json.dumps(model.index))
    write_text(denoiser / "config.json", json.dumps(model.denoiser_config))
    write_text(folder / "vae" / "config.json", json.dumps(_VAE))
    return folder


def write_random(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of random bfloat16 tensors."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in sorted(shapes.items()):
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = torch.randn(_BLOCK_VALUES, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    block = values.view(torch.uint8).numpy().data
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset:
            part = min(offset, len(block))
            file.write(block[:part])
            offset -= part


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all that a model saves."""
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}
