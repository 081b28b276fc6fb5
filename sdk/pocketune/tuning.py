"""Every method of tuning, one line each, and how a result file finds its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open

from pocketune.delta import check_lora_loads, load_lora, save_lora, trained_norms
from pocketune.errors import FileFormatError, first_line, reading
from pocketune.jsonfile import read_object
from pocketune.methods.base import Tuned, TuningMethod
from pocketune.methods.lora import add_lora
from pocketune.methods.scales import ScalesMethod
from pocketune.methods.token import TokenMethod
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan
from pocketune.recipe import Recipe
from pocketune.runfolder import LORA_FILE, METHOD_KEY, RECORD_FILE


class LoraMethod:
    """LoRA on the kept blocks, in the file that stock diffusers loads."""

    result = LORA_FILE

    def attach(
        self,
        adapter: DenoiserAdapter,
        *,
        plan: BlockPlan,
        recipe: Recipe,
        folder: ModelFolder,  # noqa: ARG002
    ) -> Tuned:
        """Add a fresh LoRA."""
        parameters = add_lora(adapter, blocks=plan.kept, rank=recipe.rank, targets=recipe.lora_targets, seed=recipe.seed)
        return Tuned(parameters=parameters, owner=adapter.model)

    def save(self, adapter: DenoiserAdapter, tuned: Tuned, path: Path, *, recipe: Recipe) -> None:  # noqa: ARG002
        """Write it through diffusers."""
        save_lora(adapter, path.parent)

    def change(self, tuned: Tuned) -> dict[str, float]:
        """The norm of each up-projection."""
        return trained_norms(tuned.parameters)

    def prepare(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Nothing: a fresh LoRA is the identity."""

    def check(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:  # noqa: ARG002
        """Load the file and compare every tensor with what arrived."""
        check_lora_loads(pipeline, path)

    def apply(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Load it, whoever wrote it.

        Raises:
            FileFormatError: the file is damaged, or belongs to another architecture.
        """
        try:
            load_lora(pipeline, path)
        except Exception as error:  # diffusers and peft raise many kinds here, all of which mean the same to the user
            msg = (
                f"{path} does not load into {folder.name} ({folder.denoiser_kind}): {first_line(error)}. "
                "Use the model that it was trained on."
            )
            raise FileFormatError(msg) from error


METHODS: dict[str, TuningMethod] = {"lora": LoraMethod(), "scales": ScalesMethod(), "token": TokenMethod()}


def find_result(path: str | Path) -> Path:
    """The result file at a path: the file itself, or the one in a folder or a RUN folder.

    Raises:
        FileFormatError: there is none, or it cannot be looked for there.
    """
    path = Path(path)
    results = [method.result for method in METHODS.values()]
    with reading(path):
        for candidate in (path, *(path / result.name for result in results), *(path / result for result in results)):
            if candidate.is_file() and candidate.suffix == ".safetensors":
                return candidate
    msg = f"no LoRA at {path}: expected a .safetensors file, or a folder (or RUN) that holds {LORA_FILE.name}."
    raise FileFormatError(msg)


def trained_dtype(path: Path) -> torch.dtype | None:
    """The type that a result was trained in, as its RUN says; None where it lies in no RUN.

    Raises:
        FileFormatError: the record of the run is damaged.
    """
    if path.parts[-2:] not in {method.result.parts for method in METHODS.values()}:
        return None
    record = path.parent.parent / RECORD_FILE
    recipe = read_object(record).get("recipe") if record.is_file() else None
    name = recipe.get("dtype") if isinstance(recipe, dict) else None
    known = get_args(Recipe.model_fields["dtype"].annotation)
    found: torch.dtype | None = getattr(torch, str(name)) if name in known else None
    return found


def method_of(path: Path) -> TuningMethod:
    """The method that made a file, by its metadata; LoRA where it names none, as files of other programs do.

    Raises:
        FileFormatError: the file is damaged, or names a method that is not known here.
    """
    try:
        with safe_open(path, framework="pt") as file:
            name = (file.metadata() or {}).get(METHOD_KEY, "lora")
    except (SafetensorError, OSError) as error:
        msg = f"{path} is damaged: {error}. Train again, or copy it again."
        raise FileFormatError(msg) from error
    if name not in METHODS:
        msg = f"{path} was made by the method {name!r}, which is not known. Use the version of pocketune that wrote it."
        raise FileFormatError(msg)
    return METHODS[name]
