"""Who personalizes and who judges in a search for blocks: the user's runs and judge, or those of built-in models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pocketune.embedders import DEFAULT_MODELS, ClipEmbedder, DinoEmbedder
from pocketune.errors import ModelError, PlanError, RecipeError
from pocketune.models.load import BUILT_IN, open_model
from pocketune.pocket.judges import WEIGHTS, load_subject_embedder
from pocketune.progress import OnProgress, ignore
from pocketune.record import RunRecord
from pocketune.runfolder import RECORD_FILE
from pocketune.selection.search import Judge, Personalized, refuse_unets
from pocketune.selection.toys import personalized_toys
from pocketune.weights.files import file_sha256

EMBEDDERS = ("pocket", "dino", "clip")
_TOYS_GUIDANCE = 4.0


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a search is given, besides the model.

    Attributes:
        personalized: models of some subjects, or what trains them.
        judge: says how far images are apart.
        guidance: guidance scale that suits them.
    """

    personalized: Sequence[Personalized] | Callable[[], Sequence[Personalized]]
    judge: Judge
    guidance: float


def find_sources(
    model: str,
    *,
    out: Path,
    work: Path | None = None,
    runs: Sequence[Path] = (),
    embedder: str | None = None,
    embedder_model: str | None = None,
    on_progress: OnProgress = ignore,
) -> Sources:
    """What to search the blocks of a model with. The judge is loaded; toys, where they are needed, are not trained yet.

    Args:
        model: built-in name, diffusers folder or hub id.
        out: the file that the search will write.
        work: folder of the runs that are made where none are given; default: beside `out`.
        runs: RUN folders of this model, one a subject; rendered toys are trained where a built-in model is given none.
        embedder: "pocket", "dino" or "clip"; default: "pocket" for built-in models, else "dino".
        embedder_model: local folder or hub id of DINO or CLIP.
        on_progress: called with every bit of progress.

    Raises:
        RecipeError: there are no runs and the model is no built-in one, no such embedder, or an option without effect.
        ModelError: the embedder cannot be loaded, or the runs are of another model.
        PlanError: the model is a U-Net, or the runs were trained with blocks skipped or are sampled at different guidance.
    """
    built_in = model in BUILT_IN
    if not runs and not built_in:
        msg = f"no personalized models of {model}: train a few subjects with `pocketune personalize`, and give each as --run."
        raise RecipeError(msg)
    if runs and work is not None:
        msg = "--work is the folder of toys that are trained where no runs are given. Leave out --work, or --run."
        raise RecipeError(msg)
    name = embedder or ("pocket" if built_in else "dino")
    if name not in EMBEDDERS:
        msg = f"no embedder {name}: expected one of {', '.join(EMBEDDERS)}."
        raise RecipeError(msg)
    if name == "pocket" and embedder_model is not None:
        msg = "the embedder pocket comes with the package and takes no --embedder-model. Leave it out, or add --embedder dino."
        raise RecipeError(msg)
    records = [_record_of(run, model) for run in runs]
    refuse_unets(open_model(model))
    guidance = _guidance(records) if runs else _TOYS_GUIDANCE
    judge = _judge(name, embedder_model)
    if runs:
        personalized = [_personalized(run, record) for run, record in zip(runs, records, strict=True)]
        return Sources(personalized=personalized, judge=judge, guidance=guidance)
    toys = partial(personalized_toys, model, work or out.with_name(f"{out.stem}-runs"), on_progress=on_progress)
    return Sources(personalized=toys, judge=judge, guidance=guidance)


def _judge(name: str, model: str | None) -> Judge:
    if name == "pocket":
        return Judge(name=name, embed=load_subject_embedder().embed, digest=file_sha256(WEIGHTS / "subjects.safetensors"))
    model = model or DEFAULT_MODELS[name]
    opened = DinoEmbedder(model) if name == "dino" else ClipEmbedder(model)
    return Judge(name=name, embed=opened.embed, digest=opened.digest, model=model)


def _record_of(run: Path, model: str) -> RunRecord:
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
    return record


def _personalized(run: Path, record: RunRecord) -> Personalized:
    return Personalized(name=run.name, lora=run, prompts=record.recipe.sample_prompts or (record.recipe.instance_prompt,))


def _guidance(records: Sequence[RunRecord]) -> float:
    scales = sorted({record.recipe.guidance_scale for record in records})
    if len(scales) > 1:
        msg = f"the runs have the guidance scales {', '.join(map(str, scales))}, and a search has one. Give runs that share it."
        raise PlanError(msg)
    return scales[0]
