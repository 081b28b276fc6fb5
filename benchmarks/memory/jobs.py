"""The jobs of the memory benchmark: a published model, a size, and how memory is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LOW: dict[str, Any] = {"weights": "streamed", "activations": "on_disk", "optimizer_in_backward": True}
"""As little memory as there is a setting for."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training whose peak is measured.

    Attributes:
        title: as the table says it.
        model: a published configuration.
        resolution: side of the training images in pixels.
        text_tokens: of a prompt.
        skip: blocks, as a recipe names them.
        settings: further fields of the recipe.
        whole: run all phases of a personalization, not training alone.
        compared: what others need for it, and where that figure comes from.
    """

    title: str
    model: str
    resolution: int
    text_tokens: int
    skip: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    compared: str = ""


_FLUX_ATTENTION = (
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
_SD35: dict[str, Any] = {"model": "sd35-medium", "text_tokens": 333}
_SD15: dict[str, Any] = {"model": "sd15", "text_tokens": 77, "resolution": 512}
_FLUX: dict[str, Any] = {"model": "flux1-dev", "text_tokens": 512, "resolution": 256}

JOBS: dict[str, Job] = {
    "sd35-512": Job(
        title="SD3.5-medium, 512 px, all blocks",
        resolution=512,
        settings=LOW,
        compared="peft with gradient checkpointing: 6188 MB",
        **_SD35,
    ),
    "sd35-256-half": Job(
        title="SD3.5-medium, 256 px, 12 of 24 blocks skipped", resolution=256, skip="0-7,20-23", settings=LOW, **_SD35
    ),
    "sd35-512-exact": Job(
        title="SD3.5-medium, 512 px, all blocks, gradients clipped together",
        resolution=512,
        settings=LOW | {"optimizer_in_backward": False},
        **_SD35,
    ),
    "sd35-512-ram": Job(
        title="SD3.5-medium, 512 px, all blocks, activations in memory",
        resolution=512,
        settings=LOW | {"activations": "recomputed"},
        **_SD35,
    ),
    "sd35-256-half-resident": Job(
        title="SD3.5-medium, 256 px, 12 of 24 blocks skipped, weights in memory",
        resolution=256,
        skip="0-7,20-23",
        settings={"activations": "recomputed"},
        **_SD35,
    ),
    "sd35-256-half-whole": Job(
        title="SD3.5-medium with T5-XXL, 256 px, 12 of 24 blocks skipped, whole job",
        resolution=256,
        skip="0-7,20-23",
        settings=LOW | {"vae_tile": 256},
        whole=True,
        **_SD35,
    ),
    "flux-256": Job(
        title="FLUX.1, 256 px, all 57 blocks",
        settings=LOW | {"lora_targets": _FLUX_ATTENTION},
        compared="LoRA at 512 px, GPU: 35.99 GiB",
        **_FLUX,
    ),
    "flux-256-skip": Job(
        title="FLUX.1, 256 px, first 19 and last 10 blocks skipped",
        skip="0-18,47-56",
        settings=LOW | {"lora_targets": _FLUX_ATTENTION},
        compared="DiT-BlockSkip, GPU: 10.42 GiB",
        **_FLUX,
    ),
    "sd15-512": Job(
        title="SD1.5, 512 px, all layers",
        model="sd15",
        text_tokens=77,
        resolution=512,
        settings=LOW,
        compared="SimpleTuner, GPU: 1.98 GiB",
    ),
    "sd15-512-tuneqdm8": Job(
        title="SD1.5, 512 px, TuneQDM over 8-bit weights in memory",
        settings={"method": "scales", "weight_bits": 8, "activations": "recomputed"},
        compared="the released code, GPU: 8.96 GB",
        **_SD15,
    ),
    "sd15-512-tuneqdm4": Job(
        title="SD1.5, 512 px, TuneQDM over 4-bit weights in memory",
        settings={"method": "scales", "weight_bits": 4, "activations": "recomputed"},
        **_SD15,
    ),
    "sd15-512-zo8": Job(
        title="SD1.5, 512 px, LoRA by zeroth order over 8-bit weights in memory",
        settings={"gradient": "zeroth_order", "weight_bits": 8},
        compared="ZOODiP, one word, GPU: 2.37 GB",
        **_SD15,
    ),
    "sd35-512-tuneqdm8": Job(
        title="SD3.5-medium, 512 px, TuneQDM over 8-bit weights in memory",
        resolution=512,
        settings={"method": "scales", "weight_bits": 8, "activations": "recomputed"},
        **_SD35,
    ),
    "sd35-512-zo": Job(
        title="SD3.5-medium, 512 px, LoRA by zeroth order, weights streamed",
        resolution=512,
        settings={"gradient": "zeroth_order", "weights": "streamed"},
        **_SD35,
    ),
    "sdxl-1024": Job(
        title="SDXL, 1024 px, all layers",
        model="sdxl",
        text_tokens=77,
        resolution=1024,
        settings=LOW,
        compared="SimpleTuner, GPU: 6.5 GiB",
    ),
}
