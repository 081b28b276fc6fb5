"""Measure which blocks bind subjects to their words, by masking text in them: the model's part of Algorithm 1.

Paper: DiT-BlockSkip (arXiv 2603.20755), Algorithm 1: for each of some personalized models, images with text masked in the first
n blocks, and in the last m blocks, are compared with the image without a mask.
Differs: as many prompts and seeds a model as asked for, where the paper says one image; the embedding is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pocketune.errors import FileFormatError, Interrupted, PlanError
from pocketune.memory import read_memory
from pocketune.models.base import DenoiserAdapter, SkipConnected
from pocketune.models.load import ModelFolder, open_model
from pocketune.models.masking import text_masked
from pocketune.plan.selection import Measured, Selection
from pocketune.progress import OnProgress, Progress, ignore
from pocketune.sample import check_side, check_steps, device_named, run_pipeline, sampling_dtype
from pocketune.selection.report import write_selection_report
from pocketune.tuning import find_result, method_of
from pocketune.weights.files import file_sha256

Embed = Callable[[Sequence[Image.Image]], Tensor]
"""Gives unit vectors, (images, width)."""


@dataclass(frozen=True, kw_only=True)
class Personalized:
    """A LoRA of a subject, and prompts that name it."""

    name: str
    lora: Path
    prompts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Says how far images are apart.

    Attributes:
        name: of the kind of embedding.
        embed: says where images lie; distances are 1 minus cosines.
        digest: of its weights.
        model: folder or hub id; None: it comes with the package.
    """

    name: str
    embed: Embed
    digest: str
    model: str | None = None


def select_blocks(
    model: str | Path,
    personalized: Sequence[Personalized] | Callable[[], Sequence[Personalized]],
    *,
    out: Path,
    judge: Judge,
    seeds: Sequence[int] = (0,),
    steps: int = 28,
    guidance: float | None = None,
    resolution: int | None = None,
    device: str | None = None,
    on_progress: OnProgress = ignore,
) -> Selection:
    """Measure every number of first and last blocks, and write what was found.

    What is measured is kept beside `out` as it comes, and a search that was stopped goes on there when it is called again.

    Args:
        model: built-in name, diffusers folder or hub id.
        personalized: models of some subjects; the more, the less the choice depends on one of them. Or what makes them, which
            is called after all that can be refused without them.
        out: the JSON file to write; a page with table and plot is written beside it.
        judge: says how far images are apart.
        seeds: of the images, each for every prompt.
        steps: of the sampler.
        guidance: guidance scale; default: what suits the architecture.
        resolution: image side in pixels; default: the model's.
        device: torch device; default: CUDA where there is one.
        on_progress: called with every bit of progress.

    Raises:
        PlanError: the model is a U-Net, whose first and last blocks cannot be skipped, or cannot work at the resolution or
            with so many steps; or two of the personalized models are one.
        FileFormatError: the beginning of another search lies beside `out`, or a LoRA does not fit the model.
        Interrupted: on Ctrl-C; what is measured is kept.
    """
    folder, torch_device = open_model(model), device_named(device)
    refuse_unets(folder)
    side = folder.native_resolution if resolution is None else resolution
    check_side(folder, side)
    check_steps(folder, steps)
    settings: dict[str, Any] = {
        "model": folder.name,
        "fingerprint": folder.fingerprint(),
        "blocks": folder.block_count,
        "embedder": judge.name,
        "embedder_digest": judge.digest,
        "steps": steps,
        "guidance": folder.family.guidance if guidance is None else guidance,
        "resolution": side,
        "seeds": tuple(seeds),
    }
    partial = out.with_name(f"{out.name}.partial")
    begun = Selection.read(partial) if partial.exists() else None
    if begun is not None:
        _refuse_another(partial, begun.differences(settings))
    if callable(personalized):
        personalized = personalized()
    models = tuple(
        Measured(name=one.name, lora=file_sha256(find_result(one.lora)), prompts=one.prompts) for one in personalized
    )
    _refuse_twins(models)
    selection = Selection(**settings, embedder_model=judge.model, models=models)
    if begun is not None:
        _refuse_another(partial, () if begun.same_search(selection) else ("personalized models",))
    search = _Search(folder, begun or selection, partial, judge.embed, torch_device, on_progress)
    try:
        for number, one in enumerate(personalized):
            search.measure(number, find_result(one.lora))
        search.selection.write(out)
        write_selection_report(search.selection, out.with_suffix(".html"))
    except KeyboardInterrupt as error:
        msg = "stopped; what is measured is kept. Give the same command to go on."
        raise Interrupted(msg) from error
    partial.unlink(missing_ok=True)
    return search.selection


