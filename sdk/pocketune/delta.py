"""The result: a LoRA file that stock diffusers loads, and the check that it does something.

diffusers cannot load a LoRA into PixArt. Its file has the same layout and is loaded with peft, whose own two files lie
beside it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pocketune.atomic import replacing, write_text
from pocketune.errors import FileFormatError, NoEffectError
from pocketune.headers import with_sorted_metadata
from pocketune.methods.lora import ADAPTER
from pocketune.models.base import DenoiserAdapter
from pocketune.models.quiet import quiet_libraries
from pocketune.models.registry import FAMILIES, family_of
from pocketune.runfolder import LORA_FILE

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"


def save_lora(adapter: DenoiserAdapter, folder: Path) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` through diffusers' own writer, whole or not at all."""
    layers = {
        name: value.contiguous() for name, value in get_peft_model_state_dict(adapter.model, adapter_name=ADAPTER).items()
    }
    config = _plain(adapter.model.peft_config[ADAPTER].to_dict())
    path = folder / LORA_FILE.name
    family = family_of(adapter.model)
    with replacing(path) as partial, tempfile.TemporaryDirectory(dir=partial.parent) as scratch:
        if hasattr(family.pipeline, "save_lora_weights"):
            family.pipeline.save_lora_weights(
                scratch,
                **{f"{family.component}_lora_layers": layers, f"{family.component}_lora_adapter_metadata": config},
            )
        else:
            _save_for_peft(layers, config, folder)
            LoraBaseMixin.write_lora_layers(
                LoraBaseMixin.pack_weights(layers, family.component),
                scratch,
                is_main_process=True,
                weight_name=path.name,
                save_function=None,
                safe_serialization=True,
                lora_adapter_metadata=LoraBaseMixin.pack_weights(config, family.component),
            )
        partial.write_bytes(with_sorted_metadata((Path(scratch) / path.name).read_bytes()))
    return path


def load_lora(pipeline: Any, path: Path, *, name: str | None = None) -> None:
    """Load a LoRA file into a stock pipeline.

    Args:
        pipeline: of diffusers.
        path: the file.
        name: of the adapter; default: diffusers' own.

    Raises:
        FileFormatError: the file is of another model. Where the pipeline loads LoRA itself, it raises its own errors.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        _load_with_peft(getattr(pipeline, _component(pipeline)), path, name=name or ADAPTER)
        return
    with quiet_libraries():
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name, use_safetensors=True)


def check_lora_loads(pipeline: Any, path: Path) -> None:
    """Load the file into a stock pipeline and compare every tensor with what arrived in the model.

    Raises:
        NoEffectError: a tensor was ignored or arrived as another one, or the adapter is all zeros.
    """
    stored = load_file(path)
    load_lora(pipeline, path, name="check")
    component = _component(pipeline)
    loaded = get_peft_model_state_dict(getattr(pipeline, component), adapter_name="check")
    arrived = {f"{component}.{name}": tensor for name, tensor in loaded.items()}
    ignored = sorted(set(stored) - set(arrived))
    if ignored:
        msg = (
            f"diffusers ignored {len(ignored)} of {len(stored)} tensors of {path}, the first {ignored[0]}. Please report this."
        )
        raise NoEffectError(msg)
    changed = [name for name, tensor in stored.items() if not torch.equal(arrived[name].cpu(), tensor.to(arrived[name].dtype))]
    if changed:
        many = f"{len(changed)} of {len(stored)}"
        msg = f"{many} tensors of {path} arrived with other values, the first {min(changed)}. Please report this."
        raise NoEffectError(msg)
    if not any(bool(tensor.any()) for name, tensor in stored.items() if "lora_B" in name):
        msg = (
            f"every up-projection in {path} is zero: training changed nothing. Check the learning rate and the number of steps."
        )
        raise NoEffectError(msg)


def _component(pipeline: Any) -> str:
    return next(family.component for family in FAMILIES.values() if isinstance(pipeline, family.pipeline))


def _save_for_peft(layers: dict[str, torch.Tensor], config: dict[str, object], folder: Path) -> None:
    """What `peft.PeftModel.from_pretrained(model, folder)` reads."""
    with replacing(folder / PEFT_FILE) as partial:
        save_file({f"base_model.model.{name}": value for name, value in layers.items()}, partial, metadata={"format": "pt"})
    write_text(folder / PEFT_CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _load_with_peft(model: Any, path: Path, *, name: str) -> None:
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    targets = sorted({key.split(".lora_")[0] for key in tensors})
    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    rank = next((value.shape[0] for key, value in tensors.items() if "lora_A" in key), 0)
    if set(targets) - {module for module, _ in model.named_modules()} or not rank:
        msg = f"{path} names layers that {type(model).__name__} does not have. Use the model that it was trained on."
        raise FileFormatError(msg)
    settings = LoraConfig(
        r=rank, lora_alpha=config.get("transformer.lora_alpha", rank), init_lora_weights=False, target_modules=targets
    )
    with torch.random.fork_rng(devices=[]):  # peft draws start values that the file's replace
        inject_adapter_in_model(settings, model, adapter_name=name)
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def _plain(config: dict[str, object]) -> dict[str, object]:
    """Peft's configuration with what JSON cannot hold left out."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def trained_norms(parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    """L2 norm of every up-projection."""
    return {name: float(torch.linalg.vector_norm(value.detach())) for name, value in parameters.items() if "lora_B" in name}
