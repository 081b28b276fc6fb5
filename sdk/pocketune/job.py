"""The main job: photos in, a LoRA, pictures and a report out. Its phases run one after the other, each freeing what it used."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pocketune.atomic import replacing, write_text
from pocketune.checkpoint import CheckpointFolder
from pocketune.delta import check_lora_loads, save_lora, trained_norms
from pocketune.errors import Interrupted, NoEffectError, PlanError, RunError
from pocketune.features.cache import FeatureCache, cache_key
from pocketune.features.precompute import cache_bytes, check_bound, precompute
from pocketune.memory import MemoryLog, read_memory
from pocketune.methods.lora import add_lora
from pocketune.models.base import Prompt
from pocketune.models.load import ModelFolder, open_model
from pocketune.photos import Photo, load_photos
from pocketune.plan.blocks import BlockPlan, parse_plan
from pocketune.progress import OnProgress, Progress, ignore
from pocketune.recipe import Recipe
from pocketune.record import CheckResult, RunRecord, SamplePair
from pocketune.report import write_report
from pocketune.sample import default_device, run_pipeline
from pocketune.sampling.batches import BatchMaker, encode_crops
from pocketune.sampling.draws import Draw, Kind, draw_samples
from pocketune.train import step_draws, train

SAMPLE_SEED = 1000
MAX_PHOTO_SIDE = 2048
_LIBRARIES = ("pocketune", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow")


def personalize(
    photos: str | Path | Sequence[str | Path],
    *,
    recipe: Recipe,
    out: str | Path,
    model: str | Path = "pocket-sd3",
    features: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    on_progress: OnProgress = ignore,
) -> RunRecord:
    """Train a LoRA of the subject in some photos.

    Args:
        photos: a folder, a file, or several of either.
        recipe: what is asked.
        out: the RUN folder to make; it must not exist unless `resume` is set.
        model: built-in name, diffusers folder or hub id.
        features: folder of feature caches that runs share; default: inside RUN.
        resume: go on from the newest checkpoint in `out`.
        device: torch device; default: CUDA where there is one.
        on_progress: called with every bit of progress.

    Returns:
        What was measured; RUN holds the LoRA, the pictures, `report.html` and `run.json`.

    Raises:
        PhotoError, ModelError, PlanError, RecipeError, RunError: bad input; nothing is left behind.
        Interrupted: on Ctrl-C, after a checkpoint was saved.
        NoEffectError: the trained adapter does nothing.
    """
    run = Path(out)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with MemoryLog() as memory:
        job = _Job(recipe, open_model(model), run, torch.device(device or default_device()), memory, on_progress)
        with job.phase("photos"):
            pictures = load_photos(photos, max_side=MAX_PHOTO_SIDE)
        job.check_resolution()
        plan = parse_plan(recipe.skip, job.folder.block_count)
        fingerprint = cache_key({"recipe": recipe.model_dump(), "model": job.folder.fingerprint(), "photos": _hashes(pictures)})
        with _run_folder(run, resume=resume, fingerprint=fingerprint):
            prompts = job.encode_prompts()
            class_images = job.make_class_images()
            draws, class_draws, make_batch = job.prepare_samples(pictures, class_images, prompts)
            batches = step_draws(recipe, draws, class_draws)
            cache = job.fill_cache(
                plan, batches, make_batch, prompts, Path(features) if features else run / "features", pictures
            )
            losses, norms = job.train(
                plan, batches, make_batch, cache, CheckpointFolder(run / "checkpoints", fingerprint=fingerprint)
            )
            pairs, change = job.sample_pairs()
            record = RunRecord(
                model=job.folder.name,
                model_kind=job.folder.denoiser_kind,
                model_note=job.folder.note(),
                recipe=recipe,
                plan=job.describe(plan, cache),
                losses=losses,
                memory=memory.rows,
                peaks=memory.peaks(),
                seconds=dict(job.seconds),
                photos=tuple(photo.name for photo in pictures),
                samples=pairs,
                check=CheckResult(nonzero=any(norms.values()), loads=True, image_change=change, norms=norms),
                versions={name: version(name) for name in _LIBRARIES},
                started=started,
            )
            _save_thumbnails(pictures, run / "photos")
            write_report(record, run)
    return record


@dataclass
class _Job:
    """One personalization under way: what its phases share."""

    recipe: Recipe
    folder: ModelFolder
    run: Path
    device: torch.device
    memory: MemoryLog
    on_progress: OnProgress
    seconds: dict[str, float] = field(default_factory=dict)
    trained_parameters: int = 0

    @property
    def resolution(self) -> int:
        return self.recipe.resolution or self.folder.native_resolution

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.recipe.dtype)  # type: ignore[no-any-return]

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

    def tell(self, phase: str, done: int, total: int, unit: str, loss: float | None = None) -> None:
        rss = read_memory().rss_bytes
        self.on_progress(Progress(phase=phase, done=done, total=total, unit=unit, loss=loss, rss_bytes=rss))

    def check_resolution(self) -> None:
        """Refuse a resolution that the model cannot work at."""
        unit, largest = self.folder.resolution_unit, self.folder.largest_resolution
        if self.resolution % unit or self.resolution > largest:
            nearest = min(largest, max(unit, round(self.resolution / unit) * unit))
            msg = (
                f"resolution {self.resolution} does not fit {self.folder.name}: expected a multiple of {unit} up to {largest}. "
                f"Try --resolution {nearest}."
            )
            raise PlanError(msg)

    def encode_prompts(self) -> dict[Kind, Prompt]:
        """Text embeddings of the prompts that training uses."""
        wanted: dict[Kind, str] = {"instance": self.recipe.instance_prompt}
        if self.recipe.class_prompt:
            wanted["class"] = self.recipe.class_prompt
        with self.phase("text"):
            encoded = self.folder.encode_prompts(list(wanted.values()), device=self.device)
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
                    self.folder.pipeline(dtype=self.dtype, device=self.device),
                    self.folder,
                    [prompt] * count,
                    seeds=[self.recipe.seed + number for number in range(count)],
                    steps=self.recipe.sample_steps,
                    guidance=self.recipe.guidance_scale,
                    resolution=self.resolution,
                    on_image=lambda done, total: self.tell("class images", done, total, "image"),
                )
                for image, path in zip(images, paths, strict=True):
                    _save_png(image, path)
            return [Image.open(path).convert("RGB") for path in paths]

    def prepare_samples(
        self, pictures: Sequence[Photo], class_images: Sequence[Image.Image], prompts: dict[Kind, Prompt]
    ) -> tuple[tuple[Draw, ...], tuple[Draw, ...], BatchMaker]:
        """Draw all samples and encode their crops."""
        images: dict[Kind, Sequence[Image.Image]] = {"instance": [photo.image for photo in pictures], "class": class_images}
        draws = draw_samples(self.recipe, [image.size for image in images["instance"]], kind="instance")
        class_draws = draw_samples(self.recipe, [image.size for image in class_images], kind="class") if class_images else ()
        with self.phase("latents"):
            vae = self.folder.load_vae(device=self.device)
            posteriors = encode_crops(
                vae,
                images,
                (*draws, *class_draws),
                resolution=self.resolution,
                on_crop=lambda done, total: self.tell("latents", done, total, "photo"),
            )
            del vae
        make_batch = BatchMaker(
            posteriors,
            prompts,
            self.folder.scheduler(),
            prior_loss_weight=self.recipe.prior_loss_weight,
            device=self.device,
            dtype=self.dtype,
        )
        return draws, class_draws, make_batch

    def fill_cache(
        self,
        plan: BlockPlan,
        batches: Sequence[Sequence[Draw]],
        make_batch: BatchMaker,
        prompts: dict[Kind, Prompt],
        root: Path,
        pictures: Sequence[Photo],
    ) -> FeatureCache | None:
        """Run the frozen model over all draws and store what skipped spans contribute."""
        if not plan.skipped or not self.recipe.use_residuals:
            return None
        cache_dtype: torch.dtype = getattr(torch, self.recipe.cache_dtype)
        distinct = {(draw.kind, draw.index) for draws in batches for draw in draws}
        needed = cache_bytes(
            plan,
            draws=len(distinct),
            image_tokens=(self.resolution // self.folder.resolution_unit) ** 2,
            text_tokens=prompts["instance"].hidden.shape[1],
            width=self.folder.width,
            dtype=cache_dtype,
        )
        check_bound(needed, limit_mb=self.recipe.cache_limit_mb, draws=len(distinct))
        key = cache_key(
            {
                "model": self.folder.fingerprint(),
                "photos": _hashes(pictures),
                "prompts": [self.recipe.instance_prompt, self.recipe.class_prompt, self.recipe.class_images],
                "skipped": plan.skipped,
                "draws": [[draw.as_dict() for draw in draws] for draws in batches],
                "resolution": self.resolution,
                "dtypes": [self.recipe.dtype, self.recipe.cache_dtype],
            }
        )
        cache = FeatureCache(root / key, spans=plan.skipped_spans, dtype=cache_dtype)
        with self.phase("features"):
            adapter = self.folder.load_denoiser(dtype=self.dtype, device=self.device, blocks=range(plan.skipped_spans[-1].stop))
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
        return cache

    def train(
        self,
        plan: BlockPlan,
        batches: Sequence[Sequence[Draw]],
        make_batch: BatchMaker,
        cache: FeatureCache | None,
        checkpoints: CheckpointFolder,
    ) -> tuple[tuple[float, ...], dict[str, float]]:
        """Train the kept blocks' LoRA and save it; the losses and the norm of each up-projection."""
        with self.phase("training"):
            adapter = self.folder.load_denoiser(dtype=self.dtype, device=self.device, blocks=plan.kept)
            parameters = add_lora(
                adapter, blocks=plan.kept, rank=self.recipe.rank, targets=self.recipe.lora_targets, seed=self.recipe.seed
            )
            self.trained_parameters = sum(parameter.numel() for parameter in parameters.values())
            losses = train(
                adapter,
                parameters,
                plan,
                self.recipe,
                batches,
                make_batch,
                cache=cache,
                checkpoints=checkpoints,
                on_step=lambda done, total, loss: self.tell("training", done, total, "step", loss),
            )
            save_lora(adapter, self.run / "lora")
            return losses, trained_norms(parameters)

    def sample_pairs(self) -> tuple[tuple[SamplePair, ...], float]:
        """Same-seed images without and with the LoRA, and how much it changes them (mean absolute difference, 0 to 1)."""
        prompts = self.recipe.sample_prompts or _default_prompts(self.recipe.instance_prompt)
        seeds = [SAMPLE_SEED + number for number in range(len(prompts))]
        with self.phase("samples"):
            pipeline = self.folder.pipeline(dtype=self.dtype, device=self.device)
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
                    on_image=lambda done, _: self.tell("samples", already + done, total, "image"),
                )

            before = render(0)
            check_lora_loads(pipeline, self.run / "lora" / "pytorch_lora_weights.safetensors")
            after = render(len(prompts))
        change = float(np.mean([_difference(a, b) for a, b in zip(before, after, strict=True)]))
        if change == 0.0:
            msg = "the LoRA loads but changes no image. Train for more steps or with a higher learning_rate."
            raise NoEffectError(msg)
        pairs = []
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            names = [Path("samples") / f"{number:02d}-{when}.png" for when in ("before", "after")]
            _save_png(before[number], self.run / names[0])
            _save_png(after[number], self.run / names[1])
            pairs.append(SamplePair(prompt=prompt, seed=seed, before=names[0], after=names[1]))
        return tuple(pairs), change

    def describe(self, plan: BlockPlan, cache: FeatureCache | None) -> dict[str, Any]:
        """The plan as plain data for the report."""
        return {
            "blocks": plan.block_count,
            "skipped": plan.describe(),
            "trained_blocks": list(plan.kept),
            "trained_parameters": self.trained_parameters,
            "residuals": bool(plan.skipped) and self.recipe.use_residuals,
            "feature_cache_bytes": cache.size_bytes if cache else 0,
            "resolution": self.resolution,
            "device": str(self.device),
            "dtype": self.recipe.dtype,
        }


