"""PocketBooth without training: methods, scores, costs, and rows that survive a stop."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import pocketune
from benchmarks.quality.__main__ import _method_names, main, settings_text
from benchmarks.quality.costs import measure_costs
from benchmarks.quality.measure import measure
from benchmarks.quality.methods import GROUPS, METHODS, POCKET_RECIPE
from benchmarks.quality.painter import PocketunePainter, method_recipe, subject_recipe
from benchmarks.quality.subjects import pocket_subjects
from benchmarks.rows import append_row, read_rows
from pocketune.errors import FileFormatError, RecipeError, RunError
from pocketune.memory import MemoryReading

torch.set_num_threads(1)
IDENTITY = {"model": "m", "weights": "w", "settings": "s"}


class CountingPainter:
    """Paints the colour of the seed; remembers for whom."""

    def __init__(self, fail_at=None):
        self.calls = []
        self.fail_at = fail_at

    def paint(self, method, subject, prompts, seed):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((method.name, subject.name, seed))
        return [Image.new("RGB", (64, 64), (seed, index, 0)) for index in range(len(prompts))]


class RedEmbedder:
    name = "red"

    def embed(self, images):
        return torch.tensor([[image.getpixel((0, 0))[0] / 255, 1.0] for image in images])


class IndexJudge:
    name = "index"

    def fidelity(self, images, prompts):
        return [float(image.getpixel((0, 0))[1]) for image in images]


def _measure(out, painter, *, methods=("none", "lora"), seeds=(0, 1), subjects=2):
    chosen = [METHODS[name] for name in methods]
    measure(
        chosen,
        pocket_subjects(subjects),
        seeds=seeds,
        recipe=POCKET_RECIPE,
        painter=painter,
        embedder=RedEmbedder(),
        prompt_judge=IndexJudge(),
        identity=IDENTITY,
        out=out,
    )


def test_every_image_has_a_row_and_a_second_run_does_nothing(tmp_path):
    out = tmp_path / "rows.jsonl"
    _measure(out, CountingPainter())
    rows = read_rows(out)
    assert len(rows) == 2 * 2 * 2 * 10
    assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows)
    assert {row["prompt_fidelity"] for row in rows} == set(map(float, range(10)))
    idle = CountingPainter()
    _measure(out, idle)
    assert idle.calls == []
    _measure(out, idle, seeds=(0, 1, 2))
    assert {seed for _, _, seed in idle.calls} == {2}


def test_a_stopped_run_goes_on_and_ends_with_the_same_rows(tmp_path):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    _measure(whole, CountingPainter())
    with pytest.raises(KeyboardInterrupt):
        _measure(stopped, CountingPainter(fail_at=5))
    content = stopped.read_bytes()
    stopped.write_bytes(content[:-25])  # the last row was being written when the power went
    _measure(stopped, CountingPainter())
    assert stopped.read_bytes() == whole.read_bytes()


def test_other_settings_are_measured_anew(tmp_path):
    out = tmp_path / "rows.jsonl"
    _measure(out, CountingPainter())
    rows = read_rows(out)
    out.write_text("")
    for row in rows:
        append_row(out, {**row, "settings": "old"})
    painter = CountingPainter()
    _measure(out, painter)
    assert len(painter.calls) == 8


def test_a_method_that_was_changed_is_measured_anew(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    _measure(out, CountingPainter())
    monkeypatch.setitem(METHODS, "lora", replace(METHODS["lora"], changes={"rank": 3}))
    painter = CountingPainter()
    _measure(out, painter)
    assert {name for name, *_ in painter.calls} == {"lora"} and len(painter.calls) == 4
    assert {(row["method"], row["changes"]) for row in read_rows(out)} == {("none", ""), ("lora", ""), ("lora", "rank 3")}


def test_a_damaged_row_is_named(tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(FileFormatError, match="line 2"):
        read_rows(out)
    out.write_text("[1]\n")
    with pytest.raises(FileFormatError, match="list"):
        read_rows(out)


def test_costs_are_measured_in_fresh_processes_once(tmp_path, monkeypatch):
    requests = []

    def run(command, *, check):
        assert command[1:3] == ["-m", "benchmarks.quality.costs"]
        requests.append(json.loads(Path(command[3]).read_text()))
        return subprocess.CompletedProcess(command, 0)

    record = SimpleNamespace(
        peaks={"training": MemoryReading(7, 5, 2), "features": MemoryReading(8, 6, 2)},
        seconds={"training": 1.234, "features": 0.5},
        plan={"skipped": "0-3", "trained_parameters": 9, "feature_cache_bytes": 11},
        versions={"torch": "2"},
    )
    monkeypatch.setattr("benchmarks.quality.costs.subprocess.run", run)
    monkeypatch.setattr("benchmarks.quality.costs.RunRecord.read", lambda path: record)
    out = tmp_path / "costs.jsonl"
    for repeats in (1, 2):
        measure_costs(
            [METHODS[name] for name in ("none", "lora", "skip50-patches")],
            [tmp_path / "0.png"],
            model="m",
            recipe={"instance_prompt": "x", "steps": 5},
            repeats=repeats,
            identity=IDENTITY,
            out=out,
        )
    assert [request["recipe"] for request in requests[:2]] == [
        {"instance_prompt": "x", "steps": 5},
        {"instance_prompt": "x", "steps": 5, "skip": "auto", "patches": "dynamic", "patch_min": 96},
    ]
    rows = read_rows(out)
    assert [(row["method"], row["repeat"]) for row in rows] == [
        ("lora", 0),
        ("skip50-patches", 0),
        ("lora", 1),
        ("skip50-patches", 1),
    ]
    assert rows[0]["training_rss_bytes"] == 7 and rows[0]["features_rss_bytes"] == 8 and rows[0]["training_s"] == 1.23


def test_a_training_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.quality.costs.subprocess.run", lambda command, check: subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(RunError, match="failed"):
        measure_costs([METHODS["lora"]], [], model="m", recipe={}, repeats=1, identity=IDENTITY, out=tmp_path / "c.jsonl")


def test_every_method_is_a_valid_recipe_and_every_group_names_methods():
    for method in METHODS.values():
        recipe = method_recipe(method, subject_recipe(pocket_subjects(1)[0], POCKET_RECIPE))
        assert (recipe.learning_rate == POCKET_RECIPE["learning_rate"]) is (recipe.why_without_effect("learning_rate") is None)
        if recipe.method == "scales":
            assert recipe.scale_learning_rate == POCKET_RECIPE["scale_learning_rate"]
            assert f"scale_learning_rate {recipe.scale_learning_rate}" in method.changes_text(POCKET_RECIPE)
            assert "scale_learning_rate" not in settings_text(POCKET_RECIPE)
        assert recipe.steps == (450 if "longer" in method.name else 300)
    for group, names in GROUPS.items():
        assert _method_names(group) == list(names)
        assert set(names) <= set(METHODS) and "lora" in names
    assert not set(GROUPS) & set(METHODS)
    assert _method_names("lora,hollow30,hollowed-net") == ["lora", "hollow30", "none", "patches", *GROUPS["hollowed-net"][4:]]


def test_command_refuses_what_it_does_not_know(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--methods", "lora,magic"])
    assert "unknown method magic" in capsys.readouterr().err
    assert main(["--model", str(tmp_path), "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "error: " in capsys.readouterr().err
    with pytest.raises(RecipeError, match="rank"):
        settings_text({"rank": 0})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("steps = 5\nskip = 'auto'\nscale_learning_rate = 1e-3\nseed = 1\n")
    assert main(["--recipe", str(recipe), "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "set seed, skip" in capsys.readouterr().err


def test_settings_text_does_not_depend_on_order():
    assert settings_text({"steps": 3, "rank": 2}) == settings_text({"rank": 2, "steps": 3}) == "rank 2, steps 3"


def test_untrained_images_are_painted_once_for_all_subjects(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "pocketune.sample.generate",
        lambda model, prompts, **kwargs: calls.append(kwargs) or [Image.new("RGB", (8, 8))] * len(prompts),
    )
    painter = PocketunePainter("m", {"sample_steps": 5, "guidance_scale": 2.0}, tmp_path)
    for subject in pocket_subjects(3):
        assert len(painter.paint(METHODS["none"], subject, subject.prompts, 2)) == 10
    assert calls == [{"lora": None, "seeds": list(range(2000, 2010)), "steps": 5, "guidance": 2.0}]


def test_training_gets_the_methods_recipe_and_is_done_once(tmp_path, monkeypatch):
    trained = []

    def personalize(photos, *, model, recipe, out, resume):
        trained.append((recipe.skip, recipe.use_residuals, recipe.steps, recipe.seed, len(photos), resume))
        (out / "lora").mkdir(parents=True)
        (out / "lora" / "pytorch_lora_weights.safetensors").touch()
        (out / "run.json").touch()

    loras = []
    monkeypatch.setitem(vars(pocketune), "personalize", personalize)
    monkeypatch.setattr(
        "pocketune.sample.generate", lambda model, prompts, **kwargs: loras.append(kwargs["lora"]) or [None] * len(prompts)
    )
    painter = PocketunePainter("m", POCKET_RECIPE | {"steps": 7}, tmp_path)
    subject = pocket_subjects(1)[0]
    for name, seed in (("lora", 0), ("skip50", 0), ("skip50-no-residuals", 0), ("skip50", 0), ("skip50", 1)):
        painter.paint(METHODS[name], subject, subject.prompts, seed)
    assert [asked[:2] for asked in trained] == [("none", True), ("auto", True), ("auto", False), ("auto", True)]
    assert [asked[2:] for asked in trained] == [(7, 0, 4, False)] * 3 + [(7, 1, 4, False)]
    assert len(set(loras)) == 4
    assert loras[1] == loras[3] and loras[1].parts[-3:] == ("toy00-0", "lora", "pytorch_lora_weights.safetensors")
    changed = replace(METHODS["skip50"], changes={"skip": "auto:0.4"})
    painter.paint(changed, subject, subject.prompts, 0)
    assert len(trained) == 5 and trained[-1][0] == "auto:0.4"
