"""Memory plans: ledgers add up, nothing is loaded for them, a larger budget never makes a worse plan, and refusals help."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pocketune import cli
from pocketune.budget import apart, planner, planning
from pocketune.budget.inputs import text_tokens
from pocketune.budget.ladder import changes, rungs
from pocketune.budget.ledger import Item, Ledger, PhaseLedger
from pocketune.budget.parts import ACTIVATIONS, ENCODERS, POSTERIORS
from pocketune.budget.planning import model_to_plan
from pocketune.budget.search import MemoryPlan, choose, fits, needs
from pocketune.budget.training import ATTENTION, FEED_FORWARD, GRADIENTS, MOMENTS, OTHERS, WEIGHTS
from pocketune.budget.whole import Ledgers, Setting
from pocketune.cgroups import CgroupLimits
from pocketune.errors import PlanError
from pocketune.features.shards import SHARD_BYTES
from pocketune.models.load import ModelFolder
from pocketune.photos import reading_bytes
from pocketune.profile import PROFILES, profile_named
from pocketune.recipe import Recipe
from pocketune.units import readable_size
from pocketune.weights import mapped, stream

FLOOR = 100_000_000
Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")


def asked(**values: object) -> Recipe:
    settings = {"instance_prompt": "a photo of sks toy", "resolution": 64, "steps": 4, "rank": 16}
    return Recipe.create(**Recipe.relevant(settings | values))


@pytest.fixture(scope="module")
def ledgers(tiny_model: ModelFolder) -> Ledgers:
    return Ledgers(Setting(folder=tiny_model, device=CPU, floor_bytes=FLOOR))


@pytest.fixture(scope="module")
def steps(ledgers: Ledgers) -> list[tuple[Recipe, Ledger]]:
    """All settings of the ladder with their ledgers; layers of the tiny model are large enough to be streamed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SMALLEST_STREAMED", 1)
        return [(recipe, ledgers(recipe)) for recipe in rungs(asked())]


def test_every_figure_of_a_device_has_a_source() -> None:
    for profile in PROFILES.values():
        assert set(profile.sources) == {"memory_bytes", "system_bytes", "gflops", "disk_bytes_per_s"}
        assert all(source.startswith(("https://", "estimate")) for source in profile.sources.values())
        assert 0 < profile.usable_bytes < profile.memory_bytes
    with pytest.raises(PlanError, match="no device toaster; there are jetson-orin-nano"):
        profile_named("toaster")


def test_the_ladder_begins_with_the_recipe_and_every_step_is_a_valid_recipe() -> None:
    for given in (
        {},
        {"gradient": "zeroth_order"},
        {"activations": "on_disk"},
        {"method": "scales", "weight_bits": 8},
        {"weight_bits": 4, "quantizer": "hqq"},
        {"method": "token"},
    ):
        found = list(rungs(asked(**given)))
        assert found[0] == asked(**given)
        assert len(found) == len({recipe.model_dump_json() for recipe in found})
        for recipe in found:
            assert Recipe.create(**recipe.model_dump()) == recipe
            assert set(changes(asked(**given), recipe)) <= {"weights", "activations", "optimizer_in_backward", "vae_tile"}


@pytest.mark.parametrize("given", [{"method": "scales"}, {"quantizer": "hqq"}, {}])
def test_packed_weights_keep_their_numbers(given: dict[str, object]) -> None:
    """On disk they would be packed by groups, in memory they are packed by rows."""
    assert {recipe.weights for recipe in rungs(asked(weight_bits=4, **given))} == {"resident"}
    if not given:
        assert {recipe.weights for recipe in rungs(asked(weight_bits=4, weights="streamed"))} == {"streamed"}


def test_a_ledger_is_the_sum_of_its_items(steps: list[tuple[Recipe, Ledger]]) -> None:
    for _, ledger in steps:
        for phase in ledger.phases:
            assert phase.bytes() == sum(item.bytes for item in phase.items)
            assert all(item.bytes >= 0 and item.formula for item in phase.items)
        assert ledger.peak_bytes() == max(phase.bytes() for phase in ledger.phases)
        assert [phase.name for phase in ledger.phases] == ["photos", "text", "latents", "training", "saving", "samples"]
        assert Ledger.from_dict(json.loads(json.dumps(ledger.as_dict()))) == ledger


def test_weights_are_no_activations(steps: list[tuple[Recipe, Ledger]]) -> None:
    """A product makes a view of its weight, which is no memory of its own; a streamed one does not even do that."""
    for name in ("text", "latents"):
        resident, streamed = (
            phase_of(next(ledger for recipe, ledger in steps if recipe.weights == weights), name).item(ACTIVATIONS)
            for weights in ("resident", "streamed")
        )
        assert 0 < resident <= streamed


