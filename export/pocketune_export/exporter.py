"""Export a model and a recipe: capture every graph once; write one bundle, or several with differently stored weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pocketune.errors import ModelError, PlanError
from pocketune.memory import read_memory
from pocketune.models import mmdit, unet
from pocketune.models.fingerprint import training_fingerprint
from pocketune.models.load import ModelFolder, open_model
from pocketune.plan.blocks import BlockPlan
from pocketune.plan.skipping import plan_of
from pocketune.progress import OnProgress, Progress, ignore
from pocketune.recipe import Recipe
from pocketune.sample import check_side
from pocketune.sampling.directions import Probing
from pocketune_edge.agreement import Role
from pocketune_export import manifest as m
from pocketune_export.bundle import check_new, new_bundle_folder
from pocketune_export.capture import Capture
from pocketune_export.cutting import cut
from pocketune_export.decisions import check_exportable, noise_schedule, optimizer_of, zero_negative
from pocketune_export.denoiser_graphs import DenoiserGraphs
from pocketune_export.quantize import Storage
from pocketune_export.remainder import Part, TextSizes, encoder_numbers, read_tokenizer, text_encoder, text_join, vae_parts
from pocketune_export.sources import DenoiserWeights
from pocketune_export.step_inputs import Sizes
from pocketune_export.tuned import attach, describe, packing_of
from pocketune_export.writer import BundleWriter, Component, Described, Traced

EXPORTABLE = (mmdit.FAMILY, unet.SD, unet.SDXL)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One bundle of an export.

    Attributes:
        out: the folder to make, or one file if it ends in ".ptb".
        weights: how matrices are stored.
        block: int8 and int4 weights that share a scale; default: a row.
    """

    out: Path
    weights: Storage = "fp32"
    block: int | None = None


def export_trainable(
    *,
    recipe: Recipe,
    out: str | Path,
    model: str | Path = "pocket-sd3",
    backend: Literal["onnx"] = "onnx",
    weights: Storage = "fp32",
    weight_block: int | None = None,
    on_progress: OnProgress = ignore,
) -> m.Manifest:
    """Export a training step, the model around it and its start values.

    Args:
        recipe: batch size, resolution, rank, targets, skipped blocks and loss are fixed in the graphs; the rest are defaults.
        out: the bundle folder to make, or one file if it ends in ".ptb".
        model: built-in name, diffusers folder or hub id.
        backend: "onnx".
        weights: how matrices are stored.
        weight_block: int8 and int4 weights that share a scale; default: a row.
        on_progress: called after each graph.

    Raises:
        ModelError, PlanError, RecipeError, RunError: nothing is left behind.
    """
    if backend != "onnx":
        msg = f'there is no backend "{backend}"; choose onnx.'
        raise PlanError(msg)
    variant = Variant(out=Path(out), weights=weights, block=weight_block)
    return export_variants([variant], recipe=recipe, model=model, on_progress=on_progress)[0]


def export_variants(
    variants: Sequence[Variant], *, recipe: Recipe, model: str | Path = "pocket-sd3", on_progress: OnProgress = ignore
) -> tuple[m.Manifest, ...]:
    """Export several bundles that differ in how weights are stored; each graph is captured once.

    Args:
        variants: the bundles.
        recipe: as of `export_trainable`.
        model: as of `export_trainable`.
        on_progress: called after each graph.

    Raises:
        ModelError, PlanError, RecipeError, RunError: nothing is left behind.
    """
    for variant in variants:
        if variant.block is not None and variant.block < 2:
            msg = f"a block of {variant.block} weights cannot share a scale. Give a block of 2 or more, such as 32."
            raise PlanError(msg)
        if variant.block is not None and variant.weights not in ("int8", "int4"):
            msg = f"{variant.weights} weights have no scales for a block to share. Give --weights int8 or int4, or no block."
            raise PlanError(msg)
        check_new(variant.out)
    check_exportable(recipe)
    folder = open_model(model)
    if folder.family not in EXPORTABLE:
        titles = " and ".join(family.title for family in EXPORTABLE)
        msg = f"{folder.name} is a {folder.family.title}; so far only {titles} can be exported. Train it with `pocketune`."
        raise ModelError(msg)
    recipe = folder.family.complete(recipe)
    with ExitStack() as stack:
        scratch = [stack.enter_context(new_bundle_folder(variant.out)) for variant in variants]
        writers = [BundleWriter(at, weights=of.weights, block=of.block) for at, of in zip(scratch, variants, strict=True)]
        return _Export(folder, recipe, writers, on_progress).run()


