"""The shipped judges: right on renders they never saw, indifferent to what they should be, and always the same."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import ImageFilter
from safetensors.torch import load_file

from pocketune.errors import FileFormatError
from pocketune.pocket.draw import render
from pocketune.pocket.judge_data import colour_twin, gaussian_blur, render_pool, scene_labels, soften
from pocketune.pocket.judge_measures import area_under_curve, measure_classifier, measure_embedder
from pocketune.pocket.judges import (
    HEADS,
    RESERVED_TOYS,
    WEIGHTS,
    held_out_measurements,
    load_attribute_classifier,
    load_subject_embedder,
    to_pixels,
)
from pocketune.pocket.runs import StageRun
from pocketune.pocket.scenes import CLASSES, TOY, Scene, random_scene, toy_identity
from pocketune.pocket.train_judges import contrastive_loss, train_judges

torch.set_num_threads(1)


def _scenes(count: int, **given: str) -> list[Scene]:
    rng = np.random.default_rng([RESERVED_TOYS, 99])
    return [random_scene(rng, pair_probability=0.0, **given) for _ in range(count)]


@pytest.fixture(scope="module")
def classifier():
    return load_attribute_classifier()


@pytest.fixture(scope="module")
def embedder():
    return load_subject_embedder()


def test_shipped_measurements_keep_the_promise():
    held_out = held_out_measurements()["held_out"]
    sharp = held_out["attributes"]["sharp"]
    assert min(sharp[name] for name in ("noun", "colour", "background")) >= 0.97
    assert min(sharp.values()) >= 0.95
    assert held_out["subjects"]["sharp"]["auc"] >= 0.98
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 1.5e6


def test_classifier_is_right_on_held_out_renders(classifier):
    for kind, shares in measure_classifier(classifier, count=120).items():
        # Of 120 renders: three faults more than the 97 % that is promised, for chance.
        assert all(share >= 0.94 for share in shares.values()), (kind, shares)


def test_classifier_reads_images_of_any_size_and_mode(classifier):
    scene = _scenes(1, noun="car", colour="red", background="grass")[0]
    for size in (64, 128, 192, 256):
        seen = classifier.classify([render(scene, size=size).convert("RGBA")])[0]
        assert (seen["noun"], seen["colour"], seen["background"]) == ("car", "red", "grass")


def test_classifier_reads_blurred_images(classifier):
    scenes = _scenes(60)
    soft = [render(scene).filter(ImageFilter.GaussianBlur(1.5)) for scene in scenes]
    right = [seen["noun"] == scene.subjects[0].noun for seen, scene in zip(classifier.classify(soft), scenes, strict=True)]
    assert np.mean(right) >= 0.93


def test_a_toy_has_no_colour(classifier):
    rows = classifier.classify([render(scene) for scene in [*_scenes(4, noun=TOY), *_scenes(4, noun="boat")]])
    assert [row["colour"] is None for row in rows] == [row["noun"] == TOY for row in rows]
    assert {row["noun"] for row in rows} == {TOY, "boat"}


def test_embedder_tells_held_out_subjects_apart(embedder):
    for figures in measure_embedder(embedder, subjects=20).values():
        assert figures["auc"] >= 0.98
        assert figures["auc_same_shape"] >= 0.9
        assert figures["auc_same_colours"] >= 0.8
        assert figures["cosine_same"] > figures["cosine_different"] + 0.4


def test_embeddings_are_unit_vectors_and_ignore_the_background(embedder):
    toy = toy_identity(RESERVED_TOYS + 5)
    rng = np.random.default_rng(7)
    grass, night = (render(random_scene(rng, toy=toy, background=name)) for name in ("grass", "night"))
    other = render(random_scene(rng, toy=toy_identity(RESERVED_TOYS + 6), background="grass"))
    vectors = embedder.embed([grass, night, other])
    assert vectors.shape == (3, 64)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_judging_is_deterministic_and_leaves_the_random_state_alone():
    images = [render(scene) for scene in _scenes(3)]
    before = torch.get_rng_state()
    first, second = load_subject_embedder().embed(images), load_subject_embedder().embed(images)
    assert torch.equal(first, second)
    assert load_attribute_classifier().classify(images) == load_attribute_classifier().classify(images)
    assert torch.equal(before, torch.get_rng_state())


def test_no_image_is_no_work(classifier, embedder):
    assert classifier.classify([]) == []
    assert embedder.embed([]).shape == (0, 64)


def test_pixels_of_a_full_size_render_are_averaged_two_by_two():
    image = render(_scenes(1)[0])
    averaged = np.asarray(image, dtype=np.float64).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    pixels = (to_pixels([image])[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(pixels - averaged).max() <= 1.01  # Pillow rounds its filter weights and the result to whole levels


def test_area_under_curve_is_a_rank_statistic():
    assert area_under_curve(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert area_under_curve(torch.tensor([0.0]), torch.tensor([1.0])) == 0.0
    assert area_under_curve(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    assert area_under_curve(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])) == 0.75


def test_labels_say_what_the_scene_holds():
    columns = scene_labels(_scenes(50))
    for index, scene in enumerate(_scenes(50)):
        subject = scene.subjects[0]
        assert HEADS["noun"][columns["noun"][index]] == subject.noun
        assert HEADS["place"][columns["place"][index]] == subject.place
        if subject.noun != TOY:
            assert HEADS["colour"][columns["colour"][index]] == subject.colour
            assert HEADS["pattern"][columns["pattern"][index]] == subject.pattern
    assert set(columns["colour"]) <= {-100, *range(10)}


def test_pool_holds_families_of_twins_and_is_seeded():
    pool = render_pool(families=2, seed=3)
    again = render_pool(families=2, seed=3)
    assert torch.equal(pool.pixels, again.pixels)
    assert pool.pixels.shape == (48, 3, 64, 64)
    assert not torch.equal(pool.pixels, render_pool(families=2, seed=4).pixels)
    assert pool.subjects.unique(return_counts=True)[1].tolist() == [4] * 12
    named = torch.tensor([HEADS["noun"][index] in CLASSES for index in pool.labels["noun"].tolist()])
    assert torch.equal(named, pool.subjects < 0)
    first, second = toy_identity(1), toy_identity(2)
    twin = colour_twin(second, first)
    assert (twin.main_rgb, twin.body, twin.ears) == (first.main_rgb, second.body, second.ears)


def test_softening_is_seeded_and_slight():
    pixels = to_pixels([render(scene) for scene in _scenes(8)])
    soft = soften(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(soft, soften(pixels, torch.Generator().manual_seed(1)))
    assert not torch.equal(soft, soften(pixels, torch.Generator().manual_seed(2)))
    assert (soft - pixels).abs().mean() < 0.25
    flat = torch.full((1, 3, 64, 64), 0.3)
    torch.testing.assert_close(gaussian_blur(flat, sigma=0.8), flat)


def test_contrastive_loss_prefers_neighbours_of_the_same_subject():
    near = torch.eye(64)[:2].repeat_interleave(2, dim=0)
    subjects = torch.tensor([0, 0, 1, 1])
    good, bad = contrastive_loss(near, subjects), contrastive_loss(near, torch.tensor([0, 1, 0, 1]))
    assert good < 0.01
    assert bad > 9


def test_training_goes_on_bit_for_bit_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("pocketune.pocket.train_judges.measure_judges", lambda folder: {})
    monkeypatch.setattr("pocketune.pocket.train_judges.StageRun", partial(StageRun, save_every_s=0.0))

    def train(out):
        train_judges(out, families=12, small_families=1, steps=2, embedder_steps=2, small_steps=2, seed=5)
        return [load_file(out / name) for name in ("attributes.safetensors", "subjects.safetensors")]

    calls = 0

    def stopping_soften(pixels, generator):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return soften(pixels, generator)

    with monkeypatch.context() as patch:
        patch.setattr("pocketune.pocket.train_judges.soften", stopping_soften)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped")
    for resumed, whole in zip(train(tmp_path / "stopped"), train(tmp_path / "whole"), strict=True):
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_damaged_weights_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"judges\.json"):
        load_attribute_classifier(tmp_path)
    (tmp_path / "judges.json").write_text("[]")
    with pytest.raises(FileFormatError, match="JSON object"):
        load_attribute_classifier(tmp_path)
    (tmp_path / "judges.json").write_text(json.dumps({"heads": {"noun": ["cat"]}}))
    with pytest.raises(FileFormatError, match="attributes"):
        load_attribute_classifier(tmp_path)
    (tmp_path / "subjects.safetensors").write_bytes((WEIGHTS / "subjects.safetensors").read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="SubjectEmbedder"):
        load_subject_embedder(tmp_path)
