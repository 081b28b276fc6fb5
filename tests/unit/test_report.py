"""The report: self-contained, complete, and safe to open whatever a prompt holds."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketune.errors import FileFormatError, RunError
from pocketune.memory import MemoryReading, MemoryRow
from pocketune.plots import choices_plot, loss_plot, memory_plot, smooth, thin
from pocketune.recipe import Recipe
from pocketune.record import CheckResult, RunRecord, SamplePair
from pocketune.report import render_report, write_report
from pocketune.sampling.choices import Choice

EVIL = "<script>alert('x')</script> & \"sks\" toy"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID or "svg" in self._open, f"<{tag}/> closes itself"
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make_record() -> RunRecord:
    rows = [
        MemoryRow(i / 10, "photos" if i < 20 else "training", 300_000_000 + 1_000_000 * i, 200_000_000, 90_000_000)
        for i in range(60)
    ]
    return RunRecord(
        model="pocket-sd3",
        model_kind="SD3Transformer2DModel",
        model_note="an interim <checkpoint>",
        recipe=Recipe(instance_prompt=EVIL, skip="0-3,10-11", steps=50, sample_prompts=("one", "two")),
        plan={
            "blocks": 12,
            "skipped": "0-3,10-11",
            "trained_blocks": [4, 5, 6, 7, 8, 9],
            "trained_parameters": 12_345,
            "residuals": True,
            "feature_cache_bytes": 12_400_000,
        },
        losses=tuple(float(x) for x in 1.0 + 0.5 * np.random.default_rng(0).random(50)),
        memory=tuple(rows),
        peaks={
            "photos": MemoryReading(320_000_000, 200_000_000, 90_000_000),
            "training": MemoryReading(359_000_000, 210_000_000, 91_000_000),
        },
        seconds={"photos": 2.0, "training": 4.0},
        photos=("a.jpg", "b.jpg"),
        samples=tuple(
            SamplePair(
                prompt=f"{EVIL} {n}",
                seed=1000 + n,
                before=Path(f"samples/0{n}-before.png"),
                after=Path(f"samples/0{n}-after.png"),
            )
            for n in range(2)
        ),
        check=CheckResult(image_change=0.123, norms={"block.lora_B": 0.5}),
        versions={"torch": "2.13.0"},
        started="2030-01-02T03:04:05+00:00",
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_images(tmp_path)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def html(shared_run: Path) -> str:
    return render_report(make_record(), shared_run)


def make_images(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    for part, names in {
        "samples": [f"0{n}-{when}.png" for n in range(2) for when in ("before", "after")],
        "photos": ["a.jpg", "b.jpg"],
    }.items():
        (folder / part).mkdir()
        for name in names:
            Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(folder / part / name)
    return folder


def test_page_parses_and_holds_nothing_from_outside(html: str) -> None:
    text, page = html, Page(html)
    assert text.startswith("<!doctype html>")
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(page.tags)
    assert not re.search(r"(?i)https?:|//[a-z]|@import|file:", re.sub(r'"data:image/[^"]*"', "", text))
    sources = [value for _, name, value in page.attributes if name in {"src", "href", "xlink:href", "srcset", "action", "data"}]
    assert sources and all(source.startswith(("data:image/", "#")) for source in sources)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_ids_are_unique_and_every_reference_finds_its_target(html: str) -> None:
    page = Page(html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    references = {value[1:] for _, name, value in page.attributes if name.endswith("href")}
    references |= {match for _, _, value in page.attributes for match in re.findall(r"url\(#([^)]*)\)", value)}
    assert references <= set(ids)


def test_every_image_is_inside_with_its_pixels(html: str, shared_run: Path) -> None:
    record, page = make_record(), Page(html)
    images = [value for tag, name, value in page.attributes if tag == "img" and name == "src"]
    assert len(images) == 2 * len(record.samples) + 2
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in images]
    for pair in record.samples:
        for path in (pair.before, pair.after):
            original = np.asarray(Image.open(shared_run / path))
            assert any(original.shape == image.shape and (original == image).all() for image in decoded)


def test_large_images_are_scaled_down(run: Path) -> None:
    Image.new("RGB", (2000, 1000), "red").save(run / "samples/00-after.png")
    page = Page(render_report(make_record(), run))
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(v.split(",")[1]))).size
        for t, n, v in page.attributes
        if t == "img" and n == "src"
    ]
    assert (512, 256) in sizes and max(max(size) for size in sizes) == 512


def test_text_is_escaped_and_shown_as_it_was(html: str) -> None:
    page = Page(html)
    assert "<script" not in html
    assert "<checkpoint>" not in html and "an interim <checkpoint>" in page.text
    assert page.text.count(EVIL) >= 4  # title, heading, both captions
    assert ("img", "alt", f"After training: {EVIL} 1") in page.attributes


def test_page_says_what_was_measured(html: str) -> None:
    text = Page(html).text
    for expected in (
        "6 of 12",
        "12,345 parameters",
        "359 MB",
        "12.4 MB",
        "12.3 %",
        "0-3,10-11",
        "2.13.0",
        "2030-01-02 03:04 UTC",
        "changes the image",
    ):
        assert expected in text, expected


def test_blocks_are_marked_by_what_happened_to_them(html: str, run: Path) -> None:
    record = make_record()
    kinds = re.findall(r'class="block (\w+)"', html)
    assert kinds == ["exact"] * 4 + ["trained"] * 6 + ["approximate"] * 2
    ablation = replace(record, plan=record.plan | {"residuals": False})
    kinds = re.findall(r'class="block (\w+)"', render_report(ablation, run))
    assert kinds == ["dropped"] * 4 + ["trained"] * 6 + ["dropped"] * 2


def test_records_of_earlier_versions_are_read() -> None:
    record = make_record()
    values = record.to_json()
    earlier = values | {"check": values["check"] | {"nonzero": True, "loads": True}}
    assert RunRecord.from_json(earlier) == record


def test_record_survives_the_round_trip(run: Path) -> None:
    record = make_record()
    write_report(record, run)
    assert RunRecord.read(run / "run.json") == record
    assert (run / "report.html").read_text(encoding="utf-8") == render_report(record, run)


def test_equal_records_give_equal_pages(html: str, shared_run: Path) -> None:
    assert render_report(make_record(), shared_run) == html


@pytest.mark.parametrize(
    "change", [{"schema_version": 99}, {"losses": None}, {"memory": {}}, {"recipe": {"steps": -1}}, {"samples": [{}]}]
)
def test_damaged_record_is_refused(run: Path, change: dict[str, object]) -> None:
    values = json.loads(make_record().to_text()) | change
    (run / "run.json").write_text(json.dumps(values))
    with pytest.raises(FileFormatError):
        RunRecord.read(run / "run.json")


def test_missing_image_is_named_and_nothing_is_written(run: Path) -> None:
    (run / "samples/01-after.png").unlink()
    with pytest.raises(RunError, match="01-after"):
        write_report(make_record(), run)
    assert not (run / "report.html").exists() and not (run / "run.json").exists()


def test_run_without_losses_memory_and_photos_still_has_a_page(tmp_path: Path) -> None:
    bare = replace(make_record(), losses=(), memory=(), peaks={}, samples=(), photos=(), model_note=None, plan={})
    page = Page(render_report(bare, tmp_path))
    assert "svg" not in page.tags and "img" not in page.tags


def test_smoothing_keeps_a_constant_and_thinning_keeps_the_peak() -> None:
    assert np.allclose(smooth([2.0] * 100), 2.0)
    assert smooth([3.0]) == [3.0]
    rows = [MemoryRow(i, "training", 7 if i == 1234 else 5, 5, 0) for i in range(5000)]
    assert len(thin(rows)) <= 600 and max(row.rss_bytes for row in thin(rows)) == 7


def test_plots_are_drawn_for_one_value_and_follow_the_text_colour() -> None:
    for svg in (loss_plot([1.0]), memory_plot([MemoryRow(0.0, "training", 5, 5, 0)])):
        assert svg.startswith("<svg") and svg.endswith("</svg>") and "currentColor" in svg


@pytest.mark.parametrize("largest", [0.0, 0.5, 1.0])
def test_choices_are_plotted_in_two_colours(largest: float) -> None:
    recipe = Recipe.create(instance_prompt="a photo of sks toy", gradient="mixed", mix_largest=largest)
    choices = [Choice(noise=step / 10, probability=step / 10, zeroth_order=step > 6) for step in range(10)]
    svg = choices_plot(choices, recipe)
    assert svg.count("#eda035") >= 1 and svg.count("#6d6af0") >= 1
    assert choices_plot(choices, recipe) == svg
