"""What a personalization measured: the content of `run.json`, and all that the report shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pocketune.errors import FileFormatError, RecipeError
from pocketune.memory import MemoryReading, MemoryRow
from pocketune.recipe import Recipe

SCHEMA_VERSION = 1
_COLUMNS = ("seconds", "phase", "rss_bytes", "anonymous_bytes", "file_bytes")


@dataclass(frozen=True, kw_only=True)
class SamplePair:
    """Two images from equal noise and an equal prompt; paths are relative to the RUN folder.

    Attributes:
        prompt: what both show.
        seed: of the noise.
        before: made by the model as it was.
        after: made by the model with the trained LoRA.
    """

    prompt: str
    seed: int
    before: Path
    after: Path


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What the result does; one that changes no tensor or no image ends in an error, and has no record.

    Attributes:
        image_change: mean absolute difference of the images before and after, 0 to 1.
        norms: by name, how far each trained tensor is from doing nothing: the L2 norm of an up-projection, the distance of
            scales from one and of an embedding from the word's own.
    """

    image_change: float
    norms: dict[str, float]

    @property
    def moved(self) -> int:
        """How many of the tensors do anything."""
        return sum(norm > 0 for norm in self.norms.values())


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One finished personalization.

    Attributes:
        model: name of the base model.
        model_kind: class of its denoiser.
        model_note: what a reader must know about the model, such as that it is an interim checkpoint.
        recipe: what was asked.
        plan: what was decided, JSON-able: blocks, skipped ranges, trained blocks and parameters, cache bytes and so on.
        losses: one for each optimizer step.
        memory: of the process over time.
        peaks: of each phase.
        seconds: spent in each phase.
        photos: file names.
        samples: images before and after.
        check: what the result does.
        versions: of the libraries.
        started: ISO 8601, UTC.
        prediction: of a job with a memory budget: the budget, what the plan changed, and the predicted peak of each phase.
    """

    model: str
    model_kind: str
    model_note: str | None
    recipe: Recipe
    plan: dict[str, Any]
    losses: tuple[float, ...]
    memory: tuple[MemoryRow, ...]
    peaks: dict[str, MemoryReading]
    seconds: dict[str, float]
    photos: tuple[str, ...]
    samples: tuple[SamplePair, ...]
    check: CheckResult
    versions: dict[str, str]
    started: str
    prediction: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the record as JSON-able values; memory is stored by column."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "model_kind": self.model_kind,
            "model_note": self.model_note,
            "started": self.started,
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": self.plan,
            "check": asdict(self.check),
            "seconds": self.seconds,
            "prediction": self.prediction,
            "peaks": {phase: asdict(reading) for phase, reading in self.peaks.items()},
            "photos": list(self.photos),
            "samples": [
                asdict(pair) | {"before": pair.before.as_posix(), "after": pair.after.as_posix()} for pair in self.samples
            ],
            "versions": self.versions,
            "losses": list(self.losses),
            "memory": {column: [getattr(row, column) for row in self.memory] for column in _COLUMNS},
        }

    def to_text(self) -> str:
        """Give the content of `run.json`: one line for each key, so that a person can read it and long lists stay short."""
        lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.to_json().items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Take back what `to_json` gave.

        Raises:
            FileFormatError: it is of another schema version, or incomplete.
        """
        if values.get("schema_version") != SCHEMA_VERSION:
            msg = (
                f"cannot read this run record: expected schema_version {SCHEMA_VERSION}, got {values.get('schema_version')!r}. "
                "Use the version of pocketune that wrote it."
            )
            raise FileFormatError(msg)
        try:
            columns = [values["memory"][column] for column in _COLUMNS]
            return cls(
                model=values["model"],
                model_kind=values["model_kind"],
                model_note=values["model_note"],
                recipe=Recipe.create(**Recipe.relevant(values["recipe"])),
                plan=dict(values["plan"]),
                losses=tuple(values["losses"]),
                memory=tuple(MemoryRow(*row) for row in zip(*columns, strict=True)),
                peaks={phase: MemoryReading(**reading) for phase, reading in values["peaks"].items()},
                seconds=dict(values["seconds"]),
                photos=tuple(values["photos"]),
                samples=tuple(
                    SamplePair(**(pair | {"before": Path(pair["before"]), "after": Path(pair["after"])}))
                    for pair in values["samples"]
                ),
                # Records of earlier versions say more of the check, all of which held.
                check=CheckResult(image_change=values["check"]["image_change"], norms=dict(values["check"]["norms"])),
                versions=dict(values["versions"]),
                started=values["started"],
                prediction=values.get("prediction"),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
            msg = f"cannot read this run record: {type(error).__name__} {error}. The file was changed or cut; copy it again."
            raise FileFormatError(msg) from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read `run.json`.

        Raises:
            FileFormatError: the file is missing, is no JSON object, or no run record.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            msg = f"cannot read the run record {path}: {error}. Give the run.json of a RUN folder."
            raise FileFormatError(msg) from error
        if not isinstance(values, dict):
            msg = f"cannot read the run record {path}: expected a JSON object, got a {type(values).__name__}."
            raise FileFormatError(msg)
        return cls.from_json(values)
