"""The phases of a job on a device, one after the other, each freeing what it used."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pocketune.atomic import replacing
from pocketune.errors import Interrupted, NoEffectError
from pocketune.features.shards import remove_other_caches
from pocketune.photos import Photo, load_made_images
from pocketune.runfolder import FEATURES, class_image_paths
from pocketune.sampling.draws import Draw, Kind, draw_samples, pool_size, refresh_periods, step_draws
from pocketune.watch import Watch
from pocketune_edge.batches import BatchMaker, encode_crops
from pocketune_edge.bundle import Bundle
from pocketune_edge.cache import FeatureCache
from pocketune_edge.delta import neutral, save_result, start_values
from pocketune_edge.denoiser import Denoiser
from pocketune_edge.features import check_bound, precompute
from pocketune_edge.sample import GROUP, render
from pocketune_edge.session import Sessions
from pocketune_edge.settings import Settings
from pocketune_edge.state import CheckpointFolder, State
from pocketune_edge.steps import Mode, check_mode, stepper_of
from pocketune_edge.text import Prompt, encode_prompts
from pocketune_edge.train import train


@dataclass
class Job:
    """One personalization under way: what its phases share."""

    bundle: Bundle
    settings: Settings
    run: Path
    streaming: bool
    threads: int | None
    watch: Watch
    cache_bytes: int = 0
    step_cpu_seconds: list[float] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str, *, resumable: bool = False, keep: bool = True) -> Iterator[Sessions]:
        """Watch a phase, and close its graphs at its end.

        Args:
            name: of the phase.
            resumable: Ctrl-C loses nothing of what the phase has finished.
            keep: leave graphs open between their uses, unless streaming.

        Raises:
            Interrupted: on Ctrl-C in a phase whose work is kept.
        """
        sessions = Sessions(self.bundle, keep=keep and not self.streaming, threads=self.threads)
        try:
            with self.watch.phase(name):
                yield sessions
        except KeyboardInterrupt as error:
            if not resumable:
                raise
            msg = f"stopped at {name}; what is done is kept. Give the same command with --resume to go on."
            raise Interrupted(msg) from error
        finally:
            sessions.close()

    def encode_prompts(self) -> dict[Kind, Prompt]:
        """Text embeddings of the prompts that training uses."""
        wanted: dict[Kind, str] = {"instance": self.settings.instance_prompt}
        if self.settings.class_prompt:
            wanted["class"] = self.settings.class_prompt
        with self.phase("text") as sessions:
            encoded = encode_prompts(sessions, list(wanted.values()))
        return {kind: encoded[text] for kind, text in wanted.items()}

    def make_class_images(self) -> list[Image.Image]:
        """Images of the class by the base model, kept in RUN/class_images for a resumed run."""
        prompt, count = self.settings.class_prompt, self.settings.class_images
        if not prompt:
            return []
        paths = class_image_paths(self.run, count)
        # Whole groups, so that each image has the same neighbours in its batch when a stopped run goes on.
        groups = [range(start, min(start + GROUP, count)) for start in range(0, count, GROUP)]
        missing = [number for group in groups if not all(paths[number].exists() for number in group) for number in group]
        if missing:
            with self.phase("class images", resumable=True) as sessions:
                images = render(
                    sessions,
                    [prompt] * len(missing),
                    seeds=[self.settings.seed + number for number in missing],
                    steps=self.settings.sample_steps,
                    guidance=self.settings.guidance_scale,
                    parameters=neutral(self.bundle.manifest.tuned),
                    on_step=lambda done, total: self.watch.tell("class images", done, total, "step"),
                )
                for number, image in zip(missing, images, strict=True):
                    with replacing(paths[number]) as partial:
                        image.save(partial, format="PNG")
        return load_made_images(paths)

    @property
    def mode(self) -> Mode:
        """How steps are taken."""
        return "streaming" if self.streaming else "one graph"

    def check(self) -> None:
        """Refuse what cannot work, before anything is made.

        Raises:
            PlanError: the feature cache would be too large.
            SettingError: the bundle cannot train in this mode.
        """
        manifest, settings = self.bundle.manifest, self.settings
        check_mode(manifest, settings, mode=self.mode)
        if self.caches_features:
            draws = max(pool_size(settings, steps) for steps in refresh_periods(settings))  # a pool at a time lies on disk
            draws *= 2 if settings.class_prompt else 1
            check_bound(manifest, draws=draws, limit_mb=settings.cache_limit_mb, bfloat16=settings.cache_dtype == "bfloat16")

    @property
    def caches_features(self) -> bool:
        """Whether skipped spans are replaced by what they contribute."""
        plan = self.bundle.manifest.plan
        return plan.use_residuals and any(span.skipped for span in plan.spans)

    def prepare_samples(
        self, photos: Sequence[Photo], class_images: Sequence[Image.Image], prompts: dict[Kind, Prompt]
    ) -> tuple[list[tuple[Draw, ...]], BatchMaker]:
        """The draws of each step, and what turns them into graph inputs; every crop is encoded."""
        images: dict[Kind, Sequence[Image.Image]] = {"instance": [photo.image for photo in photos], "class": class_images}
        draws, class_draws = (self._draw(images[kind], kind) for kind in ("instance", "class"))
        with self.phase("latents") as sessions:
            posteriors = encode_crops(
                sessions,
                images,
                (*draws, *class_draws),
                on_crop=lambda done, total: self.watch.tell("latents", done, total, "photo"),
            )
        weight = self.settings.prior_loss_weight
        make_batch = BatchMaker(self.bundle.manifest, posteriors, prompts, prior_loss_weight=weight)
        return step_draws(self.settings, draws, class_draws), make_batch

    def _draw(self, images: Sequence[Image.Image], kind: Kind) -> tuple[Draw, ...]:
        """The draws of images, if there are any."""
        timesteps, sizes = self.bundle.manifest.noise_schedule.train_timesteps, [image.size for image in images]
        return draw_samples(self.settings, sizes, kind=kind, timesteps=timesteps) if sizes else ()

    def fill_cache(self, batches: Sequence[Sequence[Draw]], make_batch: BatchMaker, key: str) -> FeatureCache | None:
        """Run the frozen model over the draws of some steps and store what skipped spans contribute.

        Where the pool is refreshed, what earlier steps needed is removed first.
        """
        if not self.caches_features:
            return None
        root, name = self.run / FEATURES, f"edge-{key}"
        if self.settings.refresh_every:
            remove_other_caches(root, keep=name)
        # Each block is used once for many draws, so keeping it open would cost memory and save nothing.
        with self.phase("features", resumable=True, keep=False) as sessions:
            cache = FeatureCache(root / name, bfloat16=self.settings.cache_dtype == "bfloat16")
            precompute(
                Denoiser(sessions),
                batches,
                make_batch,
                cache,
                on_sample=lambda done, total: self.watch.tell("features", done, total, "sample"),
            )
        self.cache_bytes = max(self.cache_bytes, cache.size_bytes)
        return cache

    def train(
        self,
        batches: Sequence[Sequence[Draw]],
        make_batch: BatchMaker,
        cache: FeatureCache | None,
        checkpoints: CheckpointFolder,
        *,
        stop: int,
    ) -> State:
        """Train to a step, and save the result of the last one."""
        began = time.process_time()

        def tell(done: int, total: int, loss: float) -> None:
            nonlocal began
            self.step_cpu_seconds.append(time.process_time() - began)
            self.watch.tell("training", done, total, "step", loss)
            began = time.process_time()

        with self.phase("training", resumable=cache is not None) as sessions:
            stepper = stepper_of(sessions, self.settings, mode=self.mode)
            state = train(
                stepper,
                self.settings,
                batches,
                make_batch,
                cache=cache,
                checkpoints=checkpoints,
                state=checkpoints.restore(start_values(self.bundle)),
                on_step=tell,
                stop=stop,
            )
            if stop == self.settings.steps:
                if np.array_equal(state.parameters, start_values(self.bundle).flat):
                    msg = "training changed nothing. Check the learning rate and the number of steps."
                    raise NoEffectError(msg)
                save_result(self.bundle, state.adapter, self.run)
        return state
