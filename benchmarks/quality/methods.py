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
from pocketune.runfolder import RECORD_FILE

POCKET_RECIPE: dict[str, Any] = {"steps": 300, "learning_rate": 4e-3, "rank": 8, "sample_steps": 28, "guidance_scale": 4.0}
"""What differs from the defaults of `Recipe`: the built-in model is small, and was trained with a larger learning rate too."""
POCKET_RECIPES = {"pocket-sd3": POCKET_RECIPE, "pocket-sd15": POCKET_RECIPE | {"steps": 600, "learning_rate": 2e-3}}
"""Of each built-in model; the U-Net learns shapes more slowly, and forgets what prompts mean at 4e-3."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A named way: `source` is "model" (untrained), "lora" (trained with `changes` to the recipe) or "renderer".

    `rates` are learning rates, as multiples of the recipe's own of LoRA, which suits the model; `longer` multiplies its steps.
    """

    name: str
    label: str
    source: str
    changes: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    longer: float = 1.0

    def changed(self, base: dict[str, Any]) -> dict[str, Any]:
        """A recipe with what the method changes; without a learning rate in it, scales keep the defaults of theirs."""
        rates = {name: times * base["learning_rate"] for name, times in self.rates.items() if "learning_rate" in base}
        steps = (
            {} if self.longer == 1 else {"steps": round(self.longer * base.get("steps", Recipe.model_fields["steps"].default))}
        )
        return base | self.changes | rates | steps


def _lora(name: str, label: str, *, longer: float = 1.0, **changes: Any) -> Method:
    return Method(name=name, label=label, source="lora", changes=changes, longer=longer)


def _patches(name: str, label: str, patches: str = "dynamic", *, longer: float = 1.0, **changes: Any) -> Method:
    # Of 128 pixels; half of them are four tokens a side, from which half of the blocks alone hardly learn a subject.
    return _lora(name, label, longer=longer, patches=patches, patch_min=96, **changes)


def _scales(name: str, label: str, bits: int, *, intervals: int, inputs: bool) -> Method:
    changes = {"method": "scales", "weight_bits": bits, "scale_intervals": intervals, "scale_inputs": inputs}
    rates = {"scale_learning_rate": 5.0} | ({"scale_in_learning_rate": 1.25} if inputs else {})
    return Method(name=name, label=label, source="lora", changes=changes, rates=rates)


