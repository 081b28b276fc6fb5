"""The frozen pass that fills the feature cache: what skipped spans do to each draw, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

import numpy as np

from pocketune.errors import PlanError
from pocketune.sampling.draws import Draw
from pocketune.units import readable_size
from pocketune_edge.batches import BatchMaker
from pocketune_edge.cache import FeatureCache
from pocketune_edge.delta import neutral
from pocketune_edge.denoiser import Denoiser, noisy
from pocketune_edge.manifest import Manifest
from pocketune_edge.session import Array

CHUNK_BYTES = 64 * 2**20
"""Streams that are on their way at once; each block is opened once for so much."""


def feature_bytes(manifest: Manifest, *, bfloat16: bool) -> int:
    """Bytes that the features of one draw take in the cache."""
    graph = manifest.step_graph
    names = [name for span in manifest.plan.spans for name in span.features]
    elements = sum(int(np.prod(graph.shape_of(name)[1:])) for name in names)
    return elements * (2 if bfloat16 else 4)


def check_bound(manifest: Manifest, *, draws: int, limit_mb: int, bfloat16: bool) -> None:
    """Refuse a cache that would be too large, before anything is written.

    Raises:
        PlanError: with the settings that would make it fit.
    """
    needed, limit = draws * feature_bytes(manifest, bfloat16=bfloat16), limit_mb * 1_000_000
    if needed > limit:
        msg = (
            f"the feature cache needs {readable_size(needed)} for {draws} draws, the limit is {readable_size(limit)}. "
            f"Give --cache-limit-mb {needed // 1_000_000 + 1} in a new run, or fewer --steps, "
            "or export with fewer `draws`, or with `refresh_every`, in the recipe."
        )
        raise PlanError(msg)


def precompute(
    denoiser: Denoiser,
    batches: Sequence[Sequence[Draw]],
    make_batch: BatchMaker,
    cache: FeatureCache,
    *,
    on_sample: Callable[[int, int], None],
) -> None:
    """Store the features of every draw that the cache does not hold yet.

    Draws are run in the batches in which they will train, so that a resumed pass gives the same numbers.

    Args:
        denoiser: of the bundle; the LoRA is zero here.
        batches: the draws of each step.
        make_batch: turns draws into graph inputs.
        cache: filled shard by shard; what was there stays.
        on_sample: called with (done, total) steps' draws.
    """
    distinct = list(dict.fromkeys(tuple(draws) for draws in batches))
    wanted = [draws for draws in distinct if not all(draw.cache_number in cache for draw in draws)]
    total = sum(len(draws) for draws in distinct)
    done = total - sum(len(draws) for draws in wanted)
    on_sample(done, total)
    try:
        for chunk in _chunks(denoiser, wanted):
            for draws, features in _features(denoiser, chunk, make_batch):
                for draw, values in zip(draws, features, strict=True):
                    if draw.cache_number not in cache:
                        cache.put(draw.cache_number, values)
                done += len(draws)
            on_sample(done, total)
    finally:
        cache.flush()


def _chunks(denoiser: Denoiser, batches: Sequence[Sequence[Draw]]) -> Iterator[Sequence[Sequence[Draw]]]:
    embed = denoiser.manifest.graph("embed")
    part_bytes = 3 * 4 * sum(spec.elements for spec in embed.outputs)  # entering, leaving, and the features kept
    parts_at_once = max(1, CHUNK_BYTES // part_bytes)
    chunk: list[Sequence[Draw]] = []
    parts = 0
    for draws in batches:
        needed = -(-len(draws) // denoiser.rows)
        if chunk and parts + needed > parts_at_once:
            yield chunk
            chunk, parts = [], 0
        chunk.append(draws)
        parts += needed
    if chunk:
        yield chunk


def _features(
    denoiser: Denoiser, batches: Sequence[Sequence[Draw]], make_batch: BatchMaker
) -> Iterator[tuple[Sequence[Draw], list[dict[str, Array]]]]:
    """Of each batch: its draws, and the features of each draw."""
    inputs = [make_batch(draws) for draws in batches]
    tuned = denoiser.manifest.tuned
    frozen = neutral(tuned)[tuned.place(0)]
    parts = denoiser.begin(({**part, "noisy": noisy(part)} for batch in inputs for part in batch), repeat(frozen))
    found: list[dict[str, Array]] = [{} for _ in parts]
    position = 0
    for span in denoiser.manifest.plan.spans:
        if not span.skipped:
            continue
        denoiser.run_blocks(position, span.start, parts)
        entering = [dict(part.streams) for part in parts]
        denoiser.run_blocks(span.start, span.stop, parts)
        position = span.stop
        for part, before, values in zip(parts, entering, found, strict=True):
            for name in span.features:
                stream = name.removeprefix(f"features_{span.start}_{span.stop}_")
                after = part.streams[stream]
                values[name] = after if span.replaces else _change(after, before[stream])
    index = 0
    for draws, batch in zip(batches, inputs, strict=True):
        rows = [_row(found[index + number], row) for number in range(len(batch)) for row in range(denoiser.rows)]
        index += len(batch)
        yield draws, rows[: len(draws)]


def _change(after: Array, before: Array) -> Array:
    return np.asarray(after, np.float32) - np.asarray(before, np.float32)


def _row(values: dict[str, Array], row: int) -> dict[str, Array]:
    return {name: value[row : row + 1] for name, value in values.items()}
