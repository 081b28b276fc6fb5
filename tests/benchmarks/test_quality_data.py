"""Subjects, prompts and judges of PocketBooth and of the DreamBooth data set."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality.embedders import Clip, PocketEmbedder, PocketPromptJudge, open_embedder
from benchmarks.quality.measure import subject_similarity
from benchmarks.quality.subjects import AskedPrompt, asked_scene, dreambooth_subjects, pocket_subjects
from pocketune.embedders import DinoEmbedder
from pocketune.errors import FileFormatError, ModelError
from pocketune.pocket.draw import render
from pocketune.pocket.judges import RESERVED_TOYS
from pocketune.pocket.scenes import toy_identity
from pocketune.pocket.text import new_tokenizer


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
