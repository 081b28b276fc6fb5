"""Who personalizes and who judges in a search for blocks: the user's runs and judge, or those of built-in models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketune.embedders import DEFAULT_MODELS, ClipEmbedder, DinoEmbedder, ImageEmbedder
from pocketune.errors import ModelError, PlanError, RecipeError
from pocketune.models.load import BUILT_IN
from pocketune.pocket.judges import load_subject_embedder
from pocketune.progress import OnProgress, ignore
from pocketune.record import RunRecord
from pocketune.runfolder import RECORD_FILE
from pocketune.selection.search import Embed, Personalized
from pocketune.selection.toys import personalized_toys

EMBEDDERS = ("pocket", "dino", "clip")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a search is given, besides the model.

    Attributes:
        personalized: models of some subjects.
        embed: says where images lie.
        embedder: its name.
        guidance: guidance scale that suits them; None: what suits the architecture.
    """

    personalized: Sequence[Personalized]
    embed: Embed
    embedder: str
    guidance: float | None


def find_sources(
    model: str,
    *,
    work: Path,
    runs: Sequence[Path] = (),
    embedder: str | None = None,
    embedder_model: str | None = None,
    on_progress: OnProgress = ignore,
) -> Sources:
    """What to search the blocks of a model with; toys are trained if need be.

    Args:
        model: built-in name, diffusers folder or hub id.
        work: folder of the runs that are made where none are given.
        runs: RUN folders of this model, one a subject; rendered toys are trained where a built-in model is given none.
        embedder: "pocket", "dino" or "clip"; default: "pocket" for built-in models, else "dino".
        embedder_model: local folder or hub id of DINO or CLIP.
        on_progress: called with every bit of progress.

    Raises:
        RecipeError: there are no runs and the model is no built-in one, or no such embedder.
        ModelError: the embedder cannot be loaded, or the runs are of another model.
        PlanError: the runs were trained with blocks skipped.
    """
    built_in = model in BUILT_IN
    if not runs and not built_in:
        msg = f"no personalized models of {model}: train a few subjects with `pocketune personalize`, and give each as --run."
        raise RecipeError(msg)
    name = embedder or ("pocket" if built_in else "dino")
    embed = _embed(name, embedder_model)
    if runs:
        return Sources(personalized=[_personalized(run, model) for run in runs], embed=embed, embedder=name, guidance=None)
    toys = personalized_toys(model, work, on_progress=on_progress)
    return Sources(personalized=toys, embed=embed, embedder=name, guidance=4.0)


def _embed(name: str, model: str | None) -> Embed:
    if name not in EMBEDDERS:
        msg = f"no embedder {name}: expected one of {', '.join(EMBEDDERS)}."
        raise RecipeError(msg)
    if name == "pocket":
        return load_subject_embedder().embed
    opened: ImageEmbedder = (DinoEmbedder if name == "dino" else ClipEmbedder)(model or DEFAULT_MODELS[name])
    return opened.embed


def _personalized(run: Path, model: str) -> Personalized:
    record = RunRecord.read(run / RECORD_FILE)
    if record.model not in (model, str(Path(model).resolve())):
        msg = f"{run} personalizes {record.model}, not {model}. Give runs of the model that is searched."
        raise ModelError(msg)
    if record.plan.get("skipped") not in (None, "none"):
        msg = (
            f"{run} was trained with the blocks {record.plan['skipped']} skipped, so it cannot say which can be. "
            "Give runs that skip none."
        )
        raise PlanError(msg)
    return Personalized(name=run.name, lora=run, prompts=record.recipe.sample_prompts or (record.recipe.instance_prompt,))
