"""A U-Net, with skip connections as streams and its middle replaced by cached features, trains from a bundle as in PyTorch."""

import pytest

from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_edge.steps import Mode
from pocketune_export.exporter import export_trainable
from pocketune_export.verify import TOLERANCE, verify
from tests.tiny_models import small_unet as build_small_unet


@pytest.fixture(scope="module")
def small_unet(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Two stages of one layer, that predict v: seven blocks, the middle being block 2."""
    return ModelFolder("small-unet", build_small_unet("sd2", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def bundle(small_unet: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "unet"
    recipe = Recipe.create(instance_prompt="a photo of sks toy", skip="auto", learning_rate=1e-3)
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
