"""Held-out prompts: seeded, distinct, and judged by what they ask."""

import numpy as np
import torch

from pocketune.pocket.draw import render
from pocketune.pocket.scenes import BACKGROUNDS, CLASSES, COLOURS, held_out_combinations, random_scene
from pocketune.pocket.steering import measure_steering, steering_prompts, summarize

torch.set_num_threads(1)


class Obedient:
    """Stands in for the pipeline: draws with the renderer what the prompt says, or always a red cat on grass."""

    def __init__(self, *, obeys=True):
        self.obeys = obeys
        self.calls = []

    def __call__(self, *, prompt, generator, height, max_sequence_length=None, **settings):
        self.calls.append((len(prompt), max_sequence_length, settings["num_inference_steps"], settings["guidance_scale"]))
        images = [self._draw(text, source) for text, source in zip(prompt, generator, strict=True)]
        return type("Output", (), {"images": images})

    def _draw(self, text, generator):
        rng = np.random.default_rng(generator.initial_seed())
        words = text.split()
        noun = next(word for word in words if word in CLASSES) if self.obeys else "cat"
        colour = next(word for word in words if word in COLOURS) if self.obeys else "red"
        background = next(name for name, phrase in BACKGROUNDS.items() if text.endswith(phrase)) if self.obeys else "grass"
        while True:
            scene = random_scene(rng, noun=noun, colour=colour, background=background)
            if scene.subjects[0].size != "small":
                return render(scene)


def test_prompts_are_seeded_distinct_and_name_everything():
    prompts = steering_prompts(200)
    assert prompts == steering_prompts(200)
    assert prompts != steering_prompts(200, seed=1)
    assert len({prompt.text for prompt in prompts}) == 200
    assert len({prompt.seed for prompt in prompts}) == 200
    for prompt in prompts:
        assert prompt.noun in prompt.text.split()
        assert prompt.colour in prompt.text.split()
        assert prompt.text.endswith(BACKGROUNDS[prompt.background])
        assert (" an orange" in prompt.text) == (prompt.colour == "orange")
    assert len(steering_prompts(1000)) == 1000


def test_all_prompts_are_held_out_of_training():
    held_out = set(held_out_combinations())
    for prompts in (steering_prompts(50), steering_prompts(300, seed=1)):
        assert {(prompt.noun, prompt.colour, prompt.background) for prompt in prompts} <= held_out


def test_an_obedient_model_scores_high_and_a_stubborn_one_low():
    model, seen = Obedient(), []
    rows, summary = measure_steering(
        model, 50, batch_size=20, steps=3, guidance=2.0, text={"max_sequence_length": 0}, on_row=seen.append
    )
    assert model.calls == [(20, 0, 3, 2.0), (20, 0, 3, 2.0), (10, 0, 3, 2.0)]
    assert rows == seen
    assert summary["count"] == 50
    assert summary["all"] >= 0.9
    _, stubborn = measure_steering(Obedient(obeys=False), 50)
    assert stubborn["all"] <= 0.1
    assert stubborn["noun"] <= 0.3


def test_summary_counts_rows():
    right = {"noun": True, "colour": True, "background": True, "all": True}
    rows = [{"right": right}, {"right": {**right, "noun": False, "all": False}}]
    assert summarize(rows) == {"count": 2, "noun": 0.5, "colour": 1.0, "background": 1.0, "all": 0.5}
    assert summarize([]) == {"count": 0}
