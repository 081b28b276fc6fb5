"""Who personalizes and who judges in a search for blocks: the user's runs and judge, or those of built-in models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pocketune.embedders import DEFAULT_MODELS, ClipEmbedder, DinoEmbedder, ImageEmbedder
from pocketune.errors import ModelError, RecipeError
from pocketune.models.load import BUILT_IN
from pocketune.plan.select import Selection
from pocketune.pocket.judges import load_subject_embedder
from pocketune.pocket.personalized import personalized_toys
from pocketune.progress import OnProgress, ignore
from pocketune.record import RunRecord
from pocketune.runfolder import RECORD_FILE
from pocketune.selection import Embed, Personalized, select_blocks

EMBEDDERS = ("pocket", "dino", "clip")


def choose_blocks(
    model: str,
    *,
    out: Path,
    work: Path,
    runs: Sequence[Path] = (),
    embedder: str | None = None,
    embedder_model: str | None = None,
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    on_progress: OnProgress = ignore,
) -> Selection:
    """Search for the blocks of a model that can be skipped, as `pocketune select-blocks` does.

    Args:
        model: built-in name, diffusers folder or hub id.
        out: the JSON file to write.
        work: folder of the runs that are made where none are given.
        runs: RUN folders of this model, one a subject; rendered toys are trained where a built-in model is given none.
        embedder: "pocket", "dino" or "clip"; default: "pocket" for built-in models, else "dino".
        embedder_model: local folder or hub id of DINO or CLIP.
        seeds: of the images, each for every prompt.
        steps: of the sampler.
        on_progress: called with every bit of progress.

    Raises:
        RecipeError: there are no runs and the model is no built-in one, or no such embedder.
        ModelError: the embedder cannot be loaded, or the runs are of another model.
    """
    built_in = model in BUILT_IN
    if not runs and not built_in:
        msg = f"no personalized models of {model}: train a few subjects with `pocketune personalize`, and give each as --run."
        raise RecipeError(msg)
    name = embedder or ("pocket" if built_in else "dino")
    embed = _embed(name, embedder_model)
    if runs:
        personalized, guidance = [_personalized(run, model) for run in runs], None
    else:
        personalized, guidance = personalized_toys(model, work, on_progress=on_progress), 4.0
    return select_blocks(
        model,
        personalized,
        out=out,
        embed=embed,
        embedder=name,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        on_progress=on_progress,
    )


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
    return Personalized(name=run.name, lora=run, prompts=record.recipe.sample_prompts or (record.recipe.instance_prompt,))
