"""PocketBooth, the quality benchmark: `python -m benchmarks.quality [--methods none,lora,skip50] [--table]`.

Trains every method on every subject, samples every prompt, and judges subject and prompt; a raw row an image, written at once,
so that a run that was stopped goes on where it was. `--table` then makes the Markdown tables from the rows: an overview, and
one of each group of methods. With `--data` it runs on the DreamBooth data set and judges with DINO and CLIP. `--costs`
measures memory and time of the methods instead, each in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.models import checkpoint_id, quiet_loading
from benchmarks.quality.costs import measure_costs
from benchmarks.quality.embedders import open_embedder, open_prompt_judge
from benchmarks.quality.measure import measure
from benchmarks.quality.methods import (
    DEFAULT_METHODS,
    GROUPS,
    METHODS,
    POCKET_RECIPE,
    POCKET_RECIPES,
    fields_text,
)
from benchmarks.quality.painter import PocketunePainter, save_photos, subject_recipe
from benchmarks.quality.subjects import POCKET_SUBJECTS, BoothSubject, dreambooth_subjects, pocket_subjects
from benchmarks.quality.table import tables
from benchmarks.rows import Row, add_output_options, read_rows
from pocketune.atomic import write_text
from pocketune.embedders import DEFAULT_MODELS
from pocketune.errors import PocketuneError, RecipeError
from pocketune.recipe import Recipe


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, measure what is missing, and write the table when asked to."""
    options = _parser().parse_args(arguments)
    try:
        if not options.table_only:
            (_measure_costs if options.costs else _measure)(options)
        if options.table or options.table_only:
            for group, table in tables(read_rows(options.out), read_rows(options.costs_out)).items():
                path = options.table_file.with_stem("-".join([options.table_file.stem, *filter(None, [group])]))
                write_text(path, table)
                print(f"wrote {path}")
    except PocketuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace) -> None:
    from pocketune.models.load import open_model

    quiet_loading()
    recipe = _recipe(options)
    folder = open_model(options.model)
    identity = {"model": folder.name, "weights": checkpoint_id(folder.path), "settings": settings_text(recipe)}
    embedder = open_embedder(options.embedder or ("dino" if options.data else "pocket"), options.embedder_model)
    judge = open_prompt_judge(options.prompt_judge or ("clip" if options.data else "pocket"), options.prompt_judge_model)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    measure(
        [METHODS[name] for name in options.methods],
        _subjects(options),
        seeds=options.seeds,
        recipe=recipe,
        painter=PocketunePainter(options.model, recipe, options.work / digest),
        embedder=embedder,
        prompt_judge=judge,
        identity=identity,
        out=options.out,
        on_row=_print_row,
    )


def _measure_costs(options: argparse.Namespace) -> None:
    from pocketune.models.load import open_model

    recipe, folder, subject = _recipe(options), open_model(options.model), _subjects(options)[0]
    measure_costs(
        [METHODS[name] for name in options.methods],
        save_photos(subject, options.work / "photos" / subject.name),
        model=options.model,
        recipe=subject_recipe(subject, recipe),
        repeats=options.repeats,
        identity={"model": folder.name, "weights": checkpoint_id(folder.path), "settings": settings_text(recipe)},
        out=options.costs_out,
        on_row=_print_cost,
    )


def settings_text(recipe: dict[str, Any]) -> str:
    """What the recipe changes from its defaults for LoRA, on one line; equal recipes give equal text.

    Raises:
        RecipeError: a value is not valid.
    """
    plain = Recipe.relevant(recipe)
    Recipe.create(instance_prompt="a photo", **plain)
    return fields_text(plain) or "default recipe"


def _recipe(options: argparse.Namespace) -> dict[str, Any]:
    recipe = dict(POCKET_RECIPES.get(options.model, POCKET_RECIPE)) if options.data is None else {}
    if options.recipe is not None:
        try:
            recipe = tomllib.loads(options.recipe.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            msg = f"cannot read the recipe {options.recipe}: {error}."
            raise RecipeError(msg) from error
        own = {name for method in METHODS.values() for name in method.changes}
        if taken := sorted((own | {"instance_prompt", "sample_prompts", "seed"}) & recipe.keys()):
            msg = (
                f"subjects, seeds and methods set {', '.join(taken)}, and {options.recipe} does too. Take it out of that file."
            )
            raise RecipeError(msg)
    given = {
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "rank": options.rank,
        "guidance_scale": options.guidance,
    }
    recipe |= {name: value for name, value in given.items() if value is not None}
    return recipe


def _subjects(options: argparse.Namespace) -> list[BoothSubject]:
    if options.data is None:
        return pocket_subjects(options.subjects or POCKET_SUBJECTS)
    return dreambooth_subjects(options.data)[: options.subjects]


def _print_row(row: Row) -> None:
    scores = f"subject {row['subject_similarity']:.3f}  prompt {row['prompt_fidelity']:.2f}"
    print(f"{row['method']:20} {row['subject']:8} seed {row['seed']}  {scores}  {row['prompt']}", flush=True)


def _print_cost(row: Row) -> None:
    memory, seconds = row["training_rss_bytes"] / 1e6, row["training_s"]
    print(
        f"{row['method']:20} repeat {row['repeat']}  {memory:6.0f} MB  {seconds:7.1f} s  skipped {row['skipped']}", flush=True
    )


def _method_names(text: str) -> list[str]:
    names = list(dict.fromkeys(name for part in text.split(",") for name in GROUPS.get(part, (part,))))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        msg = f"unknown method {unknown[0]}; choose from {', '.join((*GROUPS, *METHODS))}"
        raise argparse.ArgumentTypeError(msg)
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pocket-sd3", help="built-in name, diffusers folder or hub id (%(default)s)")
    parser.add_argument(
        "--methods",
        type=_method_names,
        default=list(DEFAULT_METHODS),
        help=f"of {', '.join(METHODS)}, or a paper's: {', '.join(GROUPS)}; default: {', '.join(DEFAULT_METHODS)}",
    )
    parser.add_argument("--subjects", type=int, help="only the first N subjects")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0], help="as 0,1,2")
    add_output_options(parser, "quality")
    parser.add_argument("--costs", action="store_true", help="measure memory and time of one training a method instead")
    parser.add_argument("--repeats", type=int, default=3, help="trainings a method, with --costs (%(default)s)")
    parser.add_argument(
        "--costs-out", type=Path, default=Path("benchmarks/results/quality-costs.jsonl"), help="raw rows (%(default)s)"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="training runs (%(default)s)")
    parser.add_argument("--recipe", type=Path, help="TOML base recipe in place of PocketBooth's own")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--guidance", type=float, help="guidance scale when sampling")
    parser.add_argument(
        "--data", type=Path, help="the `dataset` folder of the DreamBooth repository, in place of rendered subjects"
    )
    parser.add_argument("--embedder", choices=("pocket", "dino", "clip"), help="default: pocket, or dino with --data")
    parser.add_argument("--embedder-model", help=f"local folder or hub id; default: {DEFAULT_MODELS}")
    parser.add_argument("--prompt-judge", choices=("pocket", "clip"), help="default: pocket, or clip with --data")
    parser.add_argument("--prompt-judge-model", help="local folder or hub id")
    parser.add_argument("--table", action="store_true", help="make the table afterwards")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