def test_made_images_stay_in_memory(ledgers: Ledgers) -> None:
    """Before and after, of every prompt; those of the class are read back from disk when the model is gone."""
    ledger = ledgers(asked(sample_prompts=("a toy",) * 50, class_prompt="a toy", class_images=30))
    assert phase_of(ledger, "samples").item("images") == 2 * 50 * 64 * 64 * 4
    assert phase_of(ledger, "class images").item("images") == 30 * 64 * 64 * 4
    assert phase_of(ledger, "class images").item("class images") == 0


def test_a_photo_is_planned_with_the_pixels_of_its_file(tiny_model: ModelFolder, tmp_path: Path) -> None:
    for name in ("whole.png", "see-through.png"):
        Image.new("RGBA" if name.startswith("see") else "RGB", (300, 200)).save(tmp_path / name)
        path = tmp_path / name
        read = reading_bytes([path], max_side=100)
        assert read == path.stat().st_size + 4 * 200 * ((5 if name.startswith("see") else 1) * 300 + 100)
        setting = Setting(folder=tiny_model, device=CPU, floor_bytes=FLOOR, photos=(1,), photo_reading_bytes=read)
        assert phase_of(Ledgers(setting)(asked()), "photos").bytes() == FLOOR + 4 + read
    assert reading_bytes([tmp_path], max_side=100) == read


def test_what_earlier_phases_leave_is_planned(ledgers: Ledgers) -> None:
    ledger = ledgers(asked(skip="0-1"))
    left = [phase.name for phase in ledger.phases if phase.item("left by earlier phases")]
    assert left == ["features", "training", "saving", "samples"]


