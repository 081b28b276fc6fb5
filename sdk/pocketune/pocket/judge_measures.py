"""What the judges score on renders and subjects that no training has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pocketune.pocket.draw import render
from pocketune.pocket.judge_data import IGNORED, VIEWS, colour_twin, scene_labels, soften, to_bytes, to_floats
from pocketune.pocket.judges import (
    RESERVED_TOYS,
    AttributeClassifier,
    SubjectEmbedder,
    load_attribute_classifier,
    load_subject_embedder,
)
from pocketune.pocket.scenes import random_scene, toy_identity

Scores = dict[str, dict[str, float]]
"""For "sharp" renders and for "softened" ones, a figure by name."""


def measure_judges(folder: Path) -> dict[str, Scores]:
    """The figures of `judges.json`, from the stored weights: 3000 held-out renders, 200 held-out toys."""
    return {
        "attributes": measure_classifier(load_attribute_classifier(folder), count=3000),
        "subjects": measure_embedder(load_subject_embedder(folder), subjects=200),
    }


@torch.no_grad()
def measure_classifier(classifier: AttributeClassifier, *, count: int) -> Scores:
    """Share of `count` held-out renders that each attribute is read right on; colour over the named classes only."""
    rng = np.random.default_rng([RESERVED_TOYS, 22])
    scenes = [random_scene(rng, pair_probability=0.0) for _ in range(count)]
    labels = {name: torch.tensor(column) for name, column in scene_labels(scenes).items()}
    scores: Scores = {}
    for kind, pixels in _sharp_and_softened([render(scene) for scene in scenes]).items():
        guesses = {name: logits.argmax(dim=1) for name, logits in classifier(pixels).items()}
        right = {name: (guesses[name] == truth)[truth != IGNORED] for name, truth in labels.items()}
        scores[kind] = {name: round(float(values.float().mean()), 4) for name, values in right.items()}
    return scores


@torch.no_grad()
def measure_embedder(embedder: SubjectEmbedder, *, subjects: int) -> Scores:
    """AUC of same against different subject by cosine similarity, for held-out toys: strangers, twins in colour or shape."""
    rng = np.random.default_rng([RESERVED_TOYS, 23])
    toys = [toy_identity(RESERVED_TOYS + 1000 + number) for number in range(subjects)]
    recoloured = [colour_twin(toy, toys[number - 1]) for number, toy in enumerate(toys)]
    images = [render(random_scene(rng, toy=toy)) for toy in (*toys, *recoloured) for _ in range(VIEWS)]
    pairs = torch.triu_indices(VIEWS, VIEWS, offset=1)
    scores: Scores = {}
    for kind, pixels in _sharp_and_softened(images).items():
        originals, twins = embedder(pixels).view(2, subjects, VIEWS, -1)
        cosines = torch.einsum("avd,bwd->abvw", originals, originals)
        same = cosines.diagonal().permute(2, 0, 1)[:, pairs[0], pairs[1]].flatten()
        different = cosines[~torch.eye(subjects, dtype=torch.bool)].flatten()
        shape = torch.einsum("avd,awd->avw", originals, twins).flatten()
        colour = torch.einsum("avd,awd->avw", originals.roll(1, dims=0), twins).flatten()
        rivals = {"auc": different, "auc_same_colours": colour, "auc_same_shape": shape}
        figures = {name: area_under_curve(same, rival) for name, rival in rivals.items()}
        figures |= {"cosine_same": float(same.mean()), "cosine_different": float(different.mean())}
        scores[kind] = {name: round(value, 4) for name, value in figures.items()}
    return scores


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive score exceeds a negative one, ties half (the area under the ROC curve); both of shape (n,)."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive.contiguous(), right=False)
    not_above = torch.searchsorted(ordered, positive.contiguous(), right=True)
    return float((below + not_above).double().mean() / (2 * len(negative)))


def _sharp_and_softened(images: list[Image.Image]) -> dict[str, Tensor]:
    pixels = to_floats(to_bytes(images))
    return {"sharp": pixels, "softened": soften(pixels, torch.Generator().manual_seed(22))}
