"""Measure a built-in model on held-out scenes and write its model card: `python -m pocketune.pocket.card FOLDER`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from pocketune.atomic import write_text
from pocketune.models.load import ModelFolder
from pocketune.pocket.autoencoder import to_unit
from pocketune.pocket.draw import render
from pocketune.pocket.scenes import random_scene
from pocketune.pocket.steering import measure_steering
from pocketune.pocket.train import MODELS
from pocketune.units import readable_size

VAE_SCENES = 64
_STREAM = 37


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, *, size: int, seed: int = 0) -> float:
    """Mean peak signal-to-noise ratio, in dB, of 64 held-out renders of size x size pixels through the VAE."""
    rng = np.random.default_rng([_STREAM, seed])
    ratios = []
    for _ in range(VAE_SCENES // 8):
        pixels = np.stack([np.asarray(render(random_scene(rng), size=size)) for _ in range(8)])
        images = to_unit(torch.from_numpy(pixels)).to(vae.device)
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        errors = (decoded - images).square().flatten(1).mean(1)
        ratios += [10 * math.log10(4.0 / error) for error in errors.tolist()]
    return sum(ratios) / len(ratios)


def measure(folder: Path, *, prompts: int = 200) -> dict[str, Any]:
    """Parameters, bytes, VAE fidelity, and how often prompts give what they name."""
    model = ModelFolder(folder.name, folder)
    pipeline = model.pipeline(dtype=torch.float32, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    _, steering = measure_steering(pipeline, prompts, text=model.family.sampling(model.text_padding))
    encoders = [getattr(pipeline, name) for name in model.family.text_encoders]
    parts = {
        model.family.component: [getattr(pipeline, model.family.component)],
        "vae": [pipeline.vae],
        "text encoders": [encoder for encoder in encoders if encoder is not None],
    }
    parameters = {name: sum(p.numel() for part in same for p in part.parameters()) for name, same in parts.items()}
    return {
        "parameters": parameters,
        "weights_bytes": sum(file.stat().st_size for file in folder.glob("*/*.safetensors")),
        "vae_psnr_db": {size: round(reconstruction_psnr(pipeline.vae, size=size), 2) for size in (64, 128)},
        "steering": steering,
    }


def write_card(folder: Path, measured: dict[str, Any]) -> None:
    """Write `measurements.json` and `README.md` into the folder of a built-in model, which has its name."""
    pocket = MODELS[folder.name]
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    write_text(folder / "measurements.json", json.dumps(measured, indent=2) + "\n")
    steering = measured["steering"]
    state = "Training is finished." if training["finished"] else "**This is an interim checkpoint; training goes on.**"
    batches = "batches of " + " or ".join(f"{count} at {side} pixels" for side, count in pocket.batches.items())
    progress = f"Denoiser steps: {training['step']} of {training['steps']} ({batches})."
    lines = [
        f"# {folder.name}",
        "",
        *pocket.summary,
        f"{state} {progress}",
        "",
        "```python",
        *pocket.example,
        "```",
        "",
        "| measured on held-out scenes | value |",
        "|---|---|",
        f"| named class seen | {steering['noun']:.1%} of {steering['count']} prompts |",
        f"| named colour seen | {steering['colour']:.1%} |",
        f"| named background seen | {steering['background']:.1%} |",
        f"| all three seen | {steering['all']:.1%} |",
        *(f"| VAE reconstruction at {size} px | {value} dB PSNR |" for size, value in measured["vae_psnr_db"].items()),
        *(f"| parameters, {name} | {count / 1e6:.2f} M |" for name, count in measured["parameters"].items()),
        f"| weights on disk (fp16) | {readable_size(measured['weights_bytes'])} |",
        "",
        "The prompts name combinations of class, colour and background that are held out of training. The judge is",
        "an attribute classifier trained on renders; guidance 4, 28 steps.",
        *([training["notes"]] if "notes" in training else []),
        "Known limits: the model knows only the words of its captions, small details (eyes, patterns) are soft, and",
        "photographs come out as the VAE sees them, in flat strokes.",
        "",
        "Licence: Apache-2.0. The VAE also saw a few photographs that scikit-image carries (public domain or CC0); no other",
        "photograph and no other model went into it.",
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def main() -> None:
    """Measure the folder of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    write_card(options.folder, measure(options.folder, prompts=options.prompts))


if __name__ == "__main__":
    main()
