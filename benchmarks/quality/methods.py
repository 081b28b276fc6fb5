"""The ways to personalize that are compared, each a change to one base recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pocketune.recipe import Recipe

POCKET_RECIPE: dict[str, Any] = {
    "steps": 300,
    "learning_rate": 4e-3,
    "scale_learning_rate": 4e-2,
    "scale_in_learning_rate": 1e-2,
    "rank": 8,
    "sample_steps": 28,
    "guidance_scale": 4.0,
}
"""What differs from the defaults of `Recipe`: the built-in model is small, and was trained with a larger learning rate too.

The rates of scales are the best of those tried on three subjects; at lower ones they learn less.
"""
POCKET_RECIPES = {
    "pocket-sd3": POCKET_RECIPE,
    "pocket-sd15": POCKET_RECIPE
    | {"steps": 600, "learning_rate": 2e-3, "scale_learning_rate": 1e-2, "scale_in_learning_rate": 2.5e-3},
}
"""Of each built-in model; the U-Net learns shapes more slowly, and forgets what prompts mean at higher rates."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A named way: `source` is "model" (untrained), "lora" (trained with `changes` to the recipe) or "renderer".

    `longer` multiplies the recipe's steps.
    """

    name: str
    label: str
    source: str
    changes: dict[str, Any] = field(default_factory=dict)
    longer: float = 1.0

    def changed(self, base: dict[str, Any]) -> dict[str, Any]:
        """A recipe with what the method changes, less what then has no effect."""
        steps = base.get("steps", Recipe.model_fields["steps"].default)
        longer = {} if self.longer == 1 else {"steps": round(self.longer * steps)}
        return Recipe.relevant(base | self.changes | longer)

    def changes_text(self, base: dict[str, Any]) -> str:
        """What a recipe has otherwise with this method."""
        before = Recipe.relevant(base)
        return fields_text({name: value for name, value in self.changed(base).items() if before.get(name) != value})


def fields_text(fields: dict[str, Any]) -> str:
    """Fields of a recipe on one line, in the order of their names; equal fields give equal text."""
    return ", ".join(f"{name} {value}" for name, value in sorted(fields.items()))


def _lora(name: str, label: str, *, longer: float = 1.0, **changes: Any) -> Method:
    return Method(name=name, label=label, source="lora", changes=changes, longer=longer)


def _patches(name: str, label: str, patches: str = "dynamic", *, longer: float = 1.0, **changes: Any) -> Method:
    # Of 128 pixels; half of them are four tokens a side, from which half of the blocks alone hardly learn a subject.
    return _lora(name, label, longer=longer, patches=patches, patch_min=96, **changes)


def _scales(name: str, label: str, bits: int, *, intervals: int, inputs: bool) -> Method:
    changes = {"method": "scales", "weight_bits": bits, "scale_intervals": intervals, "scale_inputs": inputs}
    return Method(name=name, label=label, source="lora", changes=changes)


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
OVERVIEW = (
    *("none", "lora", "patches", "skip50", "skip50-patches", "skip50-patches-longer"),
    *("hollow30", "bp-low-zo-high", "tuneqdm8-1", "renders"),
)
"""One row or two of each line of research."""