def test_the_planner_measures_the_libraries_that_a_job_has(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """With a memory budget, jobs hide scipy."""
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    monkeypatch.setattr(planning, "answer", lambda _: {"hidden": sys.modules.get("scipy", "shown") is None})
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
    planner.main()
    assert json.loads(capsys.readouterr().out) == {"hidden": True}


def test_skipped_blocks_have_a_phase_and_a_cache_on_disk(ledgers: Ledgers) -> None:
    ledger = ledgers(asked(skip="0-1,5"))
    assert "features" in [phase.name for phase in ledger.phases]
    assert dict(ledger.disk)["feature cache"] > 0


def test_features_that_wait_for_a_file_are_planned(ledgers: Ledgers) -> None:
    """All of a pool, where one file holds them; of a larger pool as many as fill a file."""
    few, refreshed, many = (
        ledgers(asked(skip="0-1,5", **values))
        for values in ({"steps": 3}, {"steps": 300, "refresh_every": 3}, {"steps": 10**6, "cache_dtype": "bfloat16"})
    )
    waiting = [phase_of(ledger, "features").item("features for the next file") for ledger in (few, refreshed, many)]
    assert waiting == [dict(few.disk)["feature cache"]] * 2 + [SHARD_BYTES]
    assert phase_of(few, "training").item("features for the next file") == 0


def phase_of(ledger: Ledger, name: str) -> PhaseLedger:
    return next(phase for phase in ledger.phases if phase.name == name)


def test_latents_of_all_crops_stay_in_memory(ledgers: Ledgers, tiny_model: ModelFolder) -> None:
    """Of each photo without patches, and of each draw with them."""
    one = 2 * tiny_model.sizes.channels * 4
    whole, patched = ledgers(asked(steps=20)), ledgers(asked(steps=20, patches="dynamic"))
    refreshed = ledgers(asked(steps=20, patches="dynamic", refresh_every=15))
    for name in ("latents", "training", "saving", "samples"):
        assert phase_of(whole, name).item(POSTERIORS) == 5 * one * 8**2
        assert phase_of(patched, name).item(POSTERIORS) == 20 * one * 4**2
        assert phase_of(refreshed, name).item(POSTERIORS) == 15 * one * 4**2
    assert phase_of(whole, "text").item(POSTERIORS) == 0
    assert phase_of(whole, "latents").flops == phase_of(ledgers(asked(steps=40)), "latents").flops
    assert phase_of(patched, "latents").flops == phase_of(refreshed, "latents").flops


def test_class_images_are_sampled_in_batches_of_their_own(ledgers: Ledgers) -> None:
    ledger = ledgers(asked(class_prompt="a toy", class_images=3, sample_prompts=("a toy",)))
    assert phase_of(ledger, "class images").item(ACTIVATIONS) > phase_of(ledger, "samples").item(ACTIVATIONS)
    assert phase_of(ledger, "training").item("class images") == 3 * 64 * 64 * 4


def test_mixed_training_needs_as_much_as_its_larger_step(ledgers: Ledgers) -> None:
    def training(**values: object) -> PhaseLedger:
        return phase_of(ledgers(asked(**values)), "training")

    def activations(phase: PhaseLedger) -> int:
        return sum(phase.item(name) for name in (ATTENTION, FEED_FORWARD, OTHERS, GRADIENTS))

    backprop, mixed = training(), training(gradient="mixed")
    assert activations(training(resolution=32)) <= activations(mixed) < activations(backprop)
    assert mixed.item(MOMENTS) == backprop.item(MOMENTS)
    assert mixed.item(WEIGHTS) == backprop.item(WEIGHTS)  # the table of positions is cropped for both sizes
    smallest = training(gradient="mixed", low_resolution=16, activations="recomputed")
    assert activations(smallest) >= activations(training(gradient="zeroth_order"))
    never, always = (training(gradient="mixed", mix_start=start, mix_end=start).flops for start in (9, -9))
    assert min(never, always) < mixed.flops < max(never, always)


@pytest.mark.parametrize(("values", "passes"), [({"zo_queries": 3}, 6), ({"zo_queries": 3, "zo_two_sided": False}, 4)])
def test_forward_passes_of_zeroth_order_are_those_of_its_points(
    values: dict[str, object], passes: int, ledgers: Ledgers
) -> None:
    one, found = (phase_of(ledgers(asked(gradient="zeroth_order", **some)), "training").flops for some in ({}, values))
    assert found * 2 == one * passes


def test_without_a_budget_the_recipe_stays_as_it_is(ledgers: Ledgers, tiny_model: ModelFolder) -> None:
    plan = choose(asked(), ledgers, tiny_model, budget_bytes=None)
    assert plan.recipe == asked()
    assert plan.trades == ()


def test_a_larger_budget_never_makes_a_worse_plan(
    ledgers: Ledgers, steps: list[tuple[Recipe, Ledger]], tiny_model: ModelFolder
) -> None:
    order = [recipe for recipe, _ in steps]
    budgets = sorted({needs(ledger) for _, ledger in steps})
    plans = [choose(asked(), ledgers, tiny_model, budget_bytes=budget) for budget in budgets]
    places = [order.index(plan.recipe) for plan in plans]
    assert places == sorted(places, reverse=True)
    assert plans[-1].recipe == asked()
    for plan, budget in zip(plans, budgets, strict=True):
        assert fits(plan.ledger, budget, None)
        assert plan.needs_bytes <= budget
        assert {trade.setting for trade in plan.trades} == set(changes(asked(), plan.recipe))
        assert plan.faster is None or plan.faster.needs_bytes > plan.needs_bytes
        assert plan.cheaper is None or plan.cheaper.needs_bytes < plan.needs_bytes
        assert MemoryPlan.from_dict(asked(), json.loads(json.dumps(plan.as_dict()))).as_dict() == plan.as_dict()


def test_a_refusal_names_the_largest_item_and_a_change_that_helps(ledgers: Ledgers, tiny_model: ModelFolder) -> None:
    cheapest = min(needs(ledgers(recipe)) for recipe in rungs(asked()))
    with pytest.raises(PlanError) as refusal:
        choose(asked(), ledgers, tiny_model, budget_bytes=cheapest - 1, where=" on 'toaster'")
    text = str(refusal.value)
    assert f"recipe needs {readable_size(cheapest)} on 'toaster'" in text
    assert "largest item: " in text
    found = re.search(r"Try (.*) \(", text)
    assert found is not None
    words = found[1].replace("--", "").split()
    values = {name: int(value) if value.isdigit() else value for name, value in zip(words[::2], words[1::2], strict=True)}
    assert choose(asked().model_copy(update=values), ledgers, tiny_model, budget_bytes=cheapest - 1)


def test_a_budget_below_the_libraries_is_refused_at_once(ledgers: Ledgers, tiny_model: ModelFolder) -> None:
    with pytest.raises(PlanError, match="Interpreter and libraries alone take 100 MB"):
        choose(asked(), ledgers, tiny_model, budget_bytes=FLOOR // 2)


def test_no_weights_are_read(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        message = "weights were opened"
        raise AssertionError(message)

    monkeypatch.setattr(mapped.MappedFile, "__init__", refuse)
    for weights in ("resident", "streamed"):
        assert planning.plan_memory(asked(weights=weights), apart.Question(model=str(tiny_folder), floor_bytes=FLOOR))


def test_a_word_is_planned_for_with_its_text_encoders(tiny_model: ModelFolder) -> None:
    ledgers = Ledgers(Setting(folder=tiny_model, device=CPU, floor_bytes=FLOOR))
    assert text_tokens(tiny_model) == 20  # of its encoders, and not CLIP's usual 77
    ledger = ledgers(asked(method="token"))
    assert phase_of(ledger, "training").item(ENCODERS) >= phase_of(ledger, "text").item(ENCODERS) > 0
    with pytest.raises(PlanError, match="largest item"):  # no blocks can be skipped then, and none are proposed
        choose(asked(method="token"), ledgers, tiny_model, budget_bytes=FLOOR + 1)
    published = Ledgers(Setting(folder=model_to_plan("sd15"), device=CPU, floor_bytes=FLOOR))
    with pytest.raises(PlanError, match="only the denoiser's configuration of sd15"):
        published(Recipe.create(instance_prompt="a photo of sks toy", method="token"))


def test_published_configurations_say_what_they_leave_out() -> None:
    folder = model_to_plan("sd15")
    assert folder.resolution_unit == 64
    assert model_to_plan("sana-600m-1024").vae_scale == 32
    assert text_tokens(model_to_plan("sd35-medium")) == 333
    assert not folder.has("vae")


def test_a_gpu_has_a_budget_of_its_own(tiny_model: ModelFolder) -> None:
    ledgers = Ledgers(Setting(folder=tiny_model, device=torch.device("cuda"), floor_bytes=FLOOR))
    ledger = ledgers(asked())
    assert 0 < ledger.peak_bytes("device") < FLOOR < ledger.peak_bytes()
    text, alone = (
        phase_of(of(asked()), "text") for of in (ledgers, Ledgers(Setting(folder=tiny_model, device=CPU, floor_bytes=FLOOR)))
    )
    assert 0 < text.item("weights on their way") < text.item(ENCODERS)  # loaded and moved one after the other
    assert text.bytes() + text.bytes("device") == alone.bytes() + text.item("weights on their way")
    assert "frozen weights" in {item.name for phase in ledger.phases for item in phase.items if item.place == "device"}
    with pytest.raises(PlanError, match="largest item"):
        choose(asked(), ledgers, tiny_model, budget_bytes=10 * FLOOR, device_budget_bytes=1000)


def test_profiles_are_of_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine that plans has."""
    questions: list[apart.Question] = []

    def refuse(_: Recipe, question: apart.Question) -> None:
        questions.append(question)
        raise PlanError

    monkeypatch.setattr(planning, "plan_memory", refuse)
    for options in (["--device", "raspberry-pi-5"], []):
        assert CliRunner().invoke(cli.app, ["plan", *options]).exit_code == 2
    assert [question.device for question in questions] == ["cpu", None]


def test_the_time_is_a_lower_bound_and_estimates_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = profile_named("raspberry-pi-5").gflops * 1e9
    items = (Item(name="weights", bytes=FLOOR, formula="all"),)
    ledger = Ledger(phases=(PhaseLedger(name="training", items=items, flops=round(90 * speed)),))
    monkeypatch.setattr(planning, "plan_memory", lambda *_: MemoryPlan(recipe=asked(), ledger=ledger, needs_bytes=FLOOR))
    shown = " ".join(CliRunner().invoke(cli.app, ["plan", "--device", "raspberry-pi-5"]).stdout.split())
    assert "at least 1 min 30 s, by arithmetic on the processor and a disk of 400 MB/s alone" in shown
    assert "of raspberry-pi-5, these figures are estimates: system_bytes, gflops" in shown


def test_a_control_group_below_the_budget_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "read_limits", lambda: CgroupLimits(memory_bytes=2**29))
    assert apart.within_limits(2**30) == (
        2**29,
        "a control group limits this process to 537 MB, which is less than the budget",
    )
    assert apart.within_limits(2**28) == (2**28, None)


def test_ctrl_c_in_a_terminal_does_not_reach_the_planner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would say so with a traceback; the process that asked ends it."""
    (tmp_path / "planner.py").write_text('import os, json; print(json.dumps({"group": os.getpgrp()}))')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(apart, "_PLANNER", "planner")
    assert apart.ask_apart(asked(), apart.Question(model="x"))["group"] != os.getpgrp()


def test_the_planner_runs_nothing_of_the_folder_that_the_user_is_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Among photos from somewhere may lie a torch.py; the last words of a planner that fails are told."""
    (tmp_path / "planner.py").write_text('import sys; sys.exit("ran what lay there")')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(apart, "_PLANNER", "planner")
    with pytest.raises(PlanError, match="No module named planner"):
        apart.ask_apart(asked(), apart.Question(model="x"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(PlanError, match="no plan: ran what lay there"):
        apart.ask_apart(asked(), apart.Question(model="x"))
