"""Train the VAE that the built-in models share (stage 1 of `python -m pocketune.pocket.train`).

An `AutoencoderKL` with 8x down-sampling; L1, L2 and edge losses, a small KL term. Two thirds of the work is on 64-pixel crops,
which are four times cheaper; whole 128-pixel images keep it honest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pocketune.pocket.draw import render
from pocketune.pocket.natural import dead_leaves, photographs, random_view
from pocketune.pocket.runs import StageRun
from pocketune.pocket.scenes import random_scene

LATENT_CHANNELS = 8
LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-3


def new_autoencoder() -> AutoencoderKL:
    """An untrained VAE: (batch, 3, h, w) in [-1, 1] to (batch, 8, h / 8, w / 8)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=128,
        force_upcast=False,
    )


class ImageBatches(Dataset[Tensor]):
    """Batch number i of the training stream, uint8 (batch, size, size, 3), from its number and the seed alone."""

    def __init__(self, *, seed: int, start: int, stop: int) -> None:
        """Offer the batches from `start` (inclusive) to `stop`."""
        self._seed, self._start, self._stop = seed, start, stop
        self._photographs = photographs()

    def __len__(self) -> int:
        """How many batches are left."""
        return self._stop - self._start

    def __getitem__(self, index: int) -> Tensor:
        """Every fourth batch holds 2 whole images, the others 8 crops or small images."""
        number = self._start + index
        rng = np.random.default_rng([self._seed, 1, number])
        if number % 4 == 3:
            return torch.from_numpy(np.stack([self._image(rng, 128) for _ in range(2)]))
        images = []
        for _ in range(3):
            image = self._image(rng, 128)
            for _ in range(2):
                x, y = rng.integers(65, size=2)
                images.append(image[y : y + 64, x : x + 64])
        images += [self._image(rng, 64) for _ in range(2)]
        return torch.from_numpy(np.stack(images))

    def _image(self, rng: np.random.Generator, size: int) -> np.ndarray:
        kind = rng.random()
        if kind < 0.08:
            return np.asarray(dead_leaves(rng, size=size))
        if kind < 0.2 and self._photographs:
            photo = self._photographs[int(rng.integers(len(self._photographs)))]
            return np.asarray(random_view(rng, photo, size=size))
        return np.asarray(render(random_scene(rng), size=size))


def autoencoder_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The training loss, and the plain L1 error in [-1, 1] units.

    Args:
        vae: the model in training.
        images: (batch, 3, height, width) in [-1, 1].
        generator: for the noise of the posterior sample.
    """
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(images)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    l1 = F.l1_loss(decoded, images)
    edges = F.l1_loss(decoded.diff(dim=-1), images.diff(dim=-1)) + F.l1_loss(decoded.diff(dim=-2), images.diff(dim=-2))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return l1 + 0.5 * F.mse_loss(decoded, images) + 0.5 * edges + KL_WEIGHT * kl, l1.detach()


def train_autoencoder(folder: Path, *, steps: int, seed: int, run: StageRun) -> AutoencoderKL:
    """Train, measure the latents' scale and shift, and save a diffusers VAE folder."""
    accelerator = Accelerator()
    torch.manual_seed(seed)
    vae = new_autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps))
    vae, optimizer = accelerator.prepare(vae, optimizer)
    done = run.restore(accelerator.unwrap_model(vae), optimizer, schedule)
    batches = DataLoader(ImageBatches(seed=seed, start=done, stop=steps), batch_size=None, num_workers=1, prefetch_factor=6)
    for step, pixels in zip(range(done, steps), _on(batches, accelerator.device), strict=True):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss, l1 = autoencoder_loss(vae, pixels, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.after_step(
            step + 1, steps, {"loss": loss.item(), "l1": l1.item()}, accelerator.unwrap_model(vae), optimizer, schedule
        )
    trained = accelerator.unwrap_model(vae).cpu().eval()
    set_latent_scale(trained, seed=seed)
    trained.save_pretrained(folder)
    return trained


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL, *, seed: int) -> None:
    """Measure 512 renders and write `scaling_factor` (1 / deviation) and `shift_factor` (mean) into the config."""
    rng = np.random.default_rng([seed, 2])
    pixels = np.stack([np.asarray(render(random_scene(rng))) for _ in range(512)])
    latents = torch.cat([vae.encode(to_unit(torch.from_numpy(part))).latent_dist.mean for part in np.split(pixels, 32)])
    vae.register_to_config(scaling_factor=1.0 / float(latents.std()), shift_factor=float(latents.mean()))


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 (batch, h, w, 3) to float (batch, 3, h, w) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _on(batches: DataLoader[Tensor], device: torch.device) -> Iterator[Tensor]:
    for pixels in batches:
        yield to_unit(pixels.to(device))


def _cosine(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
