"""PocketBooth without training: subjects, scores, rows that survive a stop, and tables made from rows alone."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import pocketune
from benchmarks.intervals import mean_estimate, ratio_estimate
from benchmarks.quality.__main__ import _method_names, main, settings_text
from benchmarks.quality.costs import measure_costs
from benchmarks.quality.embedders import Clip, PocketEmbedder, PocketPromptJudge, open_embedder
from benchmarks.quality.measure import measure, subject_similarity
from benchmarks.quality.methods import GROUPS, METHODS, POCKET_RECIPE, PocketunePainter, subject_recipe
from benchmarks.quality.subjects import AskedPrompt, asked_scene, dreambooth_subjects, pocket_subjects
from benchmarks.quality.table import quality_table, subject_means
from benchmarks.rows import append_row, read_rows
from pocketune.embedders import DinoEmbedder
from pocketune.errors import FileFormatError, ModelError, RecipeError, RunError
from pocketune.memory import MemoryReading
from pocketune.pocket.draw import render
from pocketune.pocket.judges import RESERVED_TOYS
from pocketune.pocket.scenes import toy_identity
from pocketune.pocket.text import new_tokenizer
from pocketune.recipe import Recipe

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
        painter=painter,
        embedder=RedEmbedder(),
        prompt_judge=IndexJudge(),
        identity=IDENTITY,
        out=out,
    )


def test_subjects_are_twelve_held_out_toys_with_four_photos_and_ten_prompts():
    subjects = pocket_subjects()
    assert len(subjects) == 12
    assert len({subject.toy for subject in subjects}) == 12
    for number, subject in enumerate(subjects):
        assert subject.toy == toy_identity(RESERVED_TOYS + number)
        assert [photo.size for photo in subject.photos] == [(128, 128)] * 4
        assert len({prompt.text for prompt in subject.prompts}) == 10
        assert subject.instance_prompt == "a photo of sks toy"
    again = pocket_subjects(1)[0]
    assert [photo.tobytes() for photo in again.photos] == [photo.tobytes() for photo in subjects[0].photos]


def test_a_perfect_generator_scores_high_and_another_subject_low():
    first, _, second = pocket_subjects(3)  # the first two look alike
    images = [render(asked_scene(first.toy, prompt, 5)) for prompt in first.prompts]
    embedder = PocketEmbedder()
    own = np.mean(subject_similarity(embedder, first.photos, images))
    other = np.mean(subject_similarity(embedder, second.photos, images))
    assert own > 0.75
    assert own > other + 0.4
    assert np.mean(PocketPromptJudge().fidelity(images, first.prompts)) >= 0.9


def test_prompt_fidelity_is_the_share_of_what_was_asked():
    toy = toy_identity(RESERVED_TOYS)
    image = render(asked_scene(toy, AskedPrompt("", {"background": "night", "place": "left"}), 3))
    asked = [{"background": "night"}, {"background": "snow"}, {"background": "night", "place": "right"}]
    scores = PocketPromptJudge().fidelity([image] * 3, [AskedPrompt("", names) for names in asked])
    assert scores == [1.0, 0.0, 0.5]


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


def test_a_damaged_row_is_named(tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(FileFormatError, match="line 2"):
        read_rows(out)
    out.write_text("[1]\n")
    with pytest.raises(FileFormatError, match="list"):
        read_rows(out)


def _rows(method, value, subjects=6, **changes):
    return [
        {
            **IDENTITY,
            "embedder": "e",
            "prompt_judge": "p",
            "method": method,
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
        {"model": "m", "weights": "w", "settings": "s", "method": name, "repeat": repeat, "skipped": "none"}
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
        {"instance_prompt": "x", "steps": 5, "skip": "auto", "patches": "dynamic"},
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
        Recipe.create(**subject_recipe(pocket_subjects(1)[0], POCKET_RECIPE), **method.changes)
    for group, names in GROUPS.items():
        assert _method_names(group) == list(names)
        assert set(names) <= set(METHODS) and "lora" in names
    assert _method_names("lora,hollow30,hollowed-net") == ["lora", "hollow30", "none", "patches", *GROUPS["hollowed-net"][4:]]


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


def test_command_makes_the_table_from_committed_rows(tmp_path, capsys):
    rows, table = tmp_path / "rows.jsonl", tmp_path / "quality.md"
    for row in _rows("lora", 0.5):
        append_row(rows, row)
    assert main(["--table-only", "--out", str(rows), "--table-file", str(table), "--costs-out", str(tmp_path / "none")]) == 0
    assert table.read_text() == quality_table(_rows("lora", 0.5))
    assert str(table) in capsys.readouterr().out


def test_command_refuses_what_it_does_not_know(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--methods", "lora,magic"])
    assert "unknown method magic" in capsys.readouterr().err
    assert main(["--model", str(tmp_path), "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "error: " in capsys.readouterr().err
    with pytest.raises(RecipeError, match="rank"):
        settings_text({"rank": 0})


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
    painter = PocketunePainter("m", {"steps": 7}, tmp_path)
    subject = pocket_subjects(1)[0]
    for name, seed in (("lora", 0), ("skip50", 0), ("skip50-no-residuals", 0), ("skip50", 0), ("skip50", 1)):
        painter.paint(METHODS[name], subject, subject.prompts, seed)
    assert [asked[:2] for asked in trained] == [("none", True), ("auto", True), ("auto", False), ("auto", True)]
    assert [asked[2:] for asked in trained] == [(7, 0, 4, False)] * 3 + [(7, 1, 4, False)]
    assert len(set(loras)) == 4
    assert loras[1] == loras[3] == tmp_path / "skip50" / "toy00-0" / "lora" / "pytorch_lora_weights.safetensors"


PROMPTS = """Classes

