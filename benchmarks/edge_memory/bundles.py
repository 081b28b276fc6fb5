"""Makes the bundles of one model, in a process of its own whose peak memory is a row too."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.edge_memory import bundle_path
from benchmarks.edge_memory.true_size import NAME, write_true_size
from pocketune.memory import read_peak_rss
from pocketune.models.load import open_model
from pocketune.recipe import Recipe
from pocketune_export.exporter import Variant, export_variants

RECIPES = {
    "pocket-sd3": Recipe(instance_prompt="a photo of sks toy", skip="auto", rank=8, draws=2),
    NAME: Recipe(instance_prompt="a photo of sks toy", skip="auto", rank=16, draws=1, resolution=256),
}
"""By model: half of the blocks skipped."""


def make_bundles(work: Path, model: str, weights: list[str]) -> dict[str, int]:
    """Export a model once for each kind of weights.

    Returns:
        Peak resident bytes of this process, and bytes of the denoiser's weights as they were before.
    """
    source: str | Path = model
    if model == NAME:
        source = work / model
        if not source.exists():
            write_true_size(source)
    variants = [Variant(out=bundle_path(work, model, kind), weights=kind) for kind in weights]  # type: ignore[arg-type]
    export_variants(variants, recipe=RECIPES[model], model=source)
    size = sum(file.stat().st_size for file in open_model(source).denoiser_files())
    return {"peak_rss_bytes": read_peak_rss() or 0, "weight_bytes": size}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("weights", nargs="+")
    given = parser.parse_args()
    print(json.dumps(make_bundles(given.work, given.model, given.weights)))