@contextmanager
def _run_folder(run: Path, *, resume: bool, fingerprint: str) -> Iterator[None]:
    """Make RUN, or take up an interrupted one; a new RUN that fails before its first checkpoint is removed again."""
    job_file = run / "job.json"
    existed = run.exists() and (not run.is_dir() or any(run.iterdir()))
    if existed and not resume:
        msg = f"{run} exists already. Choose another --out, or go on with --resume."
        raise RunError(msg)
    if resume and not job_file.exists():
        msg = f"{run} holds no interrupted run to resume. Start one without --resume."
        raise RunError(msg)
    if resume and json.loads(job_file.read_text(encoding="utf-8")).get("fingerprint") != fingerprint:
        msg = f"{run} was started with another recipe, model or photos. Resume with the same ones, or choose another --out."
        raise RunError(msg)
    if not resume:
        write_text(job_file, json.dumps({"fingerprint": fingerprint}) + "\n")
    try:
        yield
    except BaseException as error:
        worth_keeping = isinstance(error, Interrupted) or any((run / "checkpoints").glob("*.safetensors"))
        if not existed and not worth_keeping:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _default_prompts(instance_prompt: str) -> tuple[str, ...]:
    return tuple(f"{instance_prompt}{where}" for where in ("", " on grass", " at the beach", " in snow"))


def _hashes(pictures: Sequence[Photo]) -> list[str]:
    return [photo.sha256 for photo in pictures]


def _difference(first: Image.Image, second: Image.Image) -> float:
    a, b = np.asarray(first, dtype=np.float32), np.asarray(second, dtype=np.float32)
    return float(np.abs(a - b).mean() / 255)


def _save_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as partial:
        image.save(partial, format="PNG")


def _save_thumbnails(pictures: Sequence[Photo], folder: Path) -> None:
    for photo in pictures:
        small = photo.image.copy()
        small.thumbnail((256, 256))
        with replacing(folder / f"{hashlib.sha256(photo.name.encode()).hexdigest()[:8]}.jpg") as partial:
            small.save(partial, format="JPEG", quality=85)