BY_SCHEDULE = (
    Method(
        name="bp-low",
        label="BP-low: backpropagation at half the resolution",
        source="lora",
        changes={"gradient": "mixed", "mix_largest": 0.0},
    ),
    Method(name="zo", label="zeroth order from scratch (MeZO)", source="lora", changes={"gradient": "zeroth_order"}),
    Method(name="bp-low-zo-high", label="BP-low, then ZO-high by schedule", source="lora", changes={"gradient": "mixed"}),
    Method(
        name="bp-low-own",
        label="BP-low, positions of images of their own",
        source="lora",
        changes={"gradient": "mixed", "mix_largest": 0.0, "positions": "own"},
    ),
    Method(
        name="bp-low-zo-high-own",
        label="BP-low, then ZO-high, positions of images of their own",
        source="lora",
        changes={"gradient": "mixed", "positions": "own"},
    ),
)
"""Rows of selective optimization."""
PACKED = tuple(
    method
    for bits in (8, 4)
    for method in (
        Method(name=f"qlora{bits}", label=f"QLoRA, {bits} bit", source="lora", changes={"weight_bits": bits}),
        _scales(f"peqa{bits}", f"PEQA, {bits} bit", bits, intervals=1, inputs=False),
        *(
            _scales(f"tuneqdm{bits}-{count}", f"TuneQDM, {bits} bit, intervals: {count}", bits, intervals=count, inputs=True)
            for count in (1, 2, 4)
        ),
    )
)
"""Rows of TuneQDM: LoRA and scales over the same packed weights.

With pocket-sd3 the rates of scales lie between those tried on two subjects: 1e-2 learned little, and at 3e-2 prompts were
followed less.
"""
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
        _lora("lora", "full LoRA"),
        _lora("lora-longer", "full LoRA, half as many steps again", longer=1.5),
        _patches("patches", "dynamic patches"),
        _patches("patches-own", "dynamic patches, positions of images of their own", positions="own"),
        _patches("patches-resize", "whole photos at the size of the patches", "resize"),
        _patches("patches-high-to-low", "patches smaller at more noise", "high-to-low"),
        _patches("patches-random", "patches of random size", "random"),
        _lora("skip30", "30 % of the blocks skipped, cached residuals", skip="auto:0.3"),
        _lora("skip40", "40 % of the blocks skipped, cached residuals", skip="auto:0.4"),
        _lora("skip50", "half the blocks skipped, cached residuals", skip="auto"),
        _patches("skip30-patches", "30 % of the blocks skipped, dynamic patches", skip="auto:0.3"),
        _patches("skip40-patches", "40 % of the blocks skipped, dynamic patches", skip="auto:0.4"),
        _patches("skip50-patches", "half the blocks skipped, dynamic patches", skip="auto"),
        _patches(
            "skip50-patches-longer",
            "half the blocks skipped, dynamic patches, half as many steps again",
            skip="auto",
            longer=1.5,
        ),
        _patches(
            "skip50-patches-own",
            "half the blocks skipped, dynamic patches, positions of images of their own",
            skip="auto",
            positions="own",
        ),
        _lora("skip50-no-residuals", "half the blocks skipped, no residuals", skip="auto", use_residuals=False),
        _lora("first50", "the first half of the blocks skipped", skip="first:0.5"),
        _lora("last50", "the last half of the blocks skipped", skip="last:0.5"),
        _lora("hollow30", "Hollowed Net, 30 % of the blocks", skip="hollow:0.3"),
        _lora("hollow50", "Hollowed Net, 50 % of the blocks", skip="hollow:0.5"),
        _patches("hollow50-patches", "Hollowed Net, 50 % of the blocks, dynamic patches", skip="hollow:0.5"),
        *BY_SCHEDULE,
        *PACKED,
        ZOODIP,
        Method(name="renders", label="the renderer itself (upper bound)", source="renderer"),
    )
}
DEFAULT_METHODS = ("none", "lora", "skip50", "skip50-no-residuals", "renders")
COMMON = ("none", "lora", "patches", "renders")
"""What groups share, to compare their own rows with."""
GROUPS = {
    "block-skip": (
        *("none", "lora", "patches", "skip30", "skip40", "skip50", "skip30-patches", "skip40-patches", "skip50-patches"),
        *("lora-longer", "skip50-patches-longer", "patches-own", "skip50-patches-own", "skip50-no-residuals"),
        *("first50", "last50", "renders"),
    ),
    "patch-sizes": ("none", "lora", "patches", "patches-resize", "patches-high-to-low", "patches-random", "renders"),
    "hollowed-net": ("none", "lora", "patches", "hollow30", "hollow50", "hollow50-patches", "renders"),
    "gradients": ("none", "lora", *(method.name for method in BY_SCHEDULE), "renders"),
    "packed": ("none", "lora", *(method.name for method in PACKED), ZOODIP.name, "renders"),
}
"""The rows of the papers: DiT-BlockSkip's tables and ablations, Hollowed Net's, selective optimization's, TuneQDM's."""
OVERVIEW = ("none", "lora", "patches", "skip50", "skip50-no-residuals", "hollow30", "bp-low-zo-high", "tuneqdm8-2", "renders")
"""One row or two of each line of research."""


class Painter(Protocol):
    """Makes images of a subject by one method."""

    def paint(self, method: Method, subject: BoothSubject, prompts: Sequence[AskedPrompt], seed: int) -> list[Image.Image]:
        """One image a prompt."""


class PocketunePainter:
    """Trains with `pocketune.personalize`, each subject, method and seed once, and samples with `pocketune.sample.generate`."""

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
            return self._generate(texts, seed, self._trained(method, subject, seed))
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

    def _trained(self, method: Method, subject: BoothSubject, seed: int) -> Path:
        import pocketune
        from pocketune import tuning

        run = self._work / method.name / f"{subject.name}-{seed}"
        weights = run / tuning.METHODS[method.changes.get("method", "lora")].result
        if (run / RECORD_FILE).exists() and weights.exists():
            return weights
        recipe = method_recipe(method, subject_recipe(subject, self._recipe) | {"seed": seed})
        pocketune.personalize(
            save_photos(subject, self._work / "photos" / subject.name),
            model=self._model,
            recipe=recipe,
            out=run,
            resume=run.exists(),
        )
        return weights


def subject_recipe(subject: BoothSubject, recipe: dict[str, Any]) -> dict[str, Any]:
    """A base recipe for one subject."""
    return {"instance_prompt": subject.instance_prompt, "sample_prompts": (subject.instance_prompt,), **recipe}


def method_recipe(method: Method, base: dict[str, Any]) -> Recipe:
    """A base recipe with a method's changes, less what the method does not take."""
    return Recipe.create(**Recipe.relevant(method.changed(base)))


def save_photos(subject: BoothSubject, folder: Path) -> list[Path]:
    """The subject's photos as files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(len(subject.photos))]
    for path, photo in zip(paths, subject.photos, strict=True):
        photo.save(path)
    return paths
