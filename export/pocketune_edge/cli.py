"""The command line `pocketune-edge`: personalize, sample, inspect."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pocketune.atomic import replacing
from pocketune.errors import Interrupted, PocketuneError, RunError
from pocketune.memory import read_memory
from pocketune.progress import Progress
from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_edge.delta import load_result, neutral
from pocketune_edge.display import Display, duration, printable, say
from pocketune_edge.errors import SettingError
from pocketune_edge.job import RECORD_FILE, personalize
from pocketune_edge.sample import render
from pocketune_edge.session import Sessions
from pocketune_edge.settings import CHANGEABLE, settings_of

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script; the exit code."""
    given = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = given.command
    try:
        command(given)
    except Interrupted as error:
        say(f"interrupted: {printable(str(error))}", sys.stderr)
        return EXIT_INTERRUPTED
    except PocketuneError as error:
        say(f"error: {printable(str(error))}", sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        resumable = hasattr(given, "resume") and given.out.exists()
        say(f"interrupted: give the same command {'with --resume to go on' if resumable else 'to start again'}.", sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pocketune-edge", description="Personalize and sample from an exported bundle.")
    parser.add_argument("--version", action="version", version=f"pocketune-edge {version('pocketune')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("personalize", help="train a LoRA of the subject in some photos")
    train.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder or archive made by export-trainable")
    train.add_argument("photos", type=Path, nargs="+", metavar="PHOTOS", help="photos (JPEG, PNG, WebP), or folders of them")
    train.add_argument("--out", type=Path, required=True, help="the RUN folder to make")
    train.add_argument("--instance-prompt", help='what the photos show, with a rare word: "a photo of sks toy"')
    train.add_argument("--steps", type=int, help="optimizer steps")
    train.add_argument("--seed", type=int, help="equal seeds give equal results")
    train.add_argument("--learning-rate", type=float, help="of AdamW")
    train.add_argument("--scale-learning-rate", type=float, help="of AdamW for output scales")
    train.add_argument("--zo-learning-rate", type=float, help="of zeroth-order steps")
    train.add_argument("--batch-size", type=int, help="photos in each step")
    train.add_argument("--checkpoint-every", type=int, help="steps between checkpoints")
    train.add_argument("--cache-limit-mb", type=int, help="bound of the feature cache on disk")
    train.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    _add_common(train)
    train.set_defaults(command=_personalize)

    sample = commands.add_parser("sample", help="make images, with a trained LoRA or without")
    sample.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder or archive made by export-trainable")
    sample.add_argument("--prompt", action="append", required=True, help="what to show; may be given several times")
    sample.add_argument("--lora", type=Path, help="a RUN folder or a result file; default: the base model")
    sample.add_argument("--seed", type=int, default=0, help="of the first image; the next ones count up (default 0)")
    sample.add_argument("--steps", type=int, help="steps of the sampler; default: the recipe's")
    sample.add_argument("--guidance", type=float, help="guidance scale; default: the recipe's")
    sample.add_argument("--out", type=Path, default=Path("sample.png"), help="the PNG file; several images get numbers")
    _add_common(sample)
    sample.set_defaults(command=_sample)

    inspect = commands.add_parser("inspect", help="check a bundle and say what is in it")
    inspect.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder or archive made by export-trainable")
    inspect.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    inspect.set_defaults(command=_inspect)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streaming", action="store_true", help="run block by block: one block in memory, more time")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; default: its own choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors (and what --json asks for)")


def _personalize(given: argparse.Namespace) -> None:
    changes = {name: getattr(given, name) for name in CHANGEABLE if hasattr(given, name)}
    with Display(sys.stderr, quiet=given.quiet) as display:
        record = personalize(
            given.bundle,
            given.photos,
            out=given.out,
            changes=changes,
            streaming=given.streaming,
            resume=given.resume,
            threads=_checked_threads(given.threads),
            on_progress=display,
        )
    result = {
        "run": str(given.out),
        record["method"]: str(given.out / record["result"]),
        "record": str(given.out / RECORD_FILE),
        "steps": len(record["losses"]),
        "last_loss": record["losses"][-1],
        **{name: record[name] for name in ("streaming", "seconds", "peaks")},
    }
    if given.json:
        say(json.dumps(result))
    elif not given.quiet:
        peak = max(reading["rss_bytes"] for reading in record["peaks"].values())
        say(f"{record['method']:<8}{result[record['method']]}")
        say(f"record  {result['record']}")
        say(f"took    {duration(sum(record['seconds'].values()))}, at most {peak / 1e6:.0f} MB of memory")


def _sample(given: argparse.Namespace) -> None:
    paths = _image_paths(given.out, len(given.prompt))
    with Display(sys.stderr, quiet=given.quiet) as display:
        bundle = open_bundle(given.bundle)
        asked = {"sample_steps": given.steps, "guidance_scale": given.guidance, "seed": given.seed}
        settings, _ = settings_of(bundle.manifest, asked)
        sessions = Sessions(bundle, keep=not given.streaming, threads=_checked_threads(given.threads))
        images = render(
            sessions,
            given.prompt,
            seeds=[settings.seed + number for number in range(len(given.prompt))],
            steps=settings.sample_steps,
            guidance=settings.guidance_scale,
            parameters=neutral(bundle.manifest.tuned) if given.lora is None else load_result(bundle, given.lora).flat,
            on_step=lambda done, total: display(_event("samples", done, total, "step")),
        )
        for image, path in zip(images, paths, strict=True):
            with replacing(path) as partial:
                image.save(partial, format="PNG")
        sessions.close()
    if given.json:
        say(json.dumps({"images": [str(path) for path in paths], "prompts": given.prompt, "seed": given.seed}))
    elif not given.quiet:
        for path in paths:
            say(str(path))


def _inspect(given: argparse.Namespace) -> None:
    facts = describe(open_bundle(given.bundle))
    if given.json:
        say(json.dumps(facts))
        return
    for name, value in facts.items():
        say(f"{name:<22}{printable(str(value))}")


def describe(bundle: Bundle) -> dict[str, Any]:
    """What a person or program wants to know of a checked bundle; JSON-able."""
    manifest = bundle.manifest
    roles: dict[str, int] = {}
    for graph in manifest.graphs:
        roles[graph.role] = roles.get(graph.role, 0) + 1
    spans = [(span.start, span.stop - 1) for span in manifest.plan.spans if span.skipped]
    skipped = [f"{first}-{last}" if last > first else f"{first}" for first, last in spans]
    return {
        "bundle": str(bundle.path),
        "schema_version": manifest.schema_version,
        "pocketune_version": manifest.pocketune_version,
        "model": manifest.model.name,
        "kind": manifest.model.kind,
        "note": manifest.model.note,
        "blocks": manifest.model.block_count,
        "skipped_blocks": ",".join(skipped) or "none",
        "resolution": manifest.batch.resolution,
        "rows": manifest.batch.rows,
        "method": manifest.tuned.method,
        "rank": None if manifest.tuned.lora is None else manifest.tuned.lora.rank,
        "intervals": manifest.tuned.intervals,
        "trained_parameters": manifest.tuned.elements,
        "weights": manifest.weights.storage,
        "opset": manifest.opset,
        "graphs": roles,
        "files": len(manifest.files),
        "bytes": bundle.total_bytes,
        "planned_memory": {name: getattr(manifest.memory, name) for name in manifest.memory.__dataclass_fields__},
        "recipe": manifest.recipe,
    }


def _event(phase: str, done: int, total: int, unit: str) -> Progress:
    return Progress(phase=phase, done=done, total=total, unit=unit, rss_bytes=read_memory().rss_bytes)


def _checked_threads(threads: int | None) -> int | None:
    if threads is not None and not 1 <= threads <= 1024:
        msg = f"--threads must be between 1 and 1024, got {threads}."
        raise SettingError(msg)
    return threads


def _image_paths(out: Path, count: int) -> list[Path]:
    if out.suffix.lower() != ".png":
        msg = f"cannot write an image named {out.name}: expected --out to end in .png."
        raise RunError(msg)
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{number:02d}") for number in range(count)]


if __name__ == "__main__":
    sys.exit(main())
