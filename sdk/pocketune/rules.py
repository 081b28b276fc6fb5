"""Which settings of a recipe fit together: those without effect beside the rest, and those that contradict each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Values = Mapping[str, Any]
"""Settings by the names of a recipe's fields, all of them."""

_BY_BACKPROP = ("backprop", "mixed")
_MATTERS: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("use_residuals", "skip", ()),
    ("cache_", "skip", ()),
    ("cache_", "use_residuals", (True,)),
    ("zo_", "gradient", ("zeroth_order", "mixed")),
    ("zo_", "mix_largest", ()),
    ("mix_", "gradient", ("mixed",)),
    ("mix_start", "mix_largest", ()),
    ("mix_end", "mix_largest", ()),
    ("mix_width", "mix_largest", ()),
    ("low_resolution", "gradient", ("mixed",)),
    ("learning_rate", "gradient", _BY_BACKPROP),
    ("learning_rate", "method", ("lora", "token")),
    ("weight_decay", "method", ("lora", "token")),
    ("weight_decay", "zo_optimizer", ("descent",)),
    ("max_grad_norm", "gradient", _BY_BACKPROP),
    ("rank", "method", ("lora",)),
    ("lora_targets", "method", ("lora",)),
    ("scale_", "method", ("scales",)),
    ("scale_learning_rate", "gradient", _BY_BACKPROP),
    ("scale_in_learning_rate", "gradient", _BY_BACKPROP),
    ("scale_in_learning_rate", "scale_inputs", (True,)),
    ("token", "method", ("token",)),
    ("subspace_", "method", ("token",)),
    ("subspace_", "gradient", ("zeroth_order",)),
    ("subspace_noise", "subspace_steps", ()),
    ("quantizer", "weight_bits", (4, 8)),
    ("class_images", "class_prompt", ()),
    ("prior_loss_weight", "class_prompt", ()),
    ("logit_", "weighting_scheme", ("logit_normal",)),
    ("mode_scale", "weighting_scheme", ("mode",)),
)
"""Fields by the beginning of their names, the setting that they depend on, and its values with which they have an effect; none
named: any that is not off (`_is_off`). A setting without effect decides nothing."""
_OFF = (None, 0, "none")
_NO_SHARE = re.compile(r"(auto|hollow|first|last):(0(\.0+)?|\.0+)")
_RATES = {"learning_rate": "Zeroth-order steps have zo_learning_rate, scales have scale_learning_rate."}


def contradictions(given: Values, defaults: Values) -> Iterator[str]:
    """Why settings do not fit together, whatever the model: each reason is a sentence and what to do.

    A setting without effect is one of them, as it would mean that something else was wanted.
    """
    cached = skips_blocks(given["skip"]) and given["use_residuals"]
    of_packed = given["method"] == "scales" or given["quantizer"] != "minmax"
    low, high = given["timestep_low"], given["timestep_high"]
    wrong: tuple[tuple[object, str], ...] = (
        (
            given["patches"] == "none" and (given["patch_min"] or given["patch_max"]),
            'patch_min and patch_max are sizes of patches, and there are none. Set patches = "dynamic", or leave them out.',
        ),
        (
            given["patches"] == "resize" and given["patch_max"],
            'patches = "resize" takes whole photos, which have no largest patch. Leave patch_max out.',
        ),
        (
            given["positions"] is not None and given["patches"] == "none" and given["gradient"] != "mixed",
            "positions are those of smaller images than the canvas, and there are none. Set patches, or leave it out.",
        ),
        (
            given["refresh_every"] and not cached and given["draws"] is None and given["patches"] in ("none", "resize"),
            "refresh_every renews a pool, and there is none: no features are stored and every sample is its own draw. Skip "
            "blocks with residuals, set draws, or leave it out.",
        ),
        (
            given["gradient"] == "zeroth_order" and given["activations"] != "kept",
            "activations are kept for backward, and zeroth order has none. Leave activations out.",
        ),
        (
            given["method"] == "token" and skips_blocks(given["skip"]),
            "features of skipped blocks hold for one prompt, and the prompt is what trains with a token. Leave skip out.",
        ),
        (
            given["method"] == "token" and given["token"] not in given["instance_prompt"].split(),
            f'the word "{given["token"]}" is not in "{given["instance_prompt"]}". Name a word of the prompt as token.',
        ),
        (
            given["optimizer_in_backward"] and given["activations"] == "kept",
            "optimizer_in_backward updates a block before the rest of backward, so blocks must be run again in backward. "
            'Set activations = "recomputed" or "on_disk".',
        ),
    )
    yield from (reason for is_wrong, reason in wrong if is_wrong)
    without = (without_effect(given, name) for name in given if given[name] != defaults[name])
    yield from (reason for reason in without if reason)
    wrong = (
        (
            given["method"] == "scales" and given["weight_bits"] is None,
            'method = "scales" tunes scales of packed weights. Set weight_bits to 8 or 4.',
        ),
        (
            given["zo_optimizer"] == "adam" and given["gradient"] == "mixed",
            'zo_optimizer = "adam" has no moments of its own beside backpropagation\'s. Leave it out, or set gradient.',
        ),
        (
            given["mix_end"] > given["mix_start"],
            f"mix_end {given['mix_end']} is above mix_start {given['mix_start']}, which would make zeroth-order steps rarer as "
            "training goes on. Swap them.",
        ),
        (not low < high, f"timestep_low {low} and timestep_high {high} leave nothing between. Swap them."),
        (
            given["weights"] == "streamed" and of_packed,
            'scales and quantizer are for packed weights in memory. Set weights = "resident", or leave them out.',
        ),
    )
    yield from (reason for is_wrong, reason in wrong if is_wrong)


def without_effect(given: Values, name: str) -> str | None:
    """Because of which other setting one cannot have an effect, as a sentence; None: it can."""
    every = given["refresh_every"]
    if name == "refresh_every" and every is not None and every >= given["steps"]:
        return f"refresh_every has no effect while steps is {given['steps']}. Set more steps, or leave refresh_every out."
    for prefix, setting, wanted in _MATTERS:
        if not name.startswith(prefix) or without_effect(given, setting):
            continue
        value = given[setting]
        if value not in wanted if wanted else _is_off(setting, value):
            change = f"{setting} to {' or '.join(map(str, wanted))}" if wanted else setting
            msg = f"{name} has no effect while {setting} is {value}. Set {change}, or leave {name} out."
            return f"{msg} {_RATES[name]}" if name in _RATES else msg
    return None


def skips_blocks(skip: str) -> bool:
    """Whether a recipe's `skip` leaves any block out: neither "none" nor a share of 0, as "auto:0", does."""
    return skip not in _OFF and _NO_SHARE.fullmatch(skip) is None


def _is_off(setting: str, value: Any) -> bool:
    return not skips_blocks(value) if setting == "skip" else value in _OFF
