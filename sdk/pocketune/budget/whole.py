"""The ledger of a whole job: its phases with what every one of them holds, and what lies on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from pocketune.budget.constants import LEFT_BYTES
from pocketune.budget.inputs import text_tokens
from pocketune.budget.ledger import Item, Ledger, PhaseLedger
from pocketune.budget.parts import latents_phase, posteriors_item, samples_phase, text_phase
from pocketune.budget.training import TRAINED, Shapes, features_phase, saving_phase, stored_bytes, training_phase
from pocketune.checkpoint import CHECKPOINT_COPIES
from pocketune.features.precompute import predicted_bytes
from pocketune.features.shards import SHARD_BYTES
from pocketune.models.load import ModelFolder
from pocketune.photos import PIXEL_BYTES
from pocketune.plan.blocks import BlockPlan
from pocketune.plan.skipping import plan_of
from pocketune.recipe import Recipe
from pocketune.sample import shown_prompts
from pocketune.sampling.choices import low_side
from pocketune.sampling.draws import pool_size, refresh_periods
from pocketune.sampling.patches import patch_sides
from pocketune.sampling.places import canvas_of

_TYPICAL_COUNT, _TYPICAL_SIDE = 5, 1024


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a job is planned for.

    Attributes:
        folder: the model.
        device: where the arithmetic is done.
        floor_bytes: of interpreter and libraries.
        photos: pixels of each; None: a typical handful.
        photo_reading_bytes: that one of them takes while it is read.
        tokens: of the text; None: the model's.
    """

    folder: ModelFolder
    device: torch.device
    floor_bytes: int
    photos: tuple[int, ...] | None = None
    photo_reading_bytes: int = 0
    tokens: int | None = None

    @property
    def photo_count(self) -> int:
        """How many photos there are."""
        return _TYPICAL_COUNT if self.photos is None else len(self.photos)


class Ledgers:
    """Gives the ledgers of recipes for one setting. Phases whose settings two recipes share are worked out once."""

    def __init__(self, setting: Setting) -> None:
        """Begin without any."""
        self._setting = setting
        self._phases: dict[tuple[object, ...], PhaseLedger] = {}

    def __call__(self, recipe: Recipe) -> Ledger:
        """The ledger of a personalization, without reading a weight.

        Raises:
            PlanError: the recipe does not fit the model.
            RecipeError: as of `Family.complete`.
        """
        folder = self._setting.folder
        recipe = folder.family.complete(recipe)
        plan = plan_of(folder.empty_denoiser(), recipe, folder=folder)
        phases = tuple(_with_floor(phase, self._setting) for phase in self._of(recipe, plan))
        return Ledger(phases=phases, disk=_disk(recipe, self._setting, plan, phases), notes=_notes(folder))

    def _of(self, recipe: Recipe, plan: BlockPlan) -> Iterator[PhaseLedger]:
        folder, device = self._setting.folder, self._setting.device
        resolution, side = _resolution(recipe, folder), _training_side(recipe, folder)
        shapes = _shapes(recipe, self._setting)
        draws = sum(_draws(recipe))
        encoded, in_use = _crops(recipe, photos=self._setting.photo_count)
        kept: tuple[Item, ...] = ()
        held = (recipe.weights, recipe.streams_parts, recipe.dtype)
        packed = (*held, recipe.weight_bits, plan, shapes)
        if folder.has("vae"):
            yield _photos(self._setting.photo_reading_bytes)
            yield self._once(lambda: text_phase(folder, recipe, device=device), "text", *held, recipe.class_prompt is None)
            if recipe.class_prompt is not None:
                made = self._sampling(recipe, resolution, images=recipe.class_images, rounds=1, trained_bytes=0, packed=False)
                yield replace(made, name="class images")
                kept = (_class_images(recipe.class_images, resolution),)
            kept = (posteriors_item(folder, crops=in_use, side=shapes.side), *kept)
            latents = self._once(
                lambda: latents_phase(folder, recipe, resolution=side, crops=encoded, device=device),
                *("latents", *held, recipe.vae_tile, side, encoded),
            )
            yield _with(latents, kept)
            kept = (*kept, Item(name="left by earlier phases", bytes=LEFT_BYTES, formula="fitted", fixed=True))
        if plan.skipped and recipe.use_residuals:
            features = self._once(
                lambda: features_phase(folder, recipe, plan, shapes, draws=draws, device=device), "features", *packed, draws
            )
            yield _with(features, (_next_shard(recipe, self._setting, plan), *kept))
        training = self._once(
            lambda: training_phase(folder, recipe, plan, shapes, device=device),
            *("training", recipe.model_copy(update={"vae_tile": None, "sample_prompts": ()}).model_dump_json()),
        )
        yield _with(training, kept)
        yield _with(saving_phase(training), kept)
        if folder.has("vae"):
            samples = self._sampling(
                recipe,
                resolution,
                images=len(shown_prompts(recipe)),
                rounds=2,
                trained_bytes=training.item(TRAINED),
                packed=recipe.method == "scales",
            )
            yield _with(samples, kept)

    def _sampling(
        self, recipe: Recipe, resolution: int, *, images: int, rounds: int, trained_bytes: int, packed: bool
    ) -> PhaseLedger:
        settings = {"resolution": resolution, "images": images, "rounds": rounds, "trained_bytes": trained_bytes}
        return self._once(
            lambda: samples_phase(self._setting.folder, recipe, **settings, packed=packed, device=self._setting.device),
            *("samples", recipe.weights, recipe.weight_bits, recipe.dtype, recipe.vae_tile, recipe.sample_steps),
            *(packed, *settings.values()),
        )

    def _once(self, make: Callable[[], PhaseLedger], *key: object) -> PhaseLedger:
        if key not in self._phases:
            self._phases[key] = make()
        return self._phases[key]


