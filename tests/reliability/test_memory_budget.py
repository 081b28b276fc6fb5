"""A job with a memory budget: planned beforehand, predicted beside measured, stopped with a checkpoint rather than killed."""

import json
from pathlib import Path

import pytest

from pocketune import guard, job, personalize
from pocketune.budget.ledger import Item, Ledger, PhaseLedger
from pocketune.budget.planning import plan_memory
from pocketune.budget.search import MemoryPlan
from pocketune.errors import BudgetError, PlanError, RunError
from pocketune.phases import budget as budgeting
from pocketune.progress import Progress
from pocketune.record import RunRecord
from pocketune.units import readable_size
from tests.reliability.test_job import LORA, quick_recipe


@pytest.fixture
def planned_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan in this process, which has the libraries already; one test below does as a job does."""
    monkeypatch.setattr(budgeting, "plan_memory_apart", plan_memory)


@pytest.mark.usefixtures("planned_here")
def test_predicted_beside_measured(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    out = tmp_path / "run"
    record = personalize(
        toy_photos, model=tiny_folder, recipe=quick_recipe(), out=out, memory_budget="20GiB", on_progress=told.append
    )
    assert record.recipe == quick_recipe()
    assert record.prediction is not None
    assert record.prediction["budget_bytes"] == 20 * 2**30
    assert set(record.prediction["phases"]) <= set(record.peaks)
    assert RunRecord.read(out / "run.json").prediction == record.prediction
    assert '<th class="number">predicted</th>' in (out / "report.html").read_text()
    notes = [event.note for event in told if event.note]
    assert len(notes) == 1
    assert notes[0].startswith("predicted peak ")
    assert (out / budgeting.PLAN_FILE).is_file()


@pytest.mark.usefixtures("planned_here")
def test_stopped_near_the_budget_and_resumed_with_a_larger_one(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick_recipe(steps=6, checkpoint_every=100)
    personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "whole")

    finished: list[int] = []

    class Leak(guard.Guard):
        """A job that grows: its third step is one too many."""

        def check(self) -> None:
            if finished[-1:] == [3]:
                self._interrupts, self.tripped = False, guard.MemoryReading(21 * 2**30, 21 * 2**30, 0)
            super().check()

    def follow(event: Progress) -> None:
        if event.phase == "training":
            finished.append(event.done)

    with monkeypatch.context() as patched:
        patched.setattr(budgeting, "Guard", Leak)
        with pytest.raises(BudgetError, match=r"memory reached 22.5 GB in the phase training, .* budget of 21.5 GB"):
            personalize(
                toy_photos,
                model=tiny_folder,
                recipe=recipe,
                out=tmp_path / "run",
                memory_budget="20GiB",
                on_progress=follow,
            )
    plan = json.loads((tmp_path / "run" / budgeting.PLAN_FILE).read_text())
    told = [
        str(budgeting.exceeded(Leak(1), MemoryPlan.from_dict(recipe, plan), "training", kept=kept)) for kept in (True, False)
    ]
    assert "add --resume" in told[0] and "--resume" not in told[1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003.safetensors"]
    less = plan["needs_bytes"] - 1
    with pytest.raises(PlanError, match="as it was planned, budget"):
        personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "run", memory_budget=less, resume=True)
    personalize(toy_photos, model=tiny_folder, recipe=recipe, out=tmp_path / "run", memory_budget="30GiB", resume=True)
    assert (tmp_path / "run" / LORA).read_bytes() == (tmp_path / "whole" / LORA).read_bytes()


def test_a_reading_above_the_limit_interrupts() -> None:
    watcher = guard.Guard(1000)
    watcher._interrupts = False
    watcher(guard.MemoryReading(900, 900, 0))
    watcher.check()
    watcher(guard.MemoryReading(990, 990, 0))
    with pytest.raises(KeyboardInterrupt):
        watcher.check()


def test_a_full_gpu_stops_the_job_too() -> None:
    watcher = guard.Guard(10**9, device_budget_bytes=500_000_000, device_bytes=lambda: 499_000_000)
    watcher._interrupts = False
    watcher(guard.MemoryReading(1, 1, 0))
    assert watcher.tripped is not None
    ledger = Ledger(
        phases=(PhaseLedger(name="training", items=(Item(name="x", bytes=400_000_000, formula="", place="device"),)),)
    )
    plan = MemoryPlan(recipe=quick_recipe(), ledger=ledger, needs_bytes=1, budget_bytes=10**9, device_budget_bytes=500_000_000)
    told = str(budgeting.exceeded(watcher, plan, "training", kept=True))
    assert told.startswith(f"memory of the GPU reached {readable_size(499_000_000)} in the phase training")
    assert f"the {readable_size(500_000_000)} that were free" in told and f"predicted: {readable_size(400_000_000)}" in told


@pytest.mark.usefixtures("planned_here")
def test_photos_are_counted_once(tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts them beside the libraries, which are measured before the photos are there."""
    done: list[str] = []
    for name in ("measured_floor", "load_photos"):
        real = getattr(job, name)
        monkeypatch.setattr(job, name, lambda *a, name=name, real=real, **k: (done.append(name), real(*a, **k))[1])
    with pytest.raises(PlanError):
        personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(), out=tmp_path / "run", memory_budget="50MB")
    assert done == ["measured_floor", "load_photos"]


@pytest.mark.usefixtures("planned_here")
def test_what_does_not_fit_is_refused_before_anything_starts(tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="Interpreter and libraries alone take"):
        personalize(toy_photos, model=tiny_folder, recipe=quick_recipe(), out=tmp_path / "run", memory_budget="50MB")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"budget_bytes": 1}'])
def test_a_damaged_plan_is_said(content: str, tiny_folder: Path, toy_photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / budgeting.PLAN_FILE).write_text(content)
    with pytest.raises(RunError, match=r"plan\.json.*without --resume"):
        personalize(
            toy_photos, model=tiny_folder, recipe=quick_recipe(), out=tmp_path / "run", memory_budget="20GiB", resume=True
        )


@pytest.mark.slow
def test_a_real_model_stays_within_its_budget(toy_photos: Path, tmp_path: Path) -> None:
    """The plan is made in a process of its own, as jobs do it."""
    record = personalize(
        toy_photos, model="pocket-sd3", recipe=quick_recipe(resolution=128), out=tmp_path / "run", memory_budget="4GiB"
    )
    assert record.prediction is not None
    assert max(reading.rss_bytes for reading in record.peaks.values()) <= record.prediction["budget_bytes"]
