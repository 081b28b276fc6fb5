"""Tables of PocketBooth come from rows alone, with intervals that cover what they say."""

import numpy as np
import pytest

from benchmarks.intervals import mean_estimate, ratio_estimate
from benchmarks.quality.__main__ import main
from benchmarks.quality.table import overview_table, quality_table, subject_means, tables
from benchmarks.rows import append_row

IDENTITY = {"model": "m", "weights": "w", "settings": "s"}


def _rows(method, value, subjects=6, **changes):
    return [
        {
            **IDENTITY,
            "embedder": "e",
            "prompt_judge": "p",
            "method": method,
            "changes": "",
            "subject": f"s{number}",
            "prompt": f"p{index}",
            "seed": 0,
        }
        | {"subject_similarity": value * (1 + 0.1 * number), "prompt_fidelity": float(index % 2)}
        | changes
        for number in range(subjects)
        for index in range(4)
    ]


def test_table_is_made_from_rows_alone():
    table = quality_table([*_rows("skip50", 0.48), *_rows("lora", 0.5), *_rows("none", 0.1)])
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| no training",
        "| full LoRA",
        "| half the blocks skipped, cached residuals",
    ]
    assert "0.625 [" in lines[3]
    # Every subject's ratio is 0.96, so resampling subjects cannot change it.
    assert "96.0% [96.0%, 96.0%]" in lines[4]
    assert lines[4].endswith("| 6 | 24 |")
    assert table == quality_table([*_rows("skip50", 0.48), *_rows("lora", 0.5), *_rows("none", 0.1)])


def _costs(name, megabytes, repeats=3, **changes):
    return [
        {"model": "m", "weights": "w", "settings": "s", "method": name, "changes": "", "repeat": repeat, "skipped": "none"}
        | {"training_rss_bytes": megabytes * 1e6 + repeat, "training_anonymous_bytes": 2e7, "features_rss_bytes": 9e8}
        | {"cache_bytes": 1.5e6, "training_s": 10.0 + repeat, "features_s": 3.0, "latents_s": 1.0}
        | changes
        for repeat in range(repeats)
    ]


def test_costs_stand_beside_the_scores_of_the_same_weights():
    rows = [*_rows("lora", 0.5), *_rows("skip50", 0.48), *_rows("none", 0.1)]
    costs = [*_costs("lora", 700), *_costs("skip50", 600), *_costs("skip50", 100, weights="other")]
    lines = [line for line in quality_table(rows, costs).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].endswith("| - | - | - | - | - |")
    assert lines[3].endswith("| 700 MB (20) | 900 MB | 1.5 MB | 11 s | 3 s |")
    assert "| 600 MB (20) |" in lines[4]
    assert "MB" not in quality_table(rows, _costs("lora", 700, weights="other"))


def test_overview_is_short_and_holds_every_model():
    rows = [*_rows("lora", 0.5), *_rows("skip50", 0.48), *_rows("lora", 0.9, model="u", subjects=2)]
    lines = [line for line in overview_table(rows, _costs("skip50", 600)).splitlines() if line.startswith("|")]
    assert lines[2:] == [
        "| **m** | | | | | | |",
        "| full LoRA | 0.62 | - | 0.50 | 6 | - | - |",
        "| half the blocks skipped, cached residuals | 0.60 | 96% [96%, 96%] | 0.50 | 6 | 900 MB | 14 s |",
        "| **u** | | | | | | |",
        "| full LoRA | 0.95 | - | 0.50 | 2 | - | - |",
    ]


def test_places_are_judged_where_prompts_ask_for_them():
    texts = [
        "a photo of sks toy on the left",
        "a photo of sks toy on the right",
        "a photo of sks toy on a table",
        "a dog on the left",
    ]
    rows = [row | {"prompt": texts[int(row["prompt"][1:])]} for row in _rows("lora", 0.5)]
    assert "| 50% [50%, 50%] | 6 | 24 |" in quality_table(rows)
    assert "| - | 6 | 24 |" in quality_table(_rows("lora", 0.5))


def test_a_changed_method_shows_its_newest_rows_with_its_recipe():
    rows = [*_rows("lora", 0.5), *_rows("skip50", 0.9, changes="old"), *_rows("skip50", 0.48, changes="skip auto")]
    table = quality_table(rows, [*_costs("skip50", 100, changes="old"), *_costs("skip50", 600, changes="skip auto")])
    assert "96.0% [96.0%, 96.0%]" in table and "| 600 MB (20) |" in table
    assert "- half the blocks skipped, cached residuals: skip auto" in table and "- full LoRA:" not in table


def test_table_keeps_models_and_settings_apart():
    table = quality_table([*_rows("lora", 0.5), *_rows("lora", 0.9, weights="other")])
    assert table.count("Model `m`") == 2
    assert "0.625" in table
    assert "1.125" in table


def test_subject_means_weigh_subjects_equally():
    rows = [
        *_rows("lora", 0.5, subjects=1),
        *_rows("lora", 0.5, subjects=1),
        {**_rows("lora", 0.9, subjects=1)[0], "subject": "t"},
    ]
    assert subject_means(rows, "subject_similarity") == pytest.approx({"s0": 0.5, "t": 0.9})


def test_bootstrap_covers_the_mean_and_narrows_with_more_subjects():
    rng = np.random.default_rng(1)
    few, many = rng.normal(1.0, 0.2, size=8), rng.normal(1.0, 0.2, size=800)
    for values in (few, many):
        estimate = mean_estimate(values)
        assert estimate.low < values.mean() == estimate.value < estimate.high
    assert mean_estimate(many).high - mean_estimate(many).low < 0.2 * (mean_estimate(few).high - mean_estimate(few).low)
    # The normal interval of 800 values is an independent check of the percentiles.
    assert mean_estimate(many).high - mean_estimate(many).low == pytest.approx(2 * 1.96 * many.std() / 800**0.5, rel=0.1)
    assert mean_estimate(few) == mean_estimate(few)


def test_bootstrap_ratio_takes_subjects_in_pairs():
    reference = np.array([0.2, 0.5, 0.9, 0.7])
    estimate = ratio_estimate(reference * 0.9, reference)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.9, 0.9, 0.9))


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = [e.low <= 0.0 <= e.high for e in (mean_estimate(rng.normal(size=12)) for _ in range(200))]
    assert 0.85 <= np.mean(covered) <= 0.99


def test_a_model_is_left_out_of_the_tables_that_it_has_no_own_rows_for():
    rows = [*_rows("lora", 0.5), *_rows("patches", 0.5), *_rows("first50", 0.5)]
    rows += [*_rows("lora", 0.5, model="u"), *_rows("patches", 0.5, model="u"), *_rows("hollow50", 0.5, model="u")]
    made = tables(rows)
    assert set(made) == {"", "block-skip", "hollowed-net"}
    assert "`m`" in made["block-skip"] and "`u`" not in made["block-skip"]
    assert "`u`" in made["hollowed-net"] and "`m`" not in made["hollowed-net"]
    first = "| the first half of the blocks skipped |"
    assert first in made["block-skip"] and first not in made[""]


def test_command_makes_the_table_from_committed_rows(tmp_path, capsys):
    rows, table = tmp_path / "rows.jsonl", tmp_path / "quality.md"
    for row in _rows("lora", 0.5):
        append_row(rows, row)
    assert main(["--table-only", "--out", str(rows), "--table-file", str(table), "--costs-out", str(tmp_path / "none")]) == 0
    assert table.read_text() == overview_table(_rows("lora", 0.5))
    assert str(table) in capsys.readouterr().out
