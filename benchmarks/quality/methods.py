"""The ways to personalize that are compared, each a change to one base recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from benchmarks.quality.subjects import AskedPrompt, BoothSubject, asked_scene
from pocketune.pocket.draw import render
from pocketune.recipe import Recipe

POCKET_RECIPE: dict[str, Any] = {"steps": 300, "learning_rate": 4e-3, "rank": 8, "sample_steps": 28, "guidance_scale": 4.0}
"""What differs from the defaults of `Recipe`: the embedded model is small, and was trained with a larger learning rate too."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A named way: `source` is "model" (untrained), "lora" (trained with `changes` to the recipe) or "renderer"."""

    name: str
    label: str
    source: str
    changes: dict[str, Any] = field(default_factory=dict)


def _scales(name: str, label: str, bits: int, **changes: Any) -> Method:
    return Method(name=name, label=label, source="lora", changes={"method": "scales", "weight_bits": bits} | changes)


BY_SCHEDULE = (
    Method(
        name="bp-low",
        label="BP-low: backpropagation at half the resolution",
        source="lora",
        changes={"gradient": "mixed", "mix_largest": 0.0},
    ),
    Method(name="zo", label="zeroth order from scratch (MeZO)", source="lora", changes={"gradient": "zeroth_order"}),
    Method(name="bp-low-zo-high", label="BP-low, then ZO-high by schedule", source="lora", changes={"gradient": "mixed"}),
)
"""Rows of selective optimization."""
PACKED = tuple(
    method
    for bits in (8, 4)
    for method in (
        Method(name=f"qlora{bits}", label=f"QLoRA, {bits} bit", source="lora", changes={"weight_bits": bits}),
        _scales(f"peqa{bits}", f"PEQA, {bits} bit", bits, scale_inputs=False, scale_intervals=1),
        *(
            _scales(f"tuneqdm{bits}-{count}", f"TuneQDM, {bits} bit, intervals: {count}", bits, scale_intervals=count)
            for count in (1, 2, 4)
        ),
    )
)
"""Rows of TuneQDM: LoRA and scales over the same packed weights."""
ZOODIP = Method(
    name="zoodip",
    label="ZOODiP: one word, zeroth order, 8 bit",
    source="lora",
    changes={
        "method": "token",
        "weight_bits": 8,
        "gradient": "zeroth_order",
        "zo_optimizer": "adam",
        "zo_two_sided": False,
        "zo_queries": 2,
        "zo_epsilon": 1e-3,
        "zo_learning_rate": 5e-3,
        "subspace_steps": 128,
        "timestep_low": 500,
        "timestep_high": 900,
    },
)
"""With the paper's values; its 30,000 steps are many times the benchmark's, which `--steps` sets."""


METHODS = {
    method.name: method
    for method in (
        Method(name="none", label="no training", source="model"),
        Method(name="lora", label="full LoRA", source="lora"),
        Method(name="skip50", label="half the blocks skipped, cached residuals", source="lora", changes={"skip": "auto"}),
        Method(
            name="skip50-no-residuals",
            label="half the blocks skipped, no residuals",
            source="lora",
            changes={"skip": "auto", "use_residuals": False},
        ),
        Method(name="hollow30", label="Hollowed Net, 30 % of the blocks", source="lora", changes={"skip": "hollow:0.3"}),
        Method(name="hollow50", label="Hollowed Net, 50 % of the blocks", source="lora", changes={"skip": "hollow:0.5"}),
        *BY_SCHEDULE,
        *PACKED,
        ZOODIP,
        Method(name="renders", label="the renderer itself (upper bound)", source="renderer"),
    )
}
DEFAULT_METHODS = ("none", "lora", "skip50", "skip50-no-residuals", "renders")


class Painter(Protocol):
    """Makes images of a subject by one method."""

    def paint(self, method: Method, subject: BoothSubject, prompts: Sequence[AskedPrompt], seed: int) -> list[Image.Image]:
        """One image a prompt."""


class PocketunePainter:
    """Trains with `pocketune.personalize`, each subject and method once, and samples with `pocketune.sample.generate`."""

    def __init__(self, model: str, recipe: dict[str, Any], work: Path) -> None:
        """Name the model, the recipe's changes from the defaults, and the folder for photos and runs."""
        self._model, self._recipe, self._work = model, recipe, work
        self._untrained: dict[tuple[tuple[str, ...], int], list[Image.Image]] = {}

    def paint(self, method: Method, subject: BoothSubject, prompts: Sequence[AskedPrompt], seed: int) -> list[Image.Image]:
        """One image a prompt, image i from seed `seed` * 1000 + i."""
        if method.source == "renderer":
            if subject.toy is None:
                return []
            return [render(asked_scene(subject.toy, prompt, seed * 1000 + i)) for i, prompt in enumerate(prompts)]
        texts = tuple(prompt.text for prompt in prompts)
        if method.source == "lora":
            return self._generate(texts, seed, self._trained(method, subject))
        # Without training nothing depends on the subject but the prompts, which rendered subjects share.
        if (texts, seed) not in self._untrained:
            self._untrained[texts, seed] = self._generate(texts, seed, None)
        return self._untrained[texts, seed]

    def _generate(self, texts: Sequence[str], seed: int, lora: Path | None) -> list[Image.Image]:
        from pocketune.sample import generate

        defaults = Recipe.create(instance_prompt="a photo", **self._recipe)
        return generate(
            self._model,
            list(texts),
            lora=lora,
            seeds=[seed * 1000 + index for index in range(len(texts))],
            steps=defaults.sample_steps,
            guidance=defaults.guidance_scale,
        )

    def _trained(self, method: Method, subject: BoothSubject) -> Path:
        import pocketune
        from pocketune import tuning

        run = self._work / method.name / subject.name
        weights = run / tuning.METHODS[method.changes.get("method", "lora")].result
        if (run / "run.json").exists() and weights.exists():
            return weights
        values = {"instance_prompt": subject.instance_prompt, "sample_prompts": (subject.instance_prompt,)}
        recipe = Recipe.create(**values, **self._recipe, **method.changes)
        pocketune.personalize(self._photos(subject), model=self._model, recipe=recipe, out=run, resume=run.exists())
        return weights

    def _photos(self, subject: BoothSubject) -> list[Path]:
        folder = self._work / "photos" / subject.name
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{index}.png" for index in range(len(subject.photos))]
        for path, photo in zip(paths, subject.photos, strict=True):
            photo.save(path)
        return paths
