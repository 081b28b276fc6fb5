"""From draws to tensors: encode the crops once, then build the batch of any draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from pocketune.models.base import Prompt
from pocketune.sampling.draws import Crop, Draw, Kind, cut, noise_for
from pocketune.step import Batch, Features

CropKey = tuple[Kind, int, Crop]


@dataclass(frozen=True)
class Posterior:
    """The VAE's latent distribution of one crop, scaled and shifted. mean, std: (1, channels, height, width)."""

    mean: Tensor
    std: Tensor


@torch.no_grad()
def encode_crops(
    vae: AutoencoderKL,
    images: Mapping[Kind, Sequence[Image.Image]],
    draws: Sequence[Draw],
    *,
    resolution: int,
    on_crop: Callable[[int, int], None],
) -> dict[CropKey, Posterior]:
    """Encode each distinct crop of the draws once, one at a time.

    Args:
        vae: in float32.
        images: the photos and the class images, upright RGB.
        draws: whose crops are wanted.
        resolution: side of the resized crops in pixels.
        on_crop: called with (done, total).
    """
    wanted = list(dict.fromkeys((draw.kind, draw.image, draw.crop) for draw in draws))
    shift, scale = float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)
    posteriors: dict[CropKey, Posterior] = {}
    for done, (kind, image, crop) in enumerate(wanted):
        pixels = torch.from_numpy(cut(images[kind][image], crop, resolution=resolution)[None]).to(vae.device)
        latents = vae.encode(pixels).latent_dist
        mean, std = (latents.mean - shift) * scale, latents.std * scale
        posteriors[kind, image, crop] = Posterior(mean.cpu(), std.cpu())
        on_crop(done + 1, len(wanted))
    return posteriors


class BatchMaker:
    """Builds the batch of given draws: latents, noise, timesteps, sigmas and prompts, on the training device."""

    def __init__(
        self,
        posteriors: Mapping[CropKey, Posterior],
        prompts: Mapping[Kind, Prompt],
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        prior_loss_weight: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Keep what draws refer to. `prompts` holds the encoded prompt of each kind."""
        self._posteriors = posteriors
        self._prompts = prompts
        self._timesteps = scheduler.timesteps
        self._sigmas = scheduler.sigmas
        self._weights: dict[Kind, float] = {"instance": 1.0, "class": prior_loss_weight}
        self.device = device
        self.dtype = dtype

    def __call__(self, draws: Sequence[Draw], features: Features | None = None) -> Batch:
        """The batch of some draws, in their order; `features` are those of the same draws."""
        latents, noises = zip(*(self._latents(draw) for draw in draws), strict=True)
        kinds = [draw.kind for draw in draws]
        indices = [draw.timestep_index for draw in draws]
        prompts = [self._prompts[draw.kind] for draw in draws]
        return Batch(
            latents=self._to_device(torch.cat(latents)),
            noise=self._to_device(torch.cat(noises)),
            timesteps=self._timesteps[indices].to(self.device),
            sigmas=self._to_device(self._sigmas[indices]),
            prompt=Prompt(
                hidden=self._to_device(torch.cat([prompt.hidden for prompt in prompts])),
                pooled=self._to_device(torch.cat([prompt.pooled for prompt in prompts])),
            ),
            loss_weights=torch.tensor([self._weights[kind] / kinds.count(kind) for kind in kinds], device=self.device),
            features=features or {},
        )

    def _latents(self, draw: Draw) -> tuple[Tensor, Tensor]:
        posterior = self._posteriors[draw.kind, draw.image, draw.crop]
        noise, posterior_noise = (torch.from_numpy(values) for values in noise_for(draw, tuple(posterior.mean.shape)))
        return posterior.mean + posterior.std * posterior_noise, noise

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)
