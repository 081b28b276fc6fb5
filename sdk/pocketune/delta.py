"""The result: a LoRA file that stock diffusers loads, and the check that it does something."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from pocketune.atomic import replacing
from pocketune.errors import NoEffectError
from pocketune.headers import with_sorted_metadata
from pocketune.methods.lora import ADAPTER
from pocketune.models.base import DenoiserAdapter
from pocketune.models.quiet import quiet_libraries

LORA_FILE = "pytorch_lora_weights.safetensors"


def save_lora(adapter: DenoiserAdapter, folder: Path) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` through diffusers' own writer, whole or not at all."""
    layers = get_peft_model_state_dict(adapter.model, adapter_name=ADAPTER)
    config = adapter.model.peft_config[ADAPTER].to_dict()
    path = folder / LORA_FILE
    with replacing(path) as partial, tempfile.TemporaryDirectory(dir=partial.parent) as scratch:
        StableDiffusion3Pipeline.save_lora_weights(
            scratch,
            transformer_lora_layers={name: tensor.contiguous() for name, tensor in layers.items()},
            transformer_lora_adapter_metadata=_plain(config),
        )
        partial.write_bytes(with_sorted_metadata((Path(scratch) / LORA_FILE).read_bytes()))
    return path


def check_lora_loads(pipeline: StableDiffusion3Pipeline, path: Path) -> None:
    """Load the file into a stock pipeline and compare every tensor with what arrived in the model.

    Raises:
        NoEffectError: a key was ignored, or the adapter is all zeros.
    """
    stored = load_file(path)
    with quiet_libraries():
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="check")
    loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name="check")
    arrived = {f"transformer.{name}": tensor for name, tensor in loaded.items()}
    ignored = sorted(set(stored) - set(arrived))
    if ignored:
        msg = (
            f"diffusers ignored {len(ignored)} of {len(stored)} tensors of {path}, the first {ignored[0]}. Please report this."
        )
        raise NoEffectError(msg)
    if not any(bool(tensor.any()) for name, tensor in stored.items() if "lora_B" in name):
        msg = (
            f"every up-projection in {path} is zero: training changed nothing. Check the learning rate and the number of steps."
        )
        raise NoEffectError(msg)


def _plain(config: dict[str, object]) -> dict[str, object]:
    """Peft's configuration with what JSON cannot hold left out."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def trained_norms(parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    """L2 norm of every up-projection."""
    return {name: float(torch.linalg.vector_norm(value.detach())) for name, value in parameters.items() if "lora_B" in name}
