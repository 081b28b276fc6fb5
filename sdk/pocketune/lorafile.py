"""What a LoRA file holds, told from the names, shapes and values of its tensors, in the three common layouts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from pocketune.plan.blocks import ranges_text
from pocketune.tensorfile import TensorFile

Pairs = dict[str, dict[str, str]]
"""Names of the "down" (rank, in) and "up" (out, rank) tensors of each target."""

_PAIR = re.compile(
    r"^(?P<target>.+?)[._](?:lora_(?P<peft>[AB])(?:\.[^.]+)?|lora_(?P<kohya>down|up)|(?:lora|lora_linear_layer)\.(?P<old>down|up))\.weight$"
)
_BLOCK = re.compile(
    r"(single_transformer_blocks|transformer_blocks|single_blocks|double_blocks|joint_blocks|down_blocks|up_blocks"
    r"|input_blocks|output_blocks|blocks|layers)[._](\d+)(?=[._]|$)"
)
_TEXT_ENCODER = re.compile(r"^(?:text_encoder|lora_te|te)(?:_?(\d))?[._]")
_UNET_BY_CONTEXT = {768: "Stable Diffusion 1.x U-Net", 1024: "Stable Diffusion 2.x U-Net", 2048: "Stable Diffusion XL U-Net"}


def find_pairs(file: TensorFile) -> Pairs:
    """Find the targets of a LoRA by tensor names; empty if the file is something else."""
    pairs: Pairs = {}
    for name in file.tensors:
        match = _PAIR.match(name)
        if match:
            half = "down" if match["peft"] == "A" or "down" in (match["kohya"], match["old"]) else "up"
            pairs.setdefault(match["target"], {})[half] = name
    return pairs


def find_blocks(names: Iterable[str]) -> dict[str, str]:
    """Give the numbers of the blocks that occur in tensor names, by the name of their list: {"transformer_blocks": "0-3,7"}."""
    found: dict[str, set[int]] = {}
    for name in names:
        match = _BLOCK.search(name)
        if match and len(match[2]) < 6:
            found.setdefault(match[1], set()).add(int(match[2]))
    return {group: ranges_text(sorted(indices)) for group, indices in sorted(found.items())}


def describe_lora(file: TensorFile, pairs: Pairs) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the values, one tensor at a time, and describe the adapter.

    Returns:
        JSON-able facts, and notes on what a person should know, worst first.
    """
    statistics = {name: file.statistics(name) for name in file.tensors}
    broken = [name for name, of in statistics.items() if not of.finite]
    whole = {target: halves for target, halves in pairs.items() if len(halves) == 2}
    shapes = {target: (file.tensors[of["down"]].shape, file.tensors[of["up"]].shape) for target, of in whole.items()}
    mismatched = [target for target, (down, up) in shapes.items() if len(down) < 2 or len(up) < 2 or down[0] != up[1]]
    ranks = sorted({down[0] for target, (down, _) in shapes.items() if target not in mismatched})
    zero = [target for target, halves in whole.items() if any(statistics[name].zero for name in halves.values())]
    ups = [statistics[of["up"]].largest for of in whole.values()]
    parts: dict[str, int] = {}
    for target in pairs:
        parts[_part(target)] = parts.get(_part(target), 0) + 1
    denoiser = [target for target in pairs if _part(target) == "denoiser"]
    facts: dict[str, Any] = {
        "layout": "diffusers (peft)" if any("lora_A" in name for name in statistics) else "kohya or older diffusers",
        "architecture": _architecture(denoiser, file, pairs),
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "alpha": _alphas(file),
        "targets": len(pairs),
        "targets_by_part": parts,
        "modules": sorted({_module(target) for target in denoiser}),
        "blocks": find_blocks(denoiser),
        "zero_targets": len(zero),
        "all_zero": 0 < len(whole) == len(zero),
        "largest_up": max((value for value in ups if value is not None), default=None),
    }
    notes = []
    if facts["all_zero"]:
        notes.append("Every target multiplies by zero: this adapter changes nothing.")
    elif zero:
        notes.append(f"{len(zero)} of {len(pairs)} targets multiply by zero and change nothing.")
    if broken:
        notes.append(f"{len(broken)} tensor(s) hold infinity or NaN, the first is {broken[0][:120]!r}: images will be broken.")
    if len(whole) < len(pairs):
        notes.append(f"{len(pairs) - len(whole)} target(s) have only one of the two matrices.")
    if mismatched:
        notes.append(f"{len(mismatched)} target(s) have matrices whose ranks do not match.")
    return facts, tuple(notes)


def _module(target: str) -> str:
    match = _BLOCK.search(target)
    return target[match.end() :].lstrip("._") if match else target


def _part(target: str) -> str:
    match = _TEXT_ENCODER.match(target)
    if match:
        return "text_encoder" if match[1] in (None, "1") else f"text_encoder_{match[1]}"
    return "text_encoder" if target.startswith(("text_model.", "base_model.model.text_model.")) else "denoiser"


def _architecture(denoiser: list[str], file: TensorFile, pairs: Pairs) -> str:
    """Guess from names, and for U-Nets from the width of the text that cross-attention reads."""
    groups = set(find_blocks(denoiser))
    if not denoiser:
        return "text encoder only"
    if groups & {"single_transformer_blocks", "single_blocks", "double_blocks"}:
        return "FLUX"
    if groups & {"down_blocks", "up_blocks", "input_blocks", "output_blocks"} or any("mid_block" in name for name in denoiser):
        widths = {
            file.tensors[pairs[name]["down"]].shape[1]
            for name in denoiser
            if re.search(r"attn2[._]to_[kv]$", name)
            and "down" in pairs[name]
            and len(file.tensors[pairs[name]["down"]].shape) > 1
        }
        return _UNET_BY_CONTEXT.get(min(widths, default=0), "U-Net")
    if groups == {"transformer_blocks"} and any("attn1" in name for name in denoiser):
        return "transformer with cross-attention (PixArt, SANA)"
    if groups and groups <= {"transformer_blocks", "joint_blocks"}:
        return "Stable Diffusion 3 (MMDiT)"
    return "unknown"


def _alphas(file: TensorFile) -> float | list[float] | None:
    values = {file.scalar(name) for name in file.tensors if name.endswith(".alpha")} - {None}
    if not values:
        try:
            stored = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
            values = {float(value) for key, value in stored.items() if key.split(".")[-1] == "lora_alpha"}
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None
    alphas = sorted(value for value in values if value is not None and math.isfinite(value))
    return alphas[0] if len(alphas) == 1 else alphas or None
