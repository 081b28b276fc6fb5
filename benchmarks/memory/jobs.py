"""The jobs of the memory benchmark: a published model, a size, and how memory is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pocketune.models.flux import ATTENTION_TARGETS

LOW: dict[str, Any] = {"weights": "streamed", "activations": "on_disk", "optimizer_in_backward": True}
"""As little memory as there is a setting for."""


_TOLD = ("title", "compared", "bound_mb", "against", "bound_ratio")
"""Fields of a job that do not decide what is measured."""


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
        inference: run the model with its fresh adapter forward, without training, to compare with.
        compared: what others need for it, and where that figure comes from.
        bound_mb: what the peak must not exceed, in MB of 1e6 bytes; None: nothing is promised.
        against: a job whose peak, with the packed weights of this one, this one's is compared with; of a whole job it is the
            peak of its training phase.
        bound_ratio: what the ratio of the two must not exceed.
    """

    title: str
    model: str
    resolution: int
    text_tokens: int
    skip: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    inference: bool = False
    compared: str = ""
    bound_mb: int | None = None
    against: str = ""
    bound_ratio: float | None = None

    @property
    def wants_text(self) -> bool:
        """Whether text encoders are loaded too, so that a whole pipeline is needed."""
        return self.whole or self.settings.get("method") == "token"

    @property
    def asked(self) -> dict[str, Any]:
        """All that decides what is measured."""
        return {name: value for name, value in vars(self).items() if name not in _TOLD}


_RECOMPUTED: dict[str, Any] = LOW | {"activations": "recomputed"}
_PAPER = "DiT-BlockSkip, GPU, as quoted"
_SD35: dict[str, Any] = {"model": "sd35-medium", "text_tokens": 333}
_SD15: dict[str, Any] = {"model": "sd15", "text_tokens": 77, "resolution": 512}
_FLUX: dict[str, Any] = {"model": "flux1-dev", "text_tokens": 512}
_FLUX_LOW: dict[str, Any] = LOW | {"lora_targets": ATTENTION_TARGETS}
_ZOODIP: dict[str, Any] = {
    "method": "token",
    "gradient": "zeroth_order",
    "zo_optimizer": "adam",
    "zo_two_sided": False,
    "zo_queries": 2,
    "subspace_steps": 128,
}
"""What matters to memory of the paper's settings."""

