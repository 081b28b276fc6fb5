"""Images from prompts with the stock diffusers pipeline, with or without a LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pocketune.allocator import return_freed_memory
from pocketune.errors import PlanError, RecipeError, first_line
from pocketune.models.family import Family
from pocketune.models.load import ModelFolder, open_model
from pocketune.recipe import Recipe
from pocketune.tuning import find_result, method_of, trained_dtype
from pocketune.weights.fill import Residence

BATCH = 4
BFLOAT16_CAPABILITY = 8
"""Least compute capability of NVIDIA GPUs that have bfloat16; older ones emulate it."""


def generate(
    model: str | Path,
    prompts: Sequence[str],
    *,
    lora: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    steps: int = 28,
    guidance: float | None = None,
    resolution: int | None = None,
    device: str | None = None,
    streamed: bool = False,
    on_image: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Sample an image for each prompt.

    Args:
        model: built-in name, diffusers folder or hub id.
        prompts: one image each.
        lora: a LoRA file or another result of `personalize`, a folder that holds one, or a RUN folder.
        seeds: one a prompt; default 0, 1, 2 and so on. Equal seeds give equal images, whatever the other prompts are.
        steps: of the sampler.
        guidance: guidance scale; default: what suits the architecture, 7 for Stable Diffusion 3.
        resolution: image side in pixels; default: the model's.
        device: torch device; default: CUDA where there is one.
        streamed: leave weights on disk and sample one image at a time, in little memory.
        on_image: called with (done, total).

    Raises:
        ModelError: the model cannot be loaded.
        PlanError: the model cannot work at the resolution, or its schedule has no room for the steps.
        RecipeError: another argument makes no sense, or there is no such device.
        FileFormatError: there is no LoRA at `lora`, or it does not fit the model.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    _check_asked(prompts, seeds, guidance)
    torch_device = device_named(device)
    folder = open_model(model)
    side = folder.native_resolution if resolution is None else resolution
    check_side(folder, side)
    check_steps(folder, steps)
    path = find_result(lora) if lora is not None else None
    if streamed:
        return_freed_memory()
    pipeline = folder.pipeline(
        dtype=sampling_dtype(folder.family, torch_device, result=path),
        device=torch_device,
        weights=Residence(streamed=streamed),
        latent_side=side // folder.vae_scale,
    )
    if path is not None:
        method_of(path).apply(pipeline, path, folder)
    return run_pipeline(
        pipeline,
        folder,
        prompts,
        seeds=list(seeds),
        steps=steps,
        guidance=folder.family.guidance if guidance is None else guidance,
        resolution=side,
        batch=1 if streamed else BATCH,
        on_image=on_image,
    )


def shown_prompts(recipe: Recipe) -> tuple[str, ...]:
    """Of the images before and after: those that the recipe names, or a few with the subject in several places."""
    places = ("", " on grass", " at the beach", " in snow")
    return recipe.sample_prompts or tuple(f"{recipe.instance_prompt}{place}" for place in places)


def sampling_dtype(family: Family, device: torch.device, *, result: Path | None = None) -> torch.dtype:
    """The type to sample in: float32 on a CPU, and on a GPU that of the training, or else the safest one of 16 bits.

    Args:
        family: of the model.
        device: where it runs.
        result: what the model gets, if anything.
    """
    if device.type == "cpu":
        return torch.float32
    trained = None if result is None else trained_dtype(result)
    if trained is not None:
        return trained
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= BFLOAT16_CAPABILITY:
        return torch.bfloat16
    return torch.float32 if family.overflows_in_float16 else torch.float16


def check_side(folder: ModelFolder, resolution: int) -> None:
    """Refuse a resolution that the model cannot work at.

    Raises:
        PlanError: it is no multiple of the model's unit, or beyond its table of positions.
    """
    unit, largest = folder.resolution_unit, folder.largest_resolution
    if resolution < unit or resolution % unit or resolution > (largest or resolution):
        nearest = max(unit, round(resolution / unit) * unit)
        nearest, bound = (nearest, "") if largest is None else (min(largest, nearest), f" up to {largest}")
        msg = f"resolution {resolution} does not fit {folder.name}: expected a multiple of {unit}{bound}. Try {nearest}."
        raise PlanError(msg)


def check_steps(folder: ModelFolder, steps: int) -> None:
    """Refuse a number of sampler steps that the model's noise schedule has no room for.

    Raises:
        PlanError: there are none, or more than timesteps to train at.
    """
    count = folder.scheduler().config.num_train_timesteps
    if not 1 <= steps <= count:
        msg = f"{steps} sampler steps do not fit {folder.name}: expected 1 to {count}, the timesteps of its schedule. Try 28."
        raise PlanError(msg)


def _check_asked(prompts: Sequence[str], seeds: Sequence[int], guidance: float | None) -> None:
    for wrong, msg in (
        (isinstance(prompts, str), "prompts is a single text, expected a list of texts. Put it in brackets."),
        (
            len(seeds) != len(prompts),
            f"{len(seeds)} seeds for {len(prompts)} prompts: expected one a prompt. Leave seeds out to take 0, 1, 2 and so on.",
        ),
        (not all(0 <= seed < 2**64 for seed in seeds), f"torch cannot take one of the seeds {seeds}: expected 0 to 2^64 - 1."),
        (
            guidance is not None and not math.isfinite(guidance),
            f"guidance {guidance} makes no image: expected a finite number, such as 7.",
        ),
    ):
        if wrong:
            raise RecipeError(msg)


def run_pipeline(
    pipeline: Any,
    folder: ModelFolder,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    resolution: int | None = None,
    batch: int = BATCH,
    on_image: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Sample with a pipeline that is loaded already, `batch` images at a time; other arguments as of `generate`."""
    pipeline.set_progress_bar_config(disable=True)
    side = resolution or folder.native_resolution
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        images += pipeline(
            prompt=list(prompts[part]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=side,
            width=side,
            **folder.family.sampling(folder.text_padding),
        ).images
        if on_image is not None:
            on_image(len(images), len(prompts))
    return images


def device_named(name: str | None) -> torch.device:
    """A torch device; None: CUDA where there is one, else the CPU.

    Raises:
        RecipeError: it is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = first_line(error)
    else:
        count = torch.cuda.device_count()
        if device.type != "cuda" or (device.index or 0) in range(count):  # torch wraps large numbers around
            return device
        reason = f"torch finds {count} CUDA devices here"
    msg = f"no device {name}: {reason}. Give cpu, or leave it out to take what there is."
    raise RecipeError(msg)
