"""The command line: personalize, sample, select-blocks, inspect, doctor.

torch is imported by the commands that train or sample, not here, so that the others answer at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pocketune.display import ProgressDisplay, print_facts, print_lines, printable
from pocketune.errors import Interrupted, PocketuneError, RecipeError, RunError
from pocketune.lean import without_scipy
from pocketune.progress import Progress
from pocketune.recipe import Recipe
from pocketune.record import RunRecord
from pocketune.report import RECORD_FILE, REPORT_FILE, duration, megabytes

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_MODEL = "pocket-sd3"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_IMAGE_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

ModelOption = Annotated[str | None, typer.Option("--model", help="Built-in name, local diffusers folder, or hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors (and what --json asks for).")]


def main() -> None:
    """Run the console script `pocketune`."""
    # transformers warns about optional packages while it is imported, before anything else could ask it not to.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pocketune {version('pocketune')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Personalize a text-to-image diffusion model on the device that holds the photos."""


@app.command()
def personalize(
    photos: Annotated[list[Path], typer.Argument(help="Photos (JPEG, PNG, WebP), or folders of them.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The RUN folder to make.", show_default=False)],
    instance_prompt: Annotated[
        str | None, typer.Option(help='What the photos show, with a rare word: "a photo of sks toy".')
    ] = None,
    model: Annotated[str, typer.Option(help="Built-in name, local diffusers folder, or hub id.")] = DEFAULT_MODEL,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of settings; options given here win over it.")] = None,
    skip: Annotated[
        str | None, typer.Option(help="Blocks not to train: none, auto, auto:0.3, hollow:0.3 or ranges such as 0-3.")
    ] = None,
    patches: Annotated[str | None, typer.Option(help="Train on patches whose size follows the noise: none or dynamic.")] = None,
    method: Annotated[str | None, typer.Option(help="What is tuned: lora, scales (of packed weights), or token.")] = None,
    gradient: Annotated[str | None, typer.Option(help="How it is had: backprop, zeroth_order, or mixed.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the training images in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal results.")] = None,
    class_prompt: Annotated[str | None, typer.Option(help='Turns prior preservation on: "a photo of a toy".')] = None,
    batch_size: Annotated[int | None, typer.Option(help="Photos in each step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    weights: Annotated[str | None, typer.Option(help="Frozen weights in memory or read from disk: resident, streamed.")] = None,
    weight_bits: Annotated[int | None, typer.Option(help="Pack the denoiser's weights to 8 or 4 bits.")] = None,
    activations: Annotated[str | None, typer.Option(help="What backward needs of a block: kept, recomputed, on_disk.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a LoRA of the subject in some photos, and write it to a RUN folder with pictures and a report."""
    asked = {
        "instance_prompt": instance_prompt,
        "skip": skip,
        "patches": patches,
        "method": method,
        "gradient": gradient,
        "resolution": resolution,
        "steps": steps,
        "rank": rank,
        "seed": seed,
        "class_prompt": class_prompt,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weights": weights,
        "weight_bits": weight_bits,
        "activations": activations,
    }
    with clear_errors(run=out):
        settings = _recipe(recipe, asked)
        run_job = _import_personalize(settings)
        with ProgressDisplay(Console(stderr=True), quiet=quiet) as display:
            record = run_job(photos, recipe=settings, out=out, model=model, resume=resume, on_progress=display)
    if as_json:
        typer.echo(json.dumps(_summary(record, out)))
    elif not quiet:
        _print_result(record, out)


@app.command()
def sample(
    source: Annotated[Path, typer.Argument(help="A RUN folder, or a LoRA file.", show_default=False)],
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="What to show; may be given several times.", show_default=False)
    ],
    model: ModelOption = None,
    seed: Annotated[int, typer.Option(help="Of the first image; the next ones count up.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler; default: those of the RUN, else 28.", min=1)] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; default: of the RUN, else of the model.", min=0.0)
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Image side in pixels; default: that of the RUN or model.", min=16)
    ] = None,
    streamed: Annotated[
        bool, typer.Option("--streamed", help="Leave weights on disk: little memory, one image at a time.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The image file; several images get numbers.")] = Path("sample.png"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make images with a trained LoRA."""
    with clear_errors():
        paths = _image_paths(out, len(prompt))
        record = RunRecord.read(source / RECORD_FILE) if (source / RECORD_FILE).is_file() else None
        given = {"steps": steps, "guidance": guidance, "resolution": resolution}
        settings = _sampling_settings(record) | {name: value for name, value in given.items() if value is not None}
        generate = _import_generate()
        with ProgressDisplay(Console(stderr=True), quiet=quiet) as display:
            images = generate(
                model or (record.model if record else DEFAULT_MODEL),
                prompt,
                lora=source,
                seeds=[seed + number for number in range(len(prompt))],
                streamed=streamed,
                on_image=lambda done, total: display(_image_event(done, total)),
                **settings,
            )
        for image, path in zip(images, paths, strict=True):
            _save(image, path)
    if as_json:
        typer.echo(json.dumps({"images": [str(path) for path in paths], "prompts": prompt, "seed": seed}))
    elif not quiet:
        for path in paths:
            typer.echo(str(path))


@app.command()
def select_blocks(
    out: Annotated[
        Path, typer.Option("--out", help="The JSON file to write; a page with the same name too.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Built-in name, local diffusers folder, or hub id.")] = DEFAULT_MODEL,
    run: Annotated[
        list[Path] | None,
        typer.Option("--run", help="A RUN of this model; several. Default for built-in models: rendered toys are trained."),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(help="Who compares images: pocket, dino or clip; default: pocket for built-in models, else dino."),
    ] = None,
    embedder_model: Annotated[str | None, typer.Option(help="Local folder or hub id of DINO or CLIP.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Of the images, each for every prompt; default: 0.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.", min=1)] = 20,
    work: Annotated[Path | None, typer.Option(help="Folder of the toys' runs; default: beside --out.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find which blocks can be skipped, by hiding text in them. A search that was stopped goes on when repeated."""
    with clear_errors():
        with needing_extra("train"):
            from pocketune.choosing import choose_blocks
        with ProgressDisplay(Console(stderr=True), quiet=quiet) as display:
            selection = choose_blocks(
                model,
                out=out,
                runs=run or [],
                embedder=embedder,
                embedder_model=embedder_model,
                seeds=seed or [0],
                steps=steps,
                work=work or out.with_name(f"{out.stem}-runs"),
                on_progress=display,
            )
    if as_json:
        typer.echo(selection.model_dump_json())
    elif not quiet:
        print_facts(Console(), {"selection": str(out), "report": str(out.with_suffix(".html"))})
        for split in selection.splits():
            typer.echo(
                f"{split.first + split.last:3} skipped: first {split.first}, last {split.last} (distance {split.score:.4f})"
            )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A LoRA file, RUN folder, model folder or bundle.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Say what a file or folder is, without running or loading anything in it."""
    from pocketune.inspection import inspect as look

    with clear_errors():
        found = look(path)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    console = Console()
    console.print(Text(f"{found.kind}  {printable(found.path)}  {megabytes(found.size_bytes)}", style="bold"))
    print_facts(console, found.facts)
    print_lines(console, found.notes)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can do."""
    from pocketune.doctor import examine

    with clear_errors():
        report = examine()
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
        return
    console = Console()
    facts = report.as_dict()
    print_facts(console, {name: value for name, value in facts.items() if name not in {"advice", "problems"}})
    console.print()
    print_lines(console, report.advice)


@contextmanager
def clear_errors(*, run: Path | None = None) -> Iterator[None]:
    """Turn the errors that a person can do something about into one line and an exit code; `run` is what could be resumed."""
    try:
        yield
    except Interrupted as error:
        typer.echo(f"interrupted: {printable(str(error))}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error
    except PocketuneError as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        raise typer.Exit(EXIT_ERROR) from error
    except KeyboardInterrupt as error:
        again = "with --resume to go on" if run is not None and run.exists() else "to start again"
        typer.echo(f"interrupted: give the same command {again}.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error


def _import_personalize(recipe: Recipe) -> Callable[..., RunRecord]:
    with needing_extra("train"), without_scipy() if recipe.saves_memory else nullcontext():
        from pocketune.job import personalize as run_job
    return run_job


def _import_generate() -> Callable[..., list[Image.Image]]:
    with needing_extra("train"):
        from pocketune.sample import generate
    return generate


@contextmanager
def needing_extra(extra: str) -> Iterator[None]:
    """Import the libraries of an extra: say so where they are missing, and keep their remarks at import off the screen."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0].startswith("pocketune"):
            raise
        msg = f"this command needs {error.name}, which is not installed. Run: pip install 'pocketune[{extra}]'"
        raise PocketuneError(msg) from error


def _recipe(file: Path | None, asked: dict[str, Any]) -> Recipe:
    if file is not None:
        return Recipe.from_toml(file, **asked)
    if asked["instance_prompt"] is None:
        msg = 'no instance prompt: say what the photos show, as in --instance-prompt "a photo of sks toy", or give a --recipe.'
        raise RecipeError(msg)
    return Recipe.create(**{name: value for name, value in asked.items() if value is not None})


def _summary(record: RunRecord, out: Path) -> dict[str, Any]:
    """What a program wants to know first; `run.json` holds the rest."""
    values = record.to_json()
    return {
        "run": str(out),
        record.recipe.method: str(out / _result(record)),
        "report": str(out / REPORT_FILE),
        "record": str(out / RECORD_FILE),
        "steps": len(record.losses),
        "last_loss": record.losses[-1] if record.losses else None,
        "check": {name: values["check"][name] for name in ("nonzero", "loads", "image_change")},
        **{name: values[name] for name in ("model", "model_note", "plan", "seconds", "peaks", "samples")},
    }


def _print_result(record: RunRecord, out: Path) -> None:
    console = Console()
    peak = max((reading.rss_bytes for reading in record.peaks.values()), default=0)
    print_facts(
        console,
        {
            record.recipe.method: str(out / _result(record)),
            "report": str(out / REPORT_FILE),
            "took": f"{duration(sum(record.seconds.values()))}, at most {megabytes(peak)} of memory",
            "check": f"the result loads in stock diffusers and changes the images by {100 * record.check.image_change:.1f} %",
        },
    )
    if record.model_note:
        print_lines(console, [record.model_note])


def _result(record: RunRecord) -> Path:
    from pocketune.tuning import METHODS

    return METHODS[record.recipe.method].result


def _sampling_settings(record: RunRecord | None) -> dict[str, Any]:
    """Those that a run made its own pictures with; empty where there is no run."""
    if record is None:
        return {}
    recipe = record.recipe
    return {"steps": recipe.sample_steps, "guidance": recipe.guidance_scale, "resolution": recipe.resolution}


def _image_paths(out: Path, count: int) -> list[Path]:
    if out.suffix.lower() not in _IMAGE_FORMATS:
        msg = f"cannot write an image named {out.name}: expected --out to end in {', '.join(_IMAGE_FORMATS)}."
        raise RunError(msg)
    if count == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{number:02d}") for number in range(count)]


def _image_event(done: int, total: int) -> Progress:
    from pocketune.memory import read_memory

    return Progress(phase="samples", done=done, total=total, unit="image", rss_bytes=read_memory().rss_bytes)


def _save(image: Image.Image, path: Path) -> None:
    from pocketune.atomic import replacing

    with replacing(path) as partial:
        image.save(partial, format=_IMAGE_FORMATS[path.suffix.lower()])


if __name__ == "__main__":
    main()