def refuse_unets(folder: ModelFolder) -> None:
    """Refuse a model in which there is nothing to search for.

    Raises:
        PlanError: it is a U-Net.
    """
    if issubclass(folder.family.adapter, SkipConnected):
        msg = f"{folder.name} is a U-Net: it skips its middle, and there is no split of first and last blocks to search for."
        raise PlanError(msg)


def _refuse_another(partial: Path, differences: Sequence[str]) -> None:
    if differences:
        msg = (
            f"{partial} is the beginning of another search, which differs in {', '.join(differences)}. Delete it, or choose "
            "another --out."
        )
        raise FileFormatError(msg)


def _refuse_twins(models: Sequence[Measured]) -> None:
    names: dict[str, str] = {}
    for one in models:
        if one.lora in names:
            msg = f"{names[one.lora]} and {one.name} are one LoRA, whose subject would count twice. Give each subject once."
            raise PlanError(msg)
        names[one.lora] = one.name


@dataclass
class _Search:
    """A search under way."""

    folder: ModelFolder
    selection: Selection
    partial: Path
    embed: Embed
    device: torch.device
    on_progress: OnProgress

    def measure(self, number: int, lora: Path) -> None:
        """Measure what is missing of one personalized model."""
        blocks, measured = self.selection.blocks, self.selection.models[number]
        if len(measured.first) == len(measured.last) == blocks:
            return
        dtype = sampling_dtype(self.folder.family, self.device, result=lora)
        pipeline = self.folder.pipeline(dtype=dtype, device=self.device)
        method_of(lora).apply(pipeline, lora, self.folder)
        adapter: DenoiserAdapter = self.folder.family.adapter(getattr(pipeline, self.folder.family.component))
        whole = self._embedded(pipeline, adapter, measured, ())
        for count in range(len(measured.first), blocks):
            self._keep(number, "first", mean_distance(whole, self._embedded(pipeline, adapter, measured, range(count))))
        for count in range(len(measured.last), blocks):
            masked = range(blocks - count, blocks)
            self._keep(number, "last", mean_distance(whole, self._embedded(pipeline, adapter, measured, masked)))

    def _embedded(self, pipeline: Any, adapter: DenoiserAdapter, measured: Measured, masked: Iterable[int]) -> Tensor:
        prompts = [prompt for prompt in measured.prompts for _ in self.selection.seeds]
        with text_masked(adapter, masked):
            images = run_pipeline(
                pipeline,
                self.folder,
                prompts,
                seeds=list(self.selection.seeds) * len(measured.prompts),
                steps=self.selection.steps,
                guidance=self.selection.guidance,
                resolution=self.selection.resolution,
            )
        return self.embed(images)

    def _keep(self, number: int, side: str, distance: float) -> None:
        models = list(self.selection.models)
        models[number] = models[number].model_copy(update={side: (*getattr(models[number], side), round(distance, 6))})
        self.selection = self.selection.model_copy(update={"models": tuple(models)})
        self.selection.write(self.partial)
        done = sum(len(m.first) + len(m.last) - 2 for m in models)
        total = 2 * (self.selection.blocks - 1) * len(models)
        rss = read_memory().rss_bytes
        self.on_progress(Progress(phase="masking", done=done, total=total, unit="mask", rss_bytes=rss))


def mean_distance(first: Tensor, second: Tensor) -> float:
    """D: 1 minus the cosine of two images, averaged over pairs. Both: unit vectors (images, width)."""
    return float((1 - (first * second).sum(dim=1)).mean())
