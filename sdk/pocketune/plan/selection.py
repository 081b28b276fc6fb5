"""Which blocks to skip, looked up in what masking measured: Algorithm 1 of DiT-BlockSkip. Nothing here runs a model.

Paper: DiT-BlockSkip (arXiv 2603.20755), equation 2: (n*, m*) = argmin over n + m = k of the sum, over personalized models, of
D(x_g, x_n) + D(x_g, x_m), where x_n is the image with text masked in the first n blocks, x_m in the last m, and D is 1 minus
the cosine of their embeddings.
Differs: D is averaged over a model's prompts and seeds, and over models, which leaves the argmin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pocketune.atomic import write_text
from pocketune.errors import FileFormatError
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan, skip_ends

SELECTION_FILE = "selection.json"
"""Beside a model's `model_index.json`, it is what `skip = "auto"` looks up."""
_WORDS = {"fingerprint": "weights of the model", "embedder_digest": "weights of the embedder"}


@dataclass(frozen=True)
class Split:
    """Skipping the first `first` and the last `last` blocks; `score` is the sum of both distances, smaller is better."""

    first: int
    last: int
    score: float

    def plan(self, block_count: int) -> BlockPlan:
        """As a plan for a model."""
        return BlockPlan(block_count, skip_ends(block_count, self.first, self.last))


class Measured(BaseModel):
    """One personalized model.

    Attributes:
        name: of the subject.
        lora: sha256 of its LoRA file.
        prompts: what its images show.
        first: D with text masked in the first 0, 1, 2 and so on blocks; the first value is 0.
        last: the same for the last blocks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    lora: str
    prompts: tuple[str, ...] = Field(min_length=1)
    first: tuple[float, ...] = (0.0,)
    last: tuple[float, ...] = (0.0,)


class Selection(BaseModel):
    """What was measured, and how; `split` finds the best of each number of blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    model: str
    fingerprint: str = Field(description="Of the model's weights; splits of another model are not used.")
    blocks: int = Field(ge=2)
    embedder: str = Field(description="Who judged how far images are apart.")
    embedder_model: str | None = Field(default=None, description="The judge's folder or hub id, where it is a model of others.")
    embedder_digest: str | None = Field(default=None, description="Of the judge's weights; earlier versions did not write it.")
    steps: int = Field(ge=1)
    guidance: float = Field(ge=0)
    resolution: int = Field(ge=1)
    seeds: tuple[int, ...] = Field(min_length=1, description="Of the images, each for every prompt.")
    models: tuple[Measured, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        for measured in self.models:
            if max(len(measured.first), len(measured.last)) > self.blocks:
                msg = f"{measured.name} has more distances than the model has blocks, {self.blocks}"
                raise ValueError(msg)
        return self

    @property
    def complete(self) -> bool:
        """Whether everything is measured; before, it is the state of a search under way."""
        return all(len(side) == self.blocks for measured in self.models for side in (measured.first, measured.last))

    def mean_distances(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """D averaged over models, by the number of first and of last blocks masked."""
        count = len(self.models)
        first = tuple(math.fsum(values) / count for values in zip(*(m.first for m in self.models), strict=True))
        last = tuple(math.fsum(values) / count for values in zip(*(m.last for m in self.models), strict=True))
        return first, last

    def split(self, skipped: int) -> Split:
        """The best split of a number of skipped blocks."""
        return best_split(*self.mean_distances(), skipped)

    def splits(self) -> tuple[Split, ...]:
        """The best split of every number of skipped blocks, from 1 to all but one."""
        return tuple(self.split(skipped) for skipped in range(1, self.blocks))

    def same_search(self, other: Selection) -> bool:
        """Whether both measure the same thing, however far they got."""
        return self._asked() == other._asked()

    def differences(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """In which of some settings, by the names of fields, this is another search; for a person to read."""
        return tuple(_WORDS.get(name, name) for name, value in settings.items() if getattr(self, name) != value)

    def _asked(self) -> Selection:
        models = tuple(m.model_copy(update={"first": (0.0,), "last": (0.0,)}) for m in self.models)
        # Equal weights are the same judge, wherever they lie.
        return self.model_copy(update={"models": models, "embedder_model": None})

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Selection:
        """Read the file.

        Raises:
            FileFormatError: it is missing, damaged, or of another kind.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            first = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else error.strerror
            msg = f"cannot read the selection of blocks {path}: {first}. `pocketune select-blocks` writes such files."
            raise FileFormatError(msg) from error


def best_split(first: tuple[float, ...], last: tuple[float, ...], skipped: int) -> Split:
    """Algorithm 1's search: all splits of `skipped` blocks are tried.

    Of equal ones that with more first blocks wins, whose cached features are exact.

    Args:
        first: distance by the number of first blocks masked, from 0 on.
        last: the same for the last blocks.
        skipped: how many blocks to skip, below the number of blocks.
    """
    numbers = range(max(0, skipped - len(last) + 1), min(skipped, len(first) - 1) + 1)
    splits = [Split(number, skipped - number, first[number] + last[skipped - number]) for number in numbers]
    return min(splits, key=lambda split: (split.score, -split.first))


def selection_of(folder: ModelFolder) -> Selection | None:
    """The search whose result lies in a model's folder, if it is complete and of these very weights.

    Raises:
        FileFormatError: the file is damaged.
    """
    path = folder.path / SELECTION_FILE
    if not path.exists():
        return None
    found = Selection.read(path)
    fits = found.complete and found.blocks == folder.block_count and found.fingerprint == folder.fingerprint()
    return found if fits else None
