"""`pocketune sample`: images with a trained result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pocketune.atomic import check_writable, replacing
from pocketune.commands.failures import clear_errors, needing_extra
from pocketune.commands.options import DEFAULT_MODEL, MAX_SEED, JsonOption, ModelOption, QuietOption
from pocketune.display import ProgressDisplay
from pocketune.errors import reading
from pocketune.photos import numbered_images
from pocketune.progress import Progress
from pocketune.record import RunRecord
from pocketune.runfolder import RECORD_FILE

if TYPE_CHECKING:
    from PIL import Image

_IMAGE_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def sample(
    source: Annotated[Path, typer.Argument(help="A RUN folder, or a file of LoRA, scales or a word.", show_default=False)],
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="What to show; may be given several times.", show_default=False)
    ],
    model: ModelOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.", min=0, max=MAX_SEED)] = 0,
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
    """Make images with what a RUN trained, or with a LoRA file."""
    with clear_errors():
        paths = numbered_images(out, len(prompt), suffixes=_IMAGE_FORMATS)
        for path in paths:
            check_writable(path)
        with reading(source):
            record = RunRecord.read(source / RECORD_FILE) if (source / RECORD_FILE).is_file() else None
        given = {"steps": steps, "guidance": guidance, "resolution": resolution}
        settings = _sampling_settings(record) | {name: value for name, value in given.items() if value is not None}
        generate = import_generate()
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


def import_generate() -> Callable[..., list[Image.Image]]:
    """What samples, with all that it needs."""
    with needing_extra("train"):
        from pocketune.sample import generate
    return generate


def _sampling_settings(record: RunRecord | None) -> dict[str, Any]:
    """Those that a run made its own pictures with; empty where there is no run."""
    if record is None:
        return {}
    recipe = record.recipe
    return {"steps": recipe.sample_steps, "guidance": recipe.guidance_scale, "resolution": recipe.resolution}


def _image_event(done: int, total: int) -> Progress:
    from pocketune.memory import read_memory

    return Progress(phase="samples", done=done, total=total, unit="image", rss_bytes=read_memory().rss_bytes)


def _save(image: Image.Image, path: Path) -> None:
    with replacing(path) as partial:
        image.save(partial, format=_IMAGE_FORMATS[path.suffix.lower()])
