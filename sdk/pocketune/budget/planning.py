"""A memory plan for a model and a recipe; in a process of its own where the memory of planning must not count."""

from __future__ import annotations

import gc
import importlib
from typing import Any

import torch

from pocketune import errors
from pocketune.allocator import trim
from pocketune.budget.apart import Question, ask_apart
from pocketune.budget.search import MemoryPlan, choose
from pocketune.budget.whole import Ledgers, Setting
from pocketune.memory import read_memory
from pocketune.models.load import ModelFolder, open_model
from pocketune.models.published import PUBLISHED, PublishedModel
from pocketune.photos import MAX_PHOTO_SIDE, load_photos, reading_bytes
from pocketune.recipe import Recipe
from pocketune.sample import device_named

_JOB = "pocketune.job"


def plan_memory(recipe: Recipe, question: Question) -> MemoryPlan:
    """The best memory plan that fits; no weights are read.

    Raises:
        PlanError: no plan fits.
        ModelError, RecipeError: the model or recipe is no good.
    """
    folder = model_to_plan(question.model)
    floor = measured_floor(folder) if question.floor_bytes is None else question.floor_bytes
    device = device_named(question.device)
    photo_pixels, photo_reading = None, 0
    if question.photos:
        photos = load_photos(question.photos, max_side=MAX_PHOTO_SIDE)
        photo_pixels = tuple(photo.image.width * photo.image.height for photo in photos)
        del photos
        photo_reading = reading_bytes(question.photos, max_side=MAX_PHOTO_SIDE)
    setting = Setting(folder=folder, device=device, floor_bytes=floor, photos=photo_pixels, photo_reading_bytes=photo_reading)
    return choose(
        recipe,
        Ledgers(setting),
        folder,
        budget_bytes=question.budget_bytes,
        device_budget_bytes=int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None,
        where=question.where,
    )


def plan_memory_apart(recipe: Recipe, question: Question) -> MemoryPlan:
    """The same in a process of its own, so that what planning imports and leaves behind takes nothing from the budget.

    Raises:
        PlanError, ModelError, RecipeError: as of `plan_memory`.
    """
    return MemoryPlan.from_dict(recipe, ask_apart(recipe, question))


def model_to_plan(model: str) -> ModelFolder:
    """A published configuration by name, or a model as `open_model` finds it."""
    return PublishedModel(model) if model in PUBLISHED else open_model(model)


def measured_floor(folder: ModelFolder) -> int:
    """What interpreter and libraries take in this process, with all that a job of a model imports."""
    importlib.import_module(_JOB)
    for library, kind in (found for found in folder.index.values() if isinstance(found, list)):
        if library in ("diffusers", "transformers") and kind:
            getattr(importlib.import_module(library), kind)  # imported when it is asked for
    gc.collect()
    trim()
    return read_memory().rss_bytes


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What `ask_apart` asks: a memory plan, or what planning refuses, as plain data."""
    try:
        recipe = Recipe.create(**asked["recipe"])
        return plan_memory(recipe, Question(**asked["question"])).as_dict()
    except errors.PocketuneError as error:
        return {"error": str(error), "kind": type(error).__name__}
