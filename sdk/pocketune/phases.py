"""The phases of a personalization. Each loads what it needs, and what it loaded is gone when the next begins."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pocketune.allocator import trim
from pocketune.atomic import replacing
from pocketune.checkpoint import CheckpointFolder
from pocketune.errors import Interrupted, NoEffectError, PlanError
from pocketune.features.cache import FeatureCache, cache_key, remove_other_caches
from pocketune.features.precompute import check_bound, key_of, precompute, predicted_bytes
from pocketune.memory import MemoryLog, read_memory
from pocketune.methods.base import TuningMethod
from pocketune.methods.scales import quantization_of
from pocketune.models.base import DenoiserAdapter, Prompt, SkipConnected
from pocketune.models.load import ModelFolder
from pocketune.photos import Photo
from pocketune.plan.blocks import BlockPlan
from pocketune.plan.select import SELECTION_FILE, selection_of
from pocketune.plan.skipping import plan_for
from pocketune.progress import OnProgress, Progress
from pocketune.recipe import Recipe
from pocketune.record import SamplePair
from pocketune.sample import BATCH, run_pipeline
from pocketune.sampling.batches import BatchMaker, CropKey, NoiseSchedule, Posterior, crop_key, encode_crops
from pocketune.sampling.choices import Choice, choose, lower
from pocketune.sampling.draws import Draw, Kind, draw_samples, refresh_periods, step_draws
from pocketune.sampling.patches import Patches, patches_of
from pocketune.scratch import Scratch
from pocketune.train import train
from pocketune.tuning import METHODS
from pocketune.weights.fill import RESIDENT, Residence

SAMPLE_SEED = 1000


@dataclass
class Phases:
    """One personalization under way: what its phases share."""

    recipe: Recipe
    folder: ModelFolder
    run: Path
    device: torch.device
    memory: MemoryLog
    on_progress: OnProgress
    seconds: dict[str, float] = field(default_factory=dict)
    trained_parameters: int = 0
    chosen_by: str = "the recipe"
    choices: tuple[Choice, ...] = ()
    posteriors: dict[CropKey, Posterior] = field(default_factory=dict)
    cache_bytes: int = 0
    cache_error: float = 0.0

    @property
    def resolution(self) -> int:
        """Side, in pixels, of sampled images and, unless patches are asked for, of the training images."""
        return self.recipe.resolution or self.folder.native_resolution

    @cached_property
    def patches(self) -> Patches:
        """What each draw sees of its photo; `smallest` is the side of the training images."""
        return patches_of(
            self.recipe,
            resolution=self.resolution,
            unit=self.folder.resolution_unit,
            noise=NoiseSchedule.of(self.folder.scheduler()).shares(),
        )

    @property
    def method(self) -> TuningMethod:
        """What is tuned."""
        return METHODS[self.recipe.method]

    @property
    def low_resolution(self) -> int:
        """Side of the images that mixed training backpropagates on."""
        unit = self.folder.resolution_unit
        return self.recipe.low_resolution or max(unit, self.patches.smallest // 2 // unit * unit)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and of the arithmetic."""
        return getattr(torch, self.recipe.dtype)  # type: ignore[no-any-return]

    @property
    def residence(self) -> Residence:
        """Where the denoiser's frozen weights are."""
        if self.recipe.weights == "resident":
            return RESIDENT
        return Residence(streamed=True, bits=self.recipe.weight_bits)

    @property
    def parts_residence(self) -> Residence:
        """Where the weights of text encoders and VAE are; they are not packed."""
        return Residence(streamed=self.recipe.weights == "streamed")

    @property
    def sampling_batch(self) -> int:
        """Images sampled at a time."""
        return 1 if self.parts_residence.streamed else BATCH

    @property
    def latent_side(self) -> int | None:
        """The only size that training works at; None where there are two."""
        return None if self.recipe.gradient == "mixed" else self.patches.smallest // self.folder.vae_scale

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, mark it in the memory log, and return memory to the system at its end."""
        self.memory.phase(name)
        self.tell(name, 0, 0, "step")
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            gc.collect()
            trim()

    def tell(self, phase: str, done: int, total: int, unit: str, loss: float | None = None) -> None:
        """Report progress with the memory of this moment."""
        rss = read_memory().rss_bytes
        self.on_progress(Progress(phase=phase, done=done, total=total, unit=unit, loss=loss, rss_bytes=rss))

    def check_resolution(self) -> None:
        """Refuse a resolution that the model cannot work at, and patches that do not fit it."""
        unit, largest = self.folder.resolution_unit, self.folder.largest_resolution
        if self.resolution % unit or self.resolution > (largest or self.resolution):
            nearest = max(unit, round(self.resolution / unit) * unit)
            nearest, bound = (nearest, "") if largest is None else (min(largest, nearest), f" up to {largest}")
            msg = (
                f"resolution {self.resolution} does not fit {self.folder.name}: expected a multiple of {unit}{bound}. "
                f"Try --resolution {nearest}."
            )
            raise PlanError(msg)
        _ = self.patches
        if self.recipe.gradient == "mixed" and (self.low_resolution % unit or self.low_resolution >= self.patches.smallest):
            msg = (
                f"low_resolution {self.low_resolution} does not fit: expected a multiple of {unit} below that of the "
                f"training images, {self.patches.smallest}. Leave low_resolution out to take half."
            )
            raise PlanError(msg)

    def plan_blocks(self) -> BlockPlan:
        """Which blocks are skipped; refuses what makes no sense for the architecture."""
        adapter = self.folder.empty_denoiser()
        selection = selection_of(self.folder) if self.recipe.skip.startswith("auto") else None
        plan = plan_for(adapter, self.recipe.skip, use_residuals=self.recipe.use_residuals, selection=selection)
        if self.recipe.skip.startswith("auto") and not isinstance(adapter, SkipConnected):
            self.chosen_by = (
                f"masking text in this model ({SELECTION_FILE})"
                if selection
                else f"the proportions found for FLUX; no {SELECTION_FILE} of these weights lies in the model's folder"
            )
        return plan

    def encode_prompts(self) -> dict[Kind, Prompt]:
        """Text embeddings of the prompts that training uses."""
        wanted: dict[Kind, str] = {"instance": self.recipe.instance_prompt}
        if self.recipe.class_prompt:
            wanted["class"] = self.recipe.class_prompt
        with self.phase("text"):
            encoded = self.folder.encode_prompts(list(wanted.values()), device=self.device, weights=self.parts_residence)
        return {kind: encoded[text] for kind, text in wanted.items()}

    def make_class_images(self) -> list[Image.Image]:
        """Pictures of the class by the base model, kept in RUN/class_images for a resumed run."""
        prompt, count = self.recipe.class_prompt, self.recipe.class_images
        if prompt is None:
            return []
        paths = [self.run / "class_images" / f"{number:03d}.png" for number in range(count)]
        with self.phase("class images"):
            if not all(path.exists() for path in paths):
                images = run_pipeline(
                    self._pipeline(),
                    self.folder,
                    [prompt] * count,
                    seeds=[self.recipe.seed + number for number in range(count)],
                    steps=self.recipe.sample_steps,
                    guidance=self.recipe.guidance_scale,
                    resolution=self.resolution,
                    batch=self.sampling_batch,
                    on_image=lambda done, total: self.tell("class images", done, total, "image"),
                )
                for image, path in zip(images, paths, strict=True):
                    _save_png(image, path)
            return [Image.open(path).convert("RGB") for path in paths]

    def draw(self, images: Mapping[Kind, Sequence[Image.Image]]) -> list[tuple[Draw, ...]]:
        """The draws of every step."""
        positions = 1.0 - self.recipe.timestep_high / 1000, 1.0 - self.recipe.timestep_low / 1000
        photos, class_images = (
            draw_samples(
                self.recipe,
                [image.size for image in images[kind]],
                kind=kind,
                choose_crop=self.patches,
                positions=positions,
            )
            if images[kind]
            else ()
            for kind in ("instance", "class")
        )
        batches = step_draws(self.recipe, photos, class_images)
        if self.recipe.gradient == "mixed":
            self.choices = choose(self.recipe, batches, NoiseSchedule.of(self.folder.scheduler()).shares())
            batches = lower(batches, self.choices)
        return batches

    def encode(
        self,
        images: Mapping[Kind, Sequence[Image.Image]],
        batches: Sequence[Sequence[Draw]],
        prompts: dict[Kind, Prompt],
    ) -> BatchMaker:
        """Encode the crops of some steps' draws; of those encoded before, the ones that occur again are kept."""
        draws = {crop_key(draw): draw for draws in batches for draw in draws}
        self.posteriors = {key: posterior for key, posterior in self.posteriors.items() if key in draws}
        missing = [draw for key, draw in draws.items() if key not in self.posteriors]
        if missing:
            with self.phase("latents"):
                vae = self.folder.load_vae(device=self.device, weights=self.parts_residence, tile=self.recipe.vae_tile)
                self.posteriors |= encode_crops(
                    vae,
                    images,
                    missing,
                    resolution=self.patches.smallest,
                    low_resolution=self.low_resolution,
                    on_crop=lambda done, total: self.tell("latents", done, total, "photo"),
                )
                del vae
        return BatchMaker(
            self.posteriors,
            prompts,
            self.folder.scheduler(),
            prior_loss_weight=self.recipe.prior_loss_weight,
            device=self.device,
            dtype=self.dtype,
            with_sizes=self.folder.family.takes_sizes,
        )

    def fill_cache(
        self,
        plan: BlockPlan,
        batches: Sequence[Sequence[Draw]],
        make_batch: BatchMaker,
        prompts: dict[Kind, Prompt],
        root: Path,
        pictures: Sequence[Photo],
    ) -> FeatureCache | None:
        """Run the frozen model over the draws of some steps and store what skipped spans contribute.

        Where the pool is refreshed, what earlier steps needed is removed first.
        """
        if not plan.skipped or not self.recipe.use_residuals:
            return None
        cache_dtype: torch.dtype = getattr(torch, self.recipe.cache_dtype)
        distinct = {key_of(draw): draw.low for draws in batches for draw in draws}
        low = sum(distinct.values())
        needed = sum(
            predicted_bytes(
                self.folder,
                plan,
                side=side,
                text_tokens=prompts["instance"].hidden.shape[1],
                draws=count,
                dtype=cache_dtype,
            )
            for count, side in ((len(distinct) - low, self.patches.smallest), (low, self.low_resolution))
            if count
        )
        check_bound(needed, limit_mb=self.recipe.cache_limit_mb, draws=len(distinct))
        key = cache_key(
            {
                "model": self.folder.fingerprint(),
                "photos": photo_hashes(pictures),
                "prompts": [self.recipe.instance_prompt, self.recipe.class_prompt, self.recipe.class_images],
                "skipped": plan.skipped,
                "draws": [[draw.as_dict() for draw in draws] for draws in batches],
                "resolution": [self.patches.smallest, self.low_resolution],
                "dtypes": [
                    self.recipe.dtype,
                    self.recipe.cache_dtype,
                    self.recipe.weights,
                    self.recipe.weight_bits,
                    self.recipe.quantizer,
                ],
            }
        )
        if self.recipe.refresh_every:
            remove_other_caches(root, keep=key)
        cache = FeatureCache(root / key, spans=plan.skipped_spans, dtype=cache_dtype)
        with self.phase("features"):
            adapter = self._denoiser(range(plan.skipped_spans[-1].stop))
            try:
                precompute(
                    adapter,
                    plan,
                    batches,
                    make_batch,
                    cache,
                    on_sample=lambda done, total: self.tell("features", done, total, "sample"),
                )
            except KeyboardInterrupt as error:
                msg = "stopped while computing features; what is done is kept. Give the same command with --resume to go on."
                raise Interrupted(msg) from error
            del adapter
        self.cache_bytes, self.cache_error = max(self.cache_bytes, cache.size_bytes), cache.relative_error
        return cache

    def train(
        self,
        plan: BlockPlan,
        batches: Sequence[Sequence[Draw]],
        make_batch: BatchMaker,
        cache: FeatureCache | None,
        checkpoints: CheckpointFolder,
        *,
        stop: int,
    ) -> tuple[tuple[float, ...], dict[str, float]]:
        """Train to a step, and save the result; the losses so far and how far each trained tensor has come."""
        with self.phase("training"):
            adapter = self._denoiser(plan.kept)
            tuned = self.method.attach(adapter, plan=plan, recipe=self.recipe, folder=self.folder)
            self.trained_parameters = sum(parameter.numel() for parameter in tuned.parameters.values())
            losses = train(
                adapter,
                tuned,
                plan,
                self.recipe,
                batches,
                make_batch,
                cache=cache,
                checkpoints=checkpoints,
                scratch=Scratch(self.run) if self.recipe.activations == "on_disk" else None,
                on_step=lambda done, total, loss: self.tell("training", done, total, "step", loss),
                stop=stop,
            )
            if stop == self.recipe.steps:
                self.method.save(adapter, tuned, self.run / self.method.result, recipe=self.recipe)
            return losses, self.method.change(tuned)

    def sample_pairs(self) -> tuple[tuple[SamplePair, ...], float]:
        """Same-seed images without and with the result, and how much it changes them (mean absolute difference, 0 to 1)."""
        prompts = self.recipe.sample_prompts or _default_prompts(self.recipe.instance_prompt)
        seeds = [SAMPLE_SEED + number for number in range(len(prompts))]
        with self.phase("samples"):
            pipeline = self._pipeline()
            total = 2 * len(prompts)

            def render(already: int) -> list[Image.Image]:
                return run_pipeline(
                    pipeline,
                    self.folder,
                    prompts,
                    seeds=seeds,
                    steps=self.recipe.sample_steps,
                    guidance=self.recipe.guidance_scale,
                    resolution=self.resolution,
                    batch=self.sampling_batch,
                    on_image=lambda done, _: self.tell("samples", already + done, total, "image"),
                )

            before = render(0)
            self.method.check(pipeline, self.run / self.method.result, self.folder)
            after = render(len(prompts))
        change = float(np.mean([_difference(a, b) for a, b in zip(before, after, strict=True)]))
        if change == 0.0:
            msg = "the result loads but changes no image. Train for more steps or with a higher learning_rate."
            raise NoEffectError(msg)
        pairs = []
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            names = [Path("samples") / f"{number:02d}-{when}.png" for when in ("before", "after")]
            _save_png(before[number], self.run / names[0])
            _save_png(after[number], self.run / names[1])
            pairs.append(SamplePair(prompt=prompt, seed=seed, before=names[0], after=names[1]))
        return tuple(pairs), change

    def _denoiser(self, blocks: Collection[int]) -> DenoiserAdapter:
        return self.folder.load_denoiser(
            dtype=self.dtype,
            device=self.device,
            blocks=blocks,
            weights=self.residence,
            quantization=quantization_of(self.recipe),
            latent_side=self.latent_side,
        )

    def _pipeline(self) -> Any:
        return self.folder.pipeline(
            dtype=self.dtype,
            device=self.device,
            weights=self.parts_residence,
            latent_side=self.resolution // self.folder.vae_scale,
            tile=self.recipe.vae_tile,
        )

    def describe(self, plan: BlockPlan) -> dict[str, Any]:
        """The plan as plain data for the report."""
        mixed: dict[str, Any] = {}
        if self.choices:
            taken = [choice.as_dict() for choice in self.choices]
            mixed = {
                "low_resolution": self.low_resolution,
                "zeroth_order_steps": sum(choice.zeroth_order for choice in self.choices),
                "choices": taken,
            }
        return {
            "blocks": plan.block_count,
            "skipped": plan.describe(),
            "chosen_by": self.chosen_by,
            "trained_blocks": list(plan.kept),
            "trained_parameters": self.trained_parameters,
            "residuals": bool(plan.skipped) and self.recipe.use_residuals,
            "feature_cache_bytes": self.cache_bytes,
            "feature_cache_error": self.cache_error,
            "feature_pools": len(refresh_periods(self.recipe)),
            "resolution": self.patches.smallest,
            "patches": self.patches.describe(),
            "method": self.recipe.method,
            "gradient": self.recipe.gradient,
            "device": str(self.device),
            "dtype": self.recipe.dtype,
            "weights": self.recipe.weights,
            "weight_bits": self.recipe.weight_bits,
            "activations": self.recipe.activations,
            **mixed,
        }


def photo_hashes(pictures: Sequence[Photo]) -> list[str]:
    """The sha256 of each photo's file."""
    return [photo.sha256 for photo in pictures]


def _default_prompts(instance_prompt: str) -> tuple[str, ...]:
    return tuple(f"{instance_prompt}{where}" for where in ("", " on grass", " at the beach", " in snow"))


def _difference(first: Image.Image, second: Image.Image) -> float:
    a, b = np.asarray(first, dtype=np.float32), np.asarray(second, dtype=np.float32)
    return float(np.abs(a - b).mean() / 255)


def _save_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as partial:
        image.save(partial, format="PNG")