class _Export:
    """One export under way."""

    def __init__(self, folder: ModelFolder, recipe: Recipe, writers: Sequence[BundleWriter], on_progress: OnProgress) -> None:
        self._folder = folder
        self._recipe = recipe
        self._writers = writers
        self._on_progress = on_progress
        self._written = 0
        self._plan = plan_of(folder.empty_denoiser(), recipe, folder=folder)
        self._resolution = recipe.resolution or folder.native_resolution
        check_side(folder, self._resolution)
        side = self._resolution // folder.vae_scale
        self._latents = (int(folder.vae_config["latent_channels"]), side, side)
        self._class_images = recipe.batch_size if recipe.class_prompt else 0

    def run(self) -> tuple[m.Manifest, ...]:
        """Capture and write everything; each component is gone from memory when the next is loaded."""
        schedule = noise_schedule(self._folder)
        encoders, text = self._text_encoders()
        vae = self._vae()
        described = self._denoiser(text, schedule, encoders, vae)
        points = len(self._probing().points) if self._recipe.gradient == "zeroth_order" else 1
        return tuple(writer.finish(described, points=points) for writer in self._writers)

    def _probing(self) -> Probing:
        recipe = self._recipe
        return Probing(queries=recipe.zo_queries, epsilon=recipe.zo_epsilon, two_sided=recipe.zo_two_sided)

    def _text_encoders(self) -> tuple[tuple[m.TextEncoder, ...], TextSizes]:
        captures: dict[int, Capture] = {}
        described = []
        count = 0
        for number in encoder_numbers(self._folder):
            tokenizer = read_tokenizer(self._folder, number)
            path = f"tokenizer-{number}/tokenizer.json"
            for writer in self._writers:
                writer.add_file(path, tokenizer.content)
            part = text_encoder(self._folder, number, tokenizer.tokens)
            captures[number] = part.capture
            names = self._add_parts(part, "text_encoder", first=count)
            count += len(names)
            described.append(
                m.TextEncoder(
                    number=number,
                    graphs=names,
                    tokenizer=path,
                    tokens=tokenizer.tokens,
                    pad_id=tokenizer.pad_id,
                    pad_token=tokenizer.pad_token,
                )
            )
        joined, sizes = text_join(captures, self._folder)
        self._add(Traced("text_join", "text_join", None, None, joined), Component("text_join.", _no_weight, "weights/none.bin"))
        return tuple(described), sizes

    def _vae(self) -> m.Vae:
        vae = self._folder.load_vae(device=torch.device("cpu"))
        encoder, decoder = vae_parts(vae, resolution=self._resolution, latents=self._latents)
        return m.Vae(
            encoder=self._add_parts(encoder, "vae_encoder"),
            decoder=self._add_parts(decoder, "vae_decoder"),
            scaling_factor=float(vae.config.scaling_factor),
            shift_factor=float(vae.config.shift_factor or 0.0),
            downscale=self._folder.vae_scale,
        )

    def _denoiser(
        self, text: TextSizes, schedule: m.NoiseSchedule, encoders: tuple[m.TextEncoder, ...], vae: m.Vae
    ) -> Described:
        recipe, plan = self._recipe, self._plan
        adapter = self._folder.empty_denoiser()
        packing = packing_of(adapter.model, recipe)
        weights = DenoiserWeights(self._folder.denoiser_files(), adapter.model)
        trained = attach(adapter, plan, recipe, weights=weights, packing=packing)
        for writer in self._writers:
            writer.add_file(trained.path, trained.content)
        batch = m.Batch(
            rows=recipe.batch_size + self._class_images,
            photos=recipe.batch_size,
            class_images=self._class_images,
            resolution=self._resolution,
            latent_shape=self._latents,
            text_tokens=text.tokens,
            text_width=text.width,
            pooled_width=text.pooled,
        )
        takes_sizes = self._folder.family.takes_sizes
        sizes = Sizes(batch.rows, self._latents, text.tokens, text.width, text.pooled, schedule.objective, takes_sizes)
        graphs = DenoiserGraphs(adapter, trained.parameters, plan, recipe, sizes)
        component = Component(f"{self._folder.family.component}.", weights, "weights/denoiser.bin", packing)
        for traced in graphs.trace():
            for piece in traced.pieces():
                self._add(piece, component)
        return Described(
            model=m.Model(
                name=self._folder.name,
                kind=self._folder.denoiser_kind,
                sha256=training_fingerprint(self._folder),
                note=self._folder.note(),
                block_count=self._folder.block_count,
                streams=graphs.stream_names,
                zero_negative=zero_negative(self._folder),
            ),
            recipe=recipe.model_dump(mode="json"),
            plan=m.Plan(spans=tuple(_describe_spans(plan, graphs)), use_residuals=recipe.use_residuals),
            batch=batch,
            tuned=describe(trained, adapter, graphs.layout, recipe, prefix=component.prefix),
            optimizer=optimizer_of(recipe),
            noise_schedule=schedule,
            text_encoders=encoders,
            vae=vae,
        )

    def _add_parts(self, part: Part, role: Role, *, first: int = 0) -> tuple[str, ...]:
        """Add a component in parts that run one after the other; the names of their graphs."""
        component = Component(f"{part.name}.", part.load, f"weights/{part.name}.bin")
        names = []
        for number, piece in enumerate(cut(part.capture)):
            names.append(f"{part.name}.{number:02d}")
            self._add(Traced(names[-1], role, first + number, None, piece), component)
        return tuple(names)

    def _add(self, traced: Traced, component: Component) -> None:
        for writer in self._writers:
            writer.add_graph(traced, component)
        self._written += 1
        rss = read_memory().rss_bytes
        self._on_progress(Progress(phase="graphs", done=self._written, total=0, unit="graph", rss_bytes=rss))


def _describe_spans(plan: BlockPlan, graphs: DenoiserGraphs) -> Iterator[m.Span]:
    for span in plan.spans:
        features = tuple(feature.name for feature in graphs.features(span))
        replaces = bool(features) and graphs.replaces(span)
        yield m.Span(start=span.start, stop=span.stop, skipped=span.skipped, features=features, replaces=replaces)


def _no_weight(name: str) -> Tensor:
    msg = f"the graph needs the weight {name}, which it should not have."
    raise ModelError(msg)
