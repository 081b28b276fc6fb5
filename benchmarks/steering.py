"""How well prompts steer a pocket model: `python -m benchmarks.steering --model FOLDER`.

Prompts that no training drew go through the stock diffusers pipeline; the attribute classifier says whether class, colour and
background are as asked. Writes a raw row an image, and a summary beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import checkpoint_id, quiet_loading
from benchmarks.rows import append_row
from pocketune.atomic import write_text
from pocketune.models.load import ModelFolder
from pocketune.pocket.steering import ATTRIBUTES, Row, measure_steering


def load_pipeline(model: ModelFolder) -> Any:
    """The folder's stock diffusers pipeline, in float32, on a GPU where there is one."""
    pipeline = model.pipeline(dtype=torch.float32, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, measure, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder")
    parser.add_argument("--count", type=int, default=200, help="prompts")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=28, help="sampling steps")
    parser.add_argument("--size", type=int, help="image side in pixels; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/steering.jsonl"))
    options = parser.parse_args(arguments)
    if not (options.model / "model_index.json").is_file():
        parser.error(f"{options.model} is not a diffusers folder: it has no model_index.json")
    identity = {"model": options.model.name, "weights": checkpoint_id(options.model)}
    options.out.unlink(missing_ok=True)

    def record(row: Row) -> None:
        append_row(options.out, {**identity, **row})
        print(f"{'right' if row['right']['all'] else 'wrong'}  {row['prompt']}  ->  {' '.join(map(str, row['seen'].values()))}")

    quiet_loading()
    model = ModelFolder(options.model.name, options.model)
    rows, summary = measure_steering(
        load_pipeline(model),
        options.count,
        guidance=options.guidance,
        steps=options.steps,
        seed=options.seed,
        size=options.size,
        batch_size=options.batch_size,
        text=model.family.sampling(model.text_padding),
        on_row=record,
    )
    settings = {
        "guidance": options.guidance,
        "steps": options.steps,
        "seed": options.seed,
        "size": rows[0]["size"] if rows else None,
    }
    write_text(options.out.with_suffix(".summary.json"), json.dumps({**identity, **settings, **summary}, indent=2) + "\n")
    print(", ".join(f"{name} {summary.get(name, float('nan')):.1%}" for name in (*ATTRIBUTES, "all")), f"of {summary['count']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
