"""Fixtures: a small SD3 model with a block of each kind, and the bundles that it is exported to."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_export.cutting import cut_by_bytes
from pocketune_export.exporter import Variant, export_variants
from tests.tiny_models import sd3_transformer

VARIANTS: dict[str, dict[str, object]] = {
    "fp32": {"weights": "fp32"},
    "fp16": {"weights": "fp16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "block": 32},
}
Exporting = Callable[..., dict[str, Bundle]]


@pytest.fixture(scope="session")
def small_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The tiny pipeline with three blocks of width 64: one with dual attention, a plain one, and the last."""
    folder = tmp_path_factory.mktemp("models") / "small-sd3"
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_folder, text_encoder_3=None, tokenizer_3=None)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer = sd3_transformer(
            num_layers=3, attention_head_dim=16, caption_projection_dim=64, pos_embed_max_size=16, dual_attention_layers=(0,)
        )
        # The last projection starts at zero, and a model that always answers zero tests nothing.
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    pipeline.register_modules(transformer=transformer)
    pipeline.save_pretrained(folder)
    return ModelFolder("small-sd3", folder)


@pytest.fixture(scope="session")
def export_small(small_model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Exporting:
    """Export the small model with a recipe, to some of `VARIANTS`."""

    def export(names: tuple[str, ...] = ("fp32",), **recipe: object) -> dict[str, Bundle]:
        root = tmp_path_factory.mktemp("bundles")
        wanted = Recipe.create(instance_prompt="a photo of sks toy", **recipe)
        variants = [Variant(out=root / name, **VARIANTS[name]) for name in names]  # type: ignore[arg-type]
        export_variants(variants, recipe=wanted, model=small_model.path)
        return {name: open_bundle(root / name) for name in names}

    return export


@pytest.fixture(scope="session")
def bundle_in_pieces(export_small: Exporting) -> Bundle:
    """Two rows, the first block skipped; its blocks are cut as larger ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pocketune_export.writer.cut_by_bytes", partial(cut_by_bytes, limit=2**16))
        return export_small(skip="0", rank=2, batch_size=2)["fp32"]


@pytest.fixture(scope="session")
def bundles(export_small: Exporting) -> Mapping[str, Bundle]:
    """The model with its middle block skipped, in every storage."""
    return export_small(tuple(VARIANTS), skip="1")
