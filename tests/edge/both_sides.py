"""What tests of whole runs share: to stop one, to compare results, to sample on the device from a given noise."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

from pocketune import Progress
from pocketune_edge.bundle import open_bundle
from pocketune_edge.delta import load_result
from pocketune_edge.denoiser import Denoiser
from pocketune_edge.sample import decode, denoise, to_image
from pocketune_edge.session import Sessions
from pocketune_edge.text import encode_prompts, negative_prompt
from tests.tolerances import EDGE_IMAGE_LEVELS

LORA = Path("lora") / "pytorch_lora_weights.safetensors"


def stop_at(step: int) -> Any:
    def watch(event: Progress) -> None:
        if event.phase == "training" and event.done == step:
            signal.raise_signal(signal.SIGINT)

    return watch


def largest_difference(first: Path, second: Path, result: Path = LORA) -> float:
    ours, theirs = load_file(first / result), load_file(second / result)
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def sample_on_device(bundle: Path, run: Path, prompts: Sequence[str], noise: torch.Tensor) -> list[Image.Image]:
    """Three steps at guidance 5 with the LoRA of a run; noise: one latent a prompt."""
    opened = open_bundle(bundle)
    sessions = Sessions(opened, keep=False, threads=1)
    encoded = encode_prompts(sessions, [*prompts, ""])
    latents = denoise(
        Denoiser(sessions),
        [noise[number : number + 1].numpy() for number in range(len(prompts))],
        [encoded[prompt] for prompt in prompts],
        negative_prompt(opened.manifest, encoded[""]),
        steps=3,
        guidance=5.0,
        parameters=load_result(opened, run).flat,
        on_step=lambda _: None,
    )
    return [to_image(pixels) for pixels in decode(sessions, latents)]


def assert_alike(found: Sequence[Image.Image], expected: Sequence[Image.Image]) -> None:
    for image, wanted in zip(found, expected, strict=True):
        difference = np.abs(np.asarray(image, np.int16) - np.asarray(wanted, np.int16))
        assert difference.max() <= EDGE_IMAGE_LEVELS
