"""The law of zeroth-order bundles: they take the very steps that PyTorch takes, and hold nothing for going backwards."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from pocketune.models.load import ModelFolder
from pocketune_edge.bundle import Bundle
from pocketune_edge.delta import start_values
from pocketune_edge.state import State, fresh_state
from pocketune_edge.steps import Mode, Parts, Stepped
from pocketune_export.verify import TOLERANCE, open_steps, random_batch, verify
from tests.export.conftest import Exporting

KINDS: dict[str, dict[str, object]] = {
    "descent": {"zo_learning_rate": 1e-2, "skip": "1"},
    # Adam divides by gradients of any size, so rounding moves parameters in proportion to the learning rate.
    "adam": {"zo_optimizer": "adam", "zo_queries": 2, "zo_two_sided": False},
}


@pytest.fixture(scope="module")
def bundle_of(export_small: Exporting) -> Callable[[str], Bundle]:
    """Exports a kind when a test first asks for it."""
    return cache(lambda kind: export_small(gradient="zeroth_order", **KINDS[kind])["fp32"])


@pytest.mark.parametrize("mode", ["one graph", "streaming"])
@pytest.mark.parametrize("kind", ["descent", pytest.param("adam", marks=pytest.mark.slow)])
def test_twenty_steps_equal_pytorch(
    bundle_of: Callable[[str], Bundle], small_model: ModelFolder, kind: str, mode: Mode
) -> None:
    found = verify(bundle_of(kind), model=small_model.path, steps=20, mode=mode)
    assert found.passed, (found.worst_parameter, found.parameters[found.worst_parameter], found.loss)
    assert not found.gradients


def test_steps_that_go_too_far_do_not_pass(
    bundle_of: Callable[[str], Bundle], small_model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a twentieth, which is little beside the learning rate: descent makes small steps."""
    bundle = bundle_of("descent")
    true_step = open_steps(bundle)

    def too_far(state: State, given: Parts) -> Stepped:
        result = true_step(state, given)
        way = result.state.parameters - state.parameters
        return replace(result, state=replace(result.state, parameters=result.state.parameters + way / 20))

    monkeypatch.setattr("pocketune_export.verify.open_steps", lambda *_: too_far)
    assert not verify(bundle, model=small_model.path, steps=20).passed


@pytest.mark.parametrize("kind", ["descent", pytest.param("adam", marks=pytest.mark.slow)])
def test_steps_move_parameters_by_far_more_than_the_tolerance(bundle_of: Callable[[str], Bundle], kind: str) -> None:
    state, take_step = fresh_state(start := start_values(bundle_of(kind))), open_steps(bundle_of(kind))
    for number in range(20):
        given = {name: tensor.numpy() for name, tensor in random_batch(bundle_of(kind).manifest, seed=number).items()}
        state = take_step(state, [given]).state
    assert np.abs(state.parameters - start.flat).max() > 50 * TOLERANCE
    assert state.updates == ((20,) if kind == "adam" else (0,))


@pytest.mark.parametrize("kind", ["descent", pytest.param("adam", marks=pytest.mark.slow)])
def test_only_forward_graphs_are_there(bundle_of: Callable[[str], Bundle], kind: str) -> None:
    manifest = bundle_of(kind).manifest
    roles = {graph.role for graph in manifest.graphs}
    assert "loss" in roles and not roles & {"train_step", "block_vjp"}
    assert ("adamw" in roles) == (kind == "adam")
    assert [output.name for output in manifest.graph("head_loss").outputs] == ["loss"]


def test_parts_of_a_batch_add_up(bundle_of: Callable[[str], Bundle]) -> None:
    """Two parts of half the weight are one part: the slope is that of the sum of losses."""
    bundle = bundle_of("descent")
    state, take_step = fresh_state(start_values(bundle)), open_steps(bundle)
    given = {name: tensor.numpy() for name, tensor in random_batch(bundle.manifest, seed=1).items()}
    half = given | {"loss_weights": given["loss_weights"] / 2}
    whole, halves = take_step(state, [given]), take_step(state, [half, half])
    np.testing.assert_allclose(halves.state.parameters, whole.state.parameters, rtol=0, atol=TOLERANCE)
