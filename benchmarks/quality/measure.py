"""Run the comparison: paint, judge, write a row an image; what has its row already is not done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.quality.embedders import PromptJudge
from benchmarks.quality.methods import Method
from benchmarks.quality.painter import Painter
from benchmarks.quality.subjects import BoothSubject
from benchmarks.rows import Row, append_row, read_rows
from pocketune.embedders import ImageEmbedder

KEY = ("model", "weights", "settings", "embedder", "prompt_judge", "method", "changes", "subject", "prompt", "seed")
"""What tells one row from another."""


def subject_similarity(embedder: ImageEmbedder, photos: Sequence[Image.Image], images: Sequence[Image.Image]) -> list[float]:
    """For each image, the mean cosine to the subject's photos.

    Paper: Ruiz et al. 2023 (DreamBooth), section 4.2: mean pairwise cosine of generated and real images.
    """
    cosines = embedder.embed(images) @ embedder.embed(photos).T
    return [float(value) for value in cosines.mean(dim=1)]


def measure(
    methods: Sequence[Method],
    subjects: Sequence[BoothSubject],
    *,
    seeds: Sequence[int],
    recipe: dict[str, Any],
    painter: Painter,
    embedder: ImageEmbedder,
    prompt_judge: PromptJudge,
    identity: Row,
    out: Path,
    on_row: Callable[[Row], None] = lambda _: None,
) -> None:
    """Write the rows that `out` lacks.

    Args:
        methods: what to compare.
        subjects: of what.
        recipe: what methods change.
        seeds: each trains anew and gives one image a prompt.
        painter: makes the images.
        embedder: judges the subject.
        prompt_judge: judges the prompt.
        identity: "model", "weights" and "settings" of every row.
        out: the file of raw rows.
        on_row: called with every new row.
    """
    base = {**identity, "embedder": embedder.name, "prompt_judge": prompt_judge.name}
    done = {_key(row) for row in read_rows(out)}
    for subject in subjects:
        for method in methods:
            of_method = {**base, "method": method.name, "changes": method.changes_text(recipe), "subject": subject.name}
            for seed in seeds:
                keys: list[Row] = [{**of_method, "seed": seed, "prompt": prompt.text} for prompt in subject.prompts]
                missing = [index for index, key in enumerate(keys) if _key(key) not in done]
                if not missing:
                    continue
                # A prompt's image must not depend on which rows are missing, so all are painted and the missing ones judged.
                images = painter.paint(method, subject, subject.prompts, seed)
                if not images:
                    continue
                with torch.no_grad():
                    similarities = subject_similarity(embedder, subject.photos, images)
                fidelities = prompt_judge.fidelity(images, subject.prompts)
                for index in missing:
                    scores = {
                        "subject_similarity": round(similarities[index], 5),
                        "prompt_fidelity": round(fidelities[index], 5),
                    }
                    row = {**keys[index], **scores}
                    append_row(out, row)
                    on_row(row)


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row.get(name) for name in KEY)
