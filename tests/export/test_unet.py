"""A U-Net, with skip connections as streams and its middle replaced by cached features, trains from a bundle as in PyTorch."""

from pathlib import Path

import pytest

from pocketune.methods.scales import trained_layers
from pocketune.models.load import ModelFolder
from pocketune.plan.skipping import plan_for
from pocketune.recipe import Recipe
from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_edge.errors import SettingError
from pocketune_edge.steps import Mode
from pocketune_export.exporter import export_trainable
from pocketune_export.layout import layout_of
from pocketune_export.scaled import add_scales
from pocketune_export.tuned import by_block, packing_of
from pocketune_export.verify import TOLERANCE, open_steps, verify
from tests.tiny_models import small_unet as build_small_unet

PROMPT = "a photo of sks toy"


@pytest.fixture(scope="module")
def small_unet(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Two stages of one layer, that predict v: seven blocks, the middle being block 2."""
    return ModelFolder("small-unet", build_small_unet("sd2", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def bundle(small_unet: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "unet"
    recipe = Recipe.create(instance_prompt=PROMPT, skip="auto", learning_rate=1e-3)
    export_trainable(recipe=recipe, out=out, model=small_unet.path)
    return open_bundle(out)


@pytest.mark.parametrize(("mode", "steps"), [("one graph", 20), ("streaming", 3)])
def test_steps_equal_pytorch(bundle: Bundle, small_unet: ModelFolder, mode: Mode, steps: int) -> None:
    found = verify(bundle, model=small_unet.path, steps=steps, mode=mode)
    assert found.passed, (found.loss, found.worst_parameter, found.parameters[found.worst_parameter])
    assert max(found.parameters.values()) <= TOLERANCE
    assert len(found.gradients) == sum(item.offset is not None for item in bundle.manifest.tuned.parameters) > 8


def test_the_manifest_says_what_a_unet_is(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.model.streams == ("image", "skip_0", "skip_1", "skip_2", "skip_3")
    [middle] = [span for span in manifest.plan.spans if span.skipped]
    assert middle.replaces
    assert middle.features == (f"features_{middle.start}_{middle.stop}_image",)
    assert (manifest.noise_schedule.kind, manifest.noise_schedule.objective) == ("ddpm", "v_prediction")
    assert all(parameter.key.startswith("unet.") for parameter in manifest.tuned.parameters)
    steps = manifest.noise_schedule.ddim
    assert steps is not None and (steps.spacing, steps.offset) == ("leading", 1)
    assert steps.final_signal == manifest.noise_schedule.signal[0]  # type: ignore[index]


@pytest.mark.parametrize("skip", ["none", "auto"])
def test_the_scales_of_a_block_lie_together(small_unet: ModelFolder, skip: str) -> None:
    """Its residual layer, its attention and its sampler lie apart in the model; what lies outside of blocks is at the ends."""
    adapter = small_unet.empty_denoiser()
    recipe = Recipe.create(instance_prompt=PROMPT, method="scales", weight_bits=8, skip=skip)
    plan, packing = plan_for(adapter, skip), packing_of(adapter.model, recipe)
    assert packing is not None
    packed = [name for name, _ in adapter.model.named_modules() if f"{name}.weight" in packing.names]
    layers = trained_layers(adapter, plan, packed)
    layout = layout_of(by_block(adapter, add_scales(adapter.model, layers, inputs=True)))
    prefixes = [tuple(f"{part}." for part in adapter.block_parts(index)) for index in plan.kept]
    parts = [layout.part(of) for of in prefixes]
    assert all(any(".resnets." in slot.name for slot in part.slots) for part, _, _ in parts)
    before, behind = (layout.beside([name for of in prefixes for name in of], before=side) for side in (True, False))
    assert bool(before[0].slots) == bool(behind[0].slots) == (skip == "none")
    starts, stops = [start for _, start, _ in parts], [stop for _, _, stop in parts]
    assert starts == [before[2], *stops[:-1]]
    assert stops[-1] == (behind[1] if behind[0].slots else layout.elements)


@pytest.mark.slow
@pytest.mark.parametrize(("skip", "mode"), [("auto", "streaming"), ("none", "one graph")])
def test_scales_of_all_layers_train_as_in_pytorch(small_unet: ModelFolder, tmp_path: Path, skip: str, mode: Mode) -> None:
    recipe = Recipe.create(
        instance_prompt=PROMPT, method="scales", weight_bits=8, skip=skip, scale_intervals=1, scale_learning_rate=1e-3
    )
    export_trainable(recipe=recipe, out=tmp_path / "scales", model=small_unet.path)
    bundle = open_bundle(tmp_path / "scales")
    found = verify(bundle, model=small_unet.path, steps=2, mode=mode)
    assert found.passed, (found.loss, found.worst_parameter, found.parameters[found.worst_parameter])
    assert any("resnets" in name for name in found.gradients)
    if skip == "none":  # scales outside of blocks have gradients in the one graph alone
        with pytest.raises(SettingError, match="without --streaming"):
            open_steps(bundle, "streaming")