JOBS: dict[str, Job] = {
    "sd35-512": Job(
        title="SD3.5-medium, 512 px, all blocks",
        resolution=512,
        settings=LOW,
        bound_mb=850,
        **_SD35,
    ),
    "sd35-512-half": Job(
        title="SD3.5-medium, 512 px, 12 of 24 blocks skipped", resolution=512, skip="0-7,20-23", settings=LOW, **_SD35
    ),
    "sd35-256": Job(title="SD3.5-medium, 256 px, all blocks", resolution=256, settings=LOW, **_SD35),
    "sd35-256-skip30": Job(
        title="SD3.5-medium, 256 px, 7 of 24 blocks skipped", resolution=256, skip="0-2,20-23", settings=LOW, **_SD35
    ),
    "sd35-256-skip40": Job(
        title="SD3.5-medium, 256 px, 10 of 24 blocks skipped", resolution=256, skip="0-5,20-23", settings=LOW, **_SD35
    ),
    "sd35-256-half": Job(
        title="SD3.5-medium, 256 px, 12 of 24 blocks skipped",
        resolution=256,
        skip="0-7,20-23",
        settings=LOW,
        bound_mb=600,
        **_SD35,
    ),
    "sd35-512-exact": Job(
        title="SD3.5-medium, 512 px, all blocks, gradients clipped together",
        resolution=512,
        settings=LOW | {"optimizer_in_backward": False},
        **_SD35,
    ),
    "sd35-512-ram": Job(
        title="SD3.5-medium, 512 px, all blocks, activations in memory", resolution=512, settings=_RECOMPUTED, **_SD35
    ),
    "sd35-256-half-ram": Job(
        title="SD3.5-medium, 256 px, 12 of 24 blocks skipped, activations in memory",
        resolution=256,
        skip="0-7,20-23",
        settings=_RECOMPUTED,
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
        settings=LOW | {"vae_tile": 128},
        whole=True,
        bound_ratio=1.1,
        **_SD35,
    ),
    "flux-512": Job(
        title="FLUX.1, 512 px, all 57 blocks",
        resolution=512,
        settings=_FLUX_LOW,
        compared=f"{_PAPER}, LoRA: 35.99 GiB",
        **_FLUX,
    ),
    "flux-512-half": Job(
        title="FLUX.1, 512 px, first 19 and last 10 blocks skipped",
        resolution=512,
        skip="0-18,47-56",
        settings=_FLUX_LOW,
        compared=f"{_PAPER}, skip alone: 12.85 GiB",
        **_FLUX,
    ),
    "flux-256": Job(
        title="FLUX.1, 256 px, all 57 blocks",
        resolution=256,
        settings=_FLUX_LOW,
        compared=f"{_PAPER}, patches alone: 30.48 GiB",
        bound_mb=1300,
        **_FLUX,
    ),
    "flux-256-skip30": Job(
        title="FLUX.1, 256 px, first 7 and last 10 blocks skipped",
        resolution=256,
        skip="0-6,47-56",
        settings=_FLUX_LOW,
        compared=f"{_PAPER}: 20.78 GiB",
        **_FLUX,
    ),
    "flux-256-skip40": Job(
        title="FLUX.1, 256 px, first 13 and last 10 blocks skipped",
        resolution=256,
        skip="0-12,47-56",
        settings=_FLUX_LOW,
        **_FLUX,
    ),
    "flux-256-skip": Job(
        title="FLUX.1, 256 px, first 19 and last 10 blocks skipped",
        resolution=256,
        skip="0-18,47-56",
        settings=_FLUX_LOW,
        compared=f"{_PAPER}: 10.42 GiB",
        bound_mb=1000,
        **_FLUX,
    ),
    "sd15-512": Job(
        title="SD1.5, 512 px, all layers",
        settings=LOW,
        compared="SimpleTuner's documentation, GPU: 1.98 GiB",
        bound_mb=800,
        **_SD15,
    ),
    "sd15-512-ram": Job(title="SD1.5, 512 px, all layers, activations in memory", settings=_RECOMPUTED, **_SD15),
    "sd15-512-tuneqdm8": Job(
        title="SD1.5, 512 px, TuneQDM over 8-bit weights in memory",
        settings={"method": "scales", "weight_bits": 8, "activations": "recomputed"},
        compared="the released code, GPU, in ZOODiP's paper: 8.96 GB",
        against="sd15-512-ram",
        bound_ratio=1.15,
        **_SD15,
    ),
    "sd15-512-tuneqdm4": Job(
        title="SD1.5, 512 px, TuneQDM over 4-bit weights in memory",
        settings={"method": "scales", "weight_bits": 4, "activations": "recomputed"},
        against="sd15-512-ram",
        bound_ratio=1.15,
        **_SD15,
    ),
    "sd15-512-zo8": Job(
        title="SD1.5, 512 px, LoRA by zeroth order over 8-bit weights in memory",
        settings={"gradient": "zeroth_order", "weight_bits": 8},
        against="sd15-512-inference8",
        bound_ratio=1.05,
        **_SD15,
    ),
    "sd15-512-zoodip8": Job(
        title="SD1.5 with CLIP, 512 px, ZOODiP: one word by zeroth order over 8-bit weights in memory",
        settings=_ZOODIP | {"weight_bits": 8},
        compared="ZOODiP's paper, GPU: 2.37 GB",
        **_SD15,
    ),
    "sd15-512-zoodip4": Job(
        title="SD1.5 with CLIP, 512 px, ZOODiP over 4-bit weights in memory",
        settings=_ZOODIP | {"weight_bits": 4},
        **_SD15,
    ),
    "sd15-512-zoodip-streamed": Job(
        title="SD1.5 with CLIP, 512 px, ZOODiP over weights as they are, streamed",
        settings=_ZOODIP | {"weights": "streamed"},
        **_SD15,
    ),
    "sd15-512-inference8": Job(
        title="SD1.5, 512 px, inference with a LoRA, 8-bit weights in memory",
        settings={"weight_bits": 8},
        inference=True,
        **_SD15,
    ),
    "sd35-512-tuneqdm8": Job(
        title="SD3.5-medium, 512 px, TuneQDM over 8-bit weights in memory",
        resolution=512,
        settings={"method": "scales", "weight_bits": 8, "activations": "recomputed"},
        against="sd35-512-ram",
        bound_ratio=1.15,
        **_SD35,
    ),
    "sd35-512-zo": Job(
        title="SD3.5-medium, 512 px, LoRA by zeroth order, weights streamed",
        resolution=512,
        settings={"gradient": "zeroth_order", "weights": "streamed"},
        against="sd35-512-inference",
        bound_ratio=1.05,
        **_SD35,
    ),
    "sd35-512-inference": Job(
        title="SD3.5-medium, 512 px, inference with a LoRA, weights streamed",
        resolution=512,
        settings={"weights": "streamed"},
        inference=True,
        **_SD35,
    ),
    "sdxl-1024": Job(
        title="SDXL, 1024 px, all layers",
        model="sdxl",
        text_tokens=77,
        resolution=1024,
        settings=LOW,
        compared="SimpleTuner's documentation, GPU: 6.5 GiB",
        bound_mb=1500,
    ),
}
