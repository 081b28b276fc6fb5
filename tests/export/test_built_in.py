"""The shipped models, half of whose blocks are skipped, train from a bundle as in PyTorch; `test_parity.py` has small ones."""

import pytest

from pocketune.models.load import BUILT_IN
from pocketune.recipe import Recipe
from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_edge.steps import Mode
from pocketune_export.exporter import export_trainable
from pocketune_export.verify import TOLERANCE, verify


@pytest.fixture(scope="module", params=BUILT_IN)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / request.param
    recipe = Recipe.create(instance_prompt="a photo of sks toy", skip="auto", learning_rate=1e-4)
    export_trainable(recipe=recipe, out=out, model=request.param)
    return open_bundle(out)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "steps"), [("one graph", 20), ("streaming", 3)])
def test_steps_equal_pytorch(bundle: Bundle, mode: Mode, steps: int) -> None:
    spans = bundle.manifest.plan.spans
    assert 2 * sum(span.stop - span.start for span in spans if span.skipped) >= bundle.manifest.model.block_count
    found = verify(bundle, model=bundle.manifest.model.name, steps=steps, mode=mode)
    assert found.passed, (found.loss, found.worst_parameter, found.parameters[found.worst_parameter])
    assert max(found.parameters.values()) <= TOLERANCE
    assert len(found.parameters) == sum(item.offset is not None for item in bundle.manifest.tuned.parameters)