subject_name,class
can,can
bear_plushie,stuffed animal
dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def test_dreambooth_data_is_read_as_published(tmp_path):
    (tmp_path / "prompts_and_classes.txt").write_text(PROMPTS)
    for name in ("bear_plushie", "dog"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("RGB", (40, 30), (index * 100, 0, 0)).save(tmp_path / name / f"0{index}.jpg")
    bear, dog = dreambooth_subjects(tmp_path)
    assert (bear.name, bear.class_noun, len(bear.photos)) == ("bear_plushie", "stuffed animal", 2)
    assert [prompt.text for prompt in bear.prompts] == ["a sks stuffed animal in the jungle", "a red sks stuffed animal"]
    assert [prompt.text for prompt in dog.prompts] == ["a sks dog wearing a red hat"]
    assert dog.instance_prompt == "a photo of sks dog"


def test_dreambooth_data_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileFormatError, match="prompts_and_classes"):
        dreambooth_subjects(tmp_path)
    (tmp_path / "prompts_and_classes.txt").write_text("nothing")
    with pytest.raises(FileFormatError, match="missing"):
        dreambooth_subjects(tmp_path)
    (tmp_path / "prompts_and_classes.txt").write_text(PROMPTS)
    with pytest.raises(FileFormatError, match="no folder"):
        dreambooth_subjects(tmp_path)


def _images(count):
    rng = np.random.default_rng(4)
    return [Image.fromarray(rng.integers(256, size=(50, 40, 3), dtype=np.uint8)) for _ in range(count)]


def test_clip_judges_with_any_clip_folder(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = new_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {"max_position_embeddings": 20, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    with torch.random.fork_rng():
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    clip = open_embedder("clip", str(tmp_path))
    assert isinstance(clip, Clip)
    images = _images(18)
    vectors = clip.embed(images)
    assert vectors.shape == (18, 8)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(18))
    prompts = [AskedPrompt("a photo of sks cat on grass"), AskedPrompt("a photo of sks toy at night")]
    scores = clip.fidelity(images[:2], prompts)
    # CLIP's own forward is the reference for image and text together.
    tokens = tokenizer(["a photo of cat on grass", "a photo of toy at night"], padding=True, return_tensors="pt")
    pixels = processor(images=images[:2], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    expected = (outputs.logits_per_image / model.logit_scale.exp()).diagonal()
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)


def test_dino_embeds_with_any_vision_transformer_folder(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    with torch.random.fork_rng():
        model = ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    images = _images(3)
    with torch.no_grad():
        tokens = model(**processor(images=images, return_tensors="pt")).last_hidden_state
    expected = torch.nn.functional.normalize(tokens[:, 0], dim=1)
    torch.testing.assert_close(DinoEmbedder(str(tmp_path)).embed(images), expected)


def test_a_missing_judge_is_said(tmp_path):
    with pytest.raises(ModelError, match="cannot load the judge"):
        open_embedder("dino", str(tmp_path / "none"))


def test_every_method_is_a_valid_recipe() -> None:
    for method in METHODS.values():
        Recipe.create(instance_prompt="a photo of sks toy", **POCKET_RECIPE, **method.changes)
