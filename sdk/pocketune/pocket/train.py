"""Train a built-in model from nothing: `python -m pocketune.pocket.train --model pocket-sd3 --out FOLDER`.

Stages: the VAE, the text encoders, the denoiser; then the parts are assembled into an ordinary diffusers folder. Each stage
can be stopped at any time and goes on from its last restart point; the run's state lies in FOLDER/.training. On a CPU one
process for each core is fastest for the denoiser:

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m pocketune.pocket.train --stages denoiser ...
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL

from pocketune.atomic import write_text
from pocketune.pocket.autoencoder import train_autoencoder
from pocketune.pocket.denoiser import PocketDenoiser, train_denoiser
from pocketune.pocket.pool import prepare_latents
from pocketune.pocket.runs import StageRun
from pocketune.pocket.sd3 import SD3
from pocketune.pocket.sd15 import SD15
from pocketune.pocket.text import train_text_encoders

logger = logging.getLogger(__name__)
MODELS = {"pocket-sd3": SD3, "pocket-sd15": SD15}
STAGES = ("vae", "text", "denoiser", "assemble")


def train(
    pocket: PocketDenoiser,
    out: Path,
    *,
    stages: tuple[str, ...],
    seed: int,
    vae_steps: int,
    text_steps: int,
    steps: int,
    scenes: int,
    start_from: Path | None = None,
    interim: bool = False,
) -> None:
    """Run the named stages in order; what another stage made is loaded from the folder.

    The VAE, the text encoders and the latents do not depend on the model: copied from the `.training` folder of one, they serve
    another.
    """
    work = out / ".training"
    if "vae" in stages:
        logger.info("training the VAE for %d steps", vae_steps)
        train_autoencoder(work / "vae", steps=vae_steps, seed=seed, run=StageRun(work / "vae-run"))
    if "text" in stages:
        logger.info("training the text encoders for %d steps", text_steps)
        train_text_encoders(work, steps=text_steps, seed=seed, run=StageRun(work / "text-run"))
    if "denoiser" in stages:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info("encoding %d scenes", scenes)
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
        pool = prepare_latents(work / "latents.safetensors", vae, count=scenes, seed=seed, device=device)
        logger.info("training the denoiser for %d steps", steps)
        run = StageRun(work / "denoiser-run")
        train_denoiser(pocket, work, pool, steps=steps, seed=seed, run=run, start_from=start_from)
    if "assemble" in stages and PartialState().is_main_process:
        assemble(pocket, work, out, start_from=start_from, interim=interim)
        logger.info("wrote %s", out)


def assemble(pocket: PocketDenoiser, work: Path, out: Path, *, start_from: Path | None = None, interim: bool = False) -> None:
    """Join the trained parts into a fp16 pipeline folder that stock diffusers loads.

    `start_from` is the model whose training went on, if it did; its steps count. `interim` marks a model that is to be trained
    further; reports say so.
    """
    pipeline = pocket.pipeline(work)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(out)
    last = json.loads((work / "denoiser-run" / "log.jsonl").read_text().splitlines()[-1])
    finished = last["step"] == last["steps"] and not interim
    notes = work / "notes.txt"
    remarks = {"notes": notes.read_text(encoding="utf-8").strip()} if notes.exists() else {}
    before = json.loads((start_from / "training.json").read_text(encoding="utf-8"))["step"] if start_from else 0
    last |= {"step": before + last["step"], "steps": before + last["steps"]}
    write_text(out / "training.json", json.dumps({"finished": finished, **last, **remarks}, indent=2) + "\n")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="pocket-sd3", help="what to train (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated subset of: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=6500)
    parser.add_argument("--text-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=40000, help="denoiser steps")
    parser.add_argument("--start-from", type=Path, help="a finished model folder whose denoiser is trained further")
    parser.add_argument("--interim", action="store_true", help="mark the model as one to be trained further")
    parser.add_argument("--scenes", type=int, default=40000, help="rendered scenes in the denoiser's pool")
    options = parser.parse_args()
    stages = tuple(options.stages.split(","))
    unknown = set(stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stages {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(
        MODELS[options.model],
        options.out,
        stages=stages,
        seed=options.seed,
        vae_steps=options.vae_steps,
        text_steps=options.text_steps,
        steps=options.steps,
        scenes=options.scenes,
        start_from=options.start_from,
        interim=options.interim,
    )


if __name__ == "__main__":
    main()