def _kinds(recipe: Recipe) -> int:
    """Photos, and with prior preservation as many class images."""
    return 1 if recipe.class_prompt is None else 2


def _draws(recipe: Recipe) -> list[int]:
    """Distinct draws of each pool."""
    return [_kinds(recipe) * pool_size(recipe, steps) for steps in refresh_periods(recipe)]


def _crops(recipe: Recipe, *, photos: int) -> tuple[int, int]:
    """Distinct crops that are encoded in all, and those that are in use at once."""
    draws = _draws(recipe)
    if recipe.patches not in ("none", "resize"):
        return sum(draws), max(draws)
    images = photos + (0 if recipe.class_prompt is None else recipe.class_images)
    images *= 2 if recipe.gradient == "mixed" else 1
    return min(images, sum(draws)), min(images, max(draws))


def _shapes(recipe: Recipe, setting: Setting) -> Shapes:
    folder, side = setting.folder, _training_side(recipe, setting.folder)
    low = low_side(recipe.low_resolution, side=side, unit=folder.resolution_unit) if recipe.gradient == "mixed" else None
    return Shapes(
        side=side // folder.vae_scale,
        tokens=setting.tokens or text_tokens(folder),
        samples=recipe.batch_size * _kinds(recipe),
        low_side=None if low is None else low // folder.vae_scale,
        canvas=canvas_of(
            recipe, positions_for=folder.family.positions_for, side=_resolution(recipe, folder) // folder.vae_scale
        ),
    )


def _photos(reading_bytes: int) -> PhaseLedger:
    item = Item(name="a photo while it is read", bytes=reading_bytes, formula="the largest one, as it is in its file")
    return PhaseLedger(name="photos", items=(item,) if reading_bytes else ())


def _class_images(count: int, side: int) -> Item:
    size = count * side**2 * PIXEL_BYTES
    return Item(name="class images", bytes=size, formula=f"{count} of {side} x {side} pixels, {PIXEL_BYTES} B each")


def _next_shard(recipe: Recipe, setting: Setting, plan: BlockPlan) -> Item:
    """Features that wait in main memory until they are enough for a file."""
    draws = max(_draws(recipe))
    size = min(SHARD_BYTES, _cache_bytes(recipe, setting, plan, draws=draws))
    return Item(name="features for the next file", bytes=size, formula=f"of {draws} draws, {SHARD_BYTES / 1e6:.0f} MB at most")


def _cache_bytes(recipe: Recipe, setting: Setting, plan: BlockPlan, *, draws: int) -> int:
    return predicted_bytes(
        setting.folder,
        plan,
        side=_training_side(recipe, setting.folder),
        text_tokens=setting.tokens or text_tokens(setting.folder),
        draws=draws,
        dtype=getattr(torch, recipe.cache_dtype),
    )


def _with(phase: PhaseLedger, kept: tuple[Item, ...]) -> PhaseLedger:
    return replace(phase, items=(*phase.items, *kept))


def _resolution(recipe: Recipe, folder: ModelFolder) -> int:
    return recipe.resolution or folder.native_resolution


def _training_side(recipe: Recipe, folder: ModelFolder) -> int:
    return patch_sides(recipe, resolution=_resolution(recipe, folder), unit=folder.resolution_unit)[0]


def _with_floor(phase: PhaseLedger, setting: Setting) -> PhaseLedger:
    pixels = (_TYPICAL_SIDE**2,) * _TYPICAL_COUNT if setting.photos is None else setting.photos
    typical = f"{_TYPICAL_COUNT} of {_TYPICAL_SIDE} x {_TYPICAL_SIDE} pixels"
    said = f"{typical if setting.photos is None else len(pixels)}, {PIXEL_BYTES} B a pixel"
    floor = Item(name="interpreter and libraries", bytes=setting.floor_bytes, formula="measured", fixed=True)
    if not setting.folder.has("vae"):
        return replace(phase, items=(floor, *phase.items))
    photos = Item(name="photos", bytes=sum(pixels) * PIXEL_BYTES, formula=said, fixed=True)
    return replace(phase, items=(floor, photos, *phase.items))


def _disk(recipe: Recipe, setting: Setting, plan: BlockPlan, phases: tuple[PhaseLedger, ...]) -> tuple[tuple[str, int], ...]:
    folder = setting.folder
    training = next(phase for phase in phases if phase.name == "training")
    trained = training.item(TRAINED)
    disk = {"checkpoints": CHECKPOINT_COPIES * trained, "result": trained, "scratch file": training.disk_bytes}
    if plan.skipped and recipe.use_residuals:
        disk["feature cache"] = _cache_bytes(recipe, setting, plan, draws=max(_draws(recipe)))
    if recipe.weights == "streamed" and recipe.weight_bits:
        disk["packed copy"] = stored_bytes(folder, BlockPlan(plan.block_count), recipe)
    return tuple((name, size) for name, size in disk.items() if size)


def _notes(folder: ModelFolder) -> tuple[str, ...]:
    if folder.has("vae"):
        return ()
    return (f"only the denoiser's configuration of {folder.name} is here: photos, text, latents and samples are not counted",)
