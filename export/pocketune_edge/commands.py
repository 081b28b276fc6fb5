"""What the commands of `pocketune-edge` do with the options given to them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from pocketune.atomic import check_writable, replacing
from pocketune.memory import read_memory
from pocketune.photos import numbered_images
from pocketune.progress import Progress
from pocketune.runfolder import DEVICE_RECORD_FILE
from pocketune.units import duration, readable_size
from pocketune_edge.bundle import Bundle, open_bundle, telling
from pocketune_edge.delta import RESULTS, find_result, load_result, neutral
from pocketune_edge.display import Display, printable, say
from pocketune_edge.job import personalize
from pocketune_edge.sample import render
from pocketune_edge.session import Sessions, check_threads
from pocketune_edge.settings import CHANGEABLE, check_changes, settings_of
from pocketune_edge.text import check_prompts


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
            threads=given.threads,
            on_progress=display,
        )
    result = {
        "run": str(given.out),
        record["method"]: str(given.out / record["result"]),
        "record": str(given.out / DEVICE_RECORD_FILE),
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
        say(f"took    {duration(sum(record['seconds'].values()))}, at most {readable_size(peak)} of memory")


def _sample(given: argparse.Namespace) -> None:
    paths = numbered_images(given.out, len(given.prompt), suffixes=(".png",))
    for path in paths:
        check_writable(path)
    # What is wrong or missing is said before gigabytes are hashed.
    check_threads(given.threads)
    check_prompts(given.prompt)
    asked = {"sample_steps": given.steps, "guidance_scale": given.guidance, "seed": given.seed}
    check_changes(asked)
    if given.lora is not None:
        find_result(given.lora, *RESULTS)
    with Display(sys.stderr, quiet=given.quiet) as display:
        bundle = open_bundle(given.bundle, on_bytes=telling(display))
        settings, _ = settings_of(bundle.manifest, asked)
        parameters = neutral(bundle.manifest.tuned) if given.lora is None else load_result(bundle, given.lora).flat
        sessions = Sessions(bundle, keep=not given.streaming, threads=given.threads)
        display(_event("text", 0, 0, "prompt"))
        images = render(
            sessions,
            given.prompt,
            seeds=[settings.seed + number for number in range(len(given.prompt))],
            steps=settings.sample_steps,
            guidance=settings.guidance_scale,
            parameters=parameters,
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
    with Display(sys.stderr, quiet=given.quiet) as display:
        facts = describe(open_bundle(given.bundle, on_bytes=telling(display)))
    if given.json:
        say(json.dumps(facts))
    elif not given.quiet:
        planned = ", ".join(f"{name} {readable_size(size)}" for name, size in facts["planned_memory"].items())
        for name, value in (facts | {"bytes": readable_size(facts["bytes"]), "planned_memory": planned}).items():
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


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "personalize": _personalize,
    "sample": _sample,
    "inspect": _inspect,
}
