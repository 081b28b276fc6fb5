"""The search over splits: exhaustive, exact, and a file that says what it is."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketune.errors import FileFormatError
from pocketune.models.load import ModelFolder
from pocketune.plan.selection import SELECTION_FILE, Measured, Selection, best_split, selection_of
from pocketune.plan.skipping import plan_for, plan_of
from pocketune.recipe import Recipe
from pocketune.selection.report import write_selection_report

DISTANCE = st.floats(0, 2, allow_nan=False)


def selection(*models: Measured, blocks: int = 4) -> Selection:
    return Selection(
        model="m",
        fingerprint="f",
        blocks=blocks,
        embedder="pocket",
        steps=20,
        guidance=4.0,
        resolution=128,
        seeds=(0, 1),
        models=models,
    )


def measured(first: tuple[float, ...], last: tuple[float, ...], name: str = "toy") -> Measured:
    return Measured(name=name, lora="00ff", prompts=("a photo of sks toy",), first=first, last=last)


@given(st.data(), st.integers(2, 12))
def test_no_split_is_better(data: st.DataObject, blocks: int) -> None:
    first, last = (tuple(data.draw(st.lists(DISTANCE, min_size=blocks, max_size=blocks))) for _ in range(2))
    for skipped in range(1, blocks):
        found = best_split(first, last, skipped)
        assert found.first + found.last == skipped and found.first >= 0 and found.last >= 0
        every = [first[n] + last[m] for n, m in itertools.product(range(blocks), repeat=2) if n + m == skipped]
        assert len(every) == skipped + 1
        assert found.score == min(every)
        assert found.plan(blocks).block_count - len(found.plan(blocks).kept) == skipped


def test_equal_splits_prefer_the_exact_prefix() -> None:
    assert best_split((0, 0, 0, 0), (0, 0, 0, 0), 3).first == 3


def test_the_papers_table_is_found_where_its_pattern_holds() -> None:
    """First blocks harmless up to 19, last ones up to 10, and beyond steeply worse: the split of FLUX at 50 %."""
    first = tuple(max(0.0, n - 19) + 1e-4 * n for n in range(57))
    last = tuple(max(0.0, m - 10) + 1e-5 * m for m in range(57))
    assert [(s.first, s.last) for s in (best_split(first, last, k) for k in (17, 23, 29))] == [(7, 10), (13, 10), (19, 10)]


def test_auto_is_what_was_measured_of_these_weights(tiny_model: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.path.iterdir():
        (folder / path.name).symlink_to(path)
    model = ModelFolder("m", folder)
    adapter = model.empty_denoiser()
    assert selection_of(model) is None
    assert plan_for(adapter, "auto").describe() == "0-1,5"
    asked = Recipe.create(instance_prompt="a photo of sks toy", skip="auto")
    assert plan_of(adapter, asked, folder=model).describe() == "0-1,5"

    # The last three blocks are harmless, the first ones are not.
    distances = measured((0, 1, 2, 3, 4, 5), (0, 0.1, 0.2, 0.3, 4, 5))
    found = selection(distances, blocks=6).model_copy(update={"fingerprint": model.fingerprint()})
    found.write(folder / SELECTION_FILE)
    assert selection_of(model) == found
    chosen = {
        skip: plan_for(adapter, skip, selection=selection_of(model)).describe() for skip in ("auto", "auto:0.7", "auto:0")
    }
    assert chosen == {"auto": "3-5", "auto:0.7": "0,3-5", "auto:0": "none"}
    assert plan_for(adapter, "0-1", selection=found).describe() == "0-1"
    for skip, blocks in (("auto", "3-5"), ("auto:0.7", "0,3-5"), ("first:0.5", "0-2")):
        recipe = Recipe.create(instance_prompt="a photo of sks toy", skip=skip)
        assert plan_of(adapter, recipe, folder=model).describe() == blocks

    found.model_copy(update={"fingerprint": "of other weights"}).write(folder / SELECTION_FILE)
    assert selection_of(model) is None
    (folder / SELECTION_FILE).write_text("{}")
    with pytest.raises(FileFormatError):
        selection_of(model)


def test_distances_are_averaged_over_models(tmp_path: Path) -> None:
    found = selection(measured((0, 1, 2, 3), (0, 0, 4, 4)), measured((0, 3, 4, 5), (0, 2, 0, 0)))
    assert found.complete
    assert found.mean_distances() == ((0, 2, 3, 4), (0, 1, 2, 2))
    assert found.split(2).first == 0
    path = tmp_path / "selection.json"
    found.write(path)
    assert Selection.read(path) == found
    write_selection_report(found, tmp_path / "selection.html")
    page = (tmp_path / "selection.html").read_text()
    assert "<svg" in page and page.count("<tr") == 1 + 3 + 1 + 2
    assert "http" not in page.replace("http-equiv", "")


def test_same_search_however_far() -> None:
    begun = selection(measured((0, 1), (0,)))
    assert not begun.complete
    assert begun.same_search(selection(measured((0, 1, 2, 3), (0, 1, 2, 3))))
    assert not begun.same_search(selection(measured((0,), (0,), name="other")))
    judged = {"embedder_model": "facebook/dino-vits16", "embedder_digest": "00ff"}
    assert not begun.same_search(begun.model_copy(update=judged))
    assert begun.model_copy(update=judged).same_search(begun.model_copy(update=judged | {"embedder_model": "a/copy"}))


def test_what_an_earlier_version_measured_is_read() -> None:
    found = Selection.read(Path(__file__).parents[2] / "benchmarks/results/selection-pocket-sd3.json")
    assert found.complete and found.embedder == "pocket" and found.embedder_digest is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"schema_version":1', '"schema_version":2'),
        lambda text: text.replace('"blocks":4', '"blocks":3'),
        lambda text: text.replace("4.0", "NaN"),
        lambda text: text.replace('"model":"m"', '"model":"m","extra":1'),
        lambda _: "[]",
    ],
)
def test_damaged_files_are_refused(change, tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    text = selection(measured((0, 1, 2, 3), (0, 1, 2, 3))).model_dump_json()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(FileFormatError, match="select-blocks"):
        Selection.read(path)
    with pytest.raises(FileFormatError, match="select-blocks"):
        Selection.read(tmp_path / "none.json")
