"""From draws to tensors: encode the crops once, then build the batch of any draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pocketune.errors import ModelError
from pocketune.models.base import Prompt
from pocketune.sampling.draws import Crop, Draw, Kind, crop_sizes, cut, noise_for
from pocketune.sampling.places import place_of
from pocketune.step import Batch, Features, Objective

CropKey = tuple[Kind, int, Crop, bool]
"""Kind, image and crop, and whether it is at low resolution."""


def crop_key(draw: Draw) -> CropKey:
    """What of a draw its encoded crop depends on."""
    return draw.kind, draw.image, draw.crop, draw.low


@dataclass(frozen=True)
class Posterior:
    """The VAE's latent distribution of one crop, scaled and shifted. mean, std: (1, channels, height, width).

    sizes: (1, 6), of photo, crop and result as SDXL takes them.
    place: (1, 4), of the crop on the canvas; None: it is an image of its own.
    An autoencoder without a distribution has a deviation of zero.
    """

    mean: Tensor
    std: Tensor
    sizes: Tensor
    place: Tensor | None = None


@dataclass(frozen=True)
class NoiseSchedule:
    """A scheduler's training timesteps, noisiest first, with their noise levels.

    Attributes:
        timesteps: (1000,), as the denoiser takes them.
        sigmas: (1000,), the share of noise.
        alphas: (1000,), the share of the clean latents; None for rectified flow.
        objective: what the denoiser predicts.
    """

    timesteps: Tensor
    sigmas: Tensor
    alphas: Tensor | None
    objective: Objective

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """Read a `FlowMatchEulerDiscreteScheduler` or a `DDPMScheduler`.

        Raises:
            ModelError: the model predicts something else.
        """
        if not isinstance(scheduler, DDPMScheduler):
            return cls(scheduler.timesteps, scheduler.sigmas, None, "flow")
        if "sigma_data" in scheduler.config:  # kept from the sampler's configuration, whose noise levels are other ones
            msg = (
                "this model was trained with EDM's noise levels and preconditioning, as Playground v2.5 was, and there is no "
                "loss for it here. Its samples are fine. To train, use a model such as Stable Diffusion XL."
            )
            raise ModelError(msg)
        objective = scheduler.config.prediction_type
        if objective not in ("epsilon", "v_prediction"):
            msg = f'the scheduler says prediction_type "{objective}"; expected "epsilon" or "v_prediction". Use another model.'
            raise ModelError(msg)
        signal = scheduler.alphas_cumprod[scheduler.timesteps]
        return cls(scheduler.timesteps, (1 - signal) ** 0.5, signal**0.5, objective)

    def shares(self) -> NDArray[np.float64]:
        """Each timestep as a share of the largest, t / T, (1000,)."""
        return np.asarray(self.timesteps.double() / len(self.timesteps))


@torch.no_grad()
def encode_crops(
    vae: Any,
    images: Mapping[Kind, Sequence[Image.Image]],
    draws: Sequence[Draw],
    *,
    resolution: int,
    low_resolution: int | None = None,
    canvas: int | None = None,
    on_crop: Callable[[int, int], None],
) -> dict[CropKey, Posterior]:
    """Encode each distinct crop of the draws once, one at a time.

    Args:
        vae: in float32.
        images: the photos and the class images, upright RGB.
        draws: whose crops are wanted.
        resolution: side of the resized crops in pixels.
        low_resolution: that of the draws at low resolution, where there are any.
        canvas: side in latent pixels of what crops have a place on; None: they are images of their own.
        on_crop: called with (done, total).
    """
    wanted = list(dict.fromkeys(crop_key(draw) for draw in draws))
    shift, scale = float(vae.config.get("shift_factor") or 0.0), float(vae.config.scaling_factor)
    posteriors: dict[CropKey, Posterior] = {}
    for done, (kind, image, crop, low) in enumerate(wanted):
        side = low_resolution if low and low_resolution is not None else resolution
        pixels = torch.from_numpy(cut(images[kind][image], crop, resolution=side)[None]).to(vae.device)
        encoded = vae.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            mean, std = (encoded.latent_dist.mean - shift) * scale, encoded.latent_dist.std * scale
        else:
            mean = (encoded.latent - shift) * scale
            std = torch.zeros_like(mean)
        size = images[kind][image].size
        sizes = torch.tensor([crop_sizes(size, crop, resolution=side)], dtype=torch.float32)
        place = None if canvas is None else torch.tensor([place_of(size, crop, canvas=canvas)], dtype=torch.float32)
        posteriors[kind, image, crop, low] = Posterior(mean.cpu(), std.cpu(), sizes, place)
        on_crop(done + 1, len(wanted))
    return posteriors


class BatchMaker:
    """Builds the batch of given draws: latents, noise, timesteps, sigmas and prompts, on the training device."""

    def __init__(
        self,
        posteriors: Mapping[CropKey, Posterior],
        prompts: Mapping[Kind, Prompt],
        scheduler: Any,
        *,
        prior_loss_weight: float,
        device: torch.device,
        dtype: torch.dtype,
        with_sizes: bool = False,
    ) -> None:
        """Keep what draws refer to.

        Args:
            posteriors: latents of every crop.
            prompts: the encoded prompt of each kind.
            scheduler: the noise schedule.
            prior_loss_weight: of class images.
            device: where batches go.
            dtype: of their floating-point tensors.
            with_sizes: whether the denoiser takes the sizes of photo and crop.
        """
        self._with_sizes = with_sizes
        self._posteriors = posteriors
        self._prompts = prompts
        self._schedule = NoiseSchedule.of(scheduler)
        self._weights: dict[Kind, float] = {"instance": 1.0, "class": prior_loss_weight}
        self.device = device
        self.dtype = dtype

    def __call__(self, draws: Sequence[Draw], features: Features | None = None) -> Batch:
        """The batch of some draws of one resolution, in their order; `features` are those of the same draws."""
        latents, noises = zip(*(self._latents(draw) for draw in draws), strict=True)
        kinds = [draw.kind for draw in draws]
        indices = [draw.timestep_index for draw in draws]
        schedule = self._schedule
        return Batch(
            latents=self._to_device(torch.cat(latents)),
            noise=self._to_device(torch.cat(noises)),
            timesteps=schedule.timesteps[indices].to(self.device),
            sigmas=self._to_device(schedule.sigmas[indices]),
            alphas=None if schedule.alphas is None else self._to_device(schedule.alphas[indices]),
            objective=schedule.objective,
            prompt=self._prompt(draws),
            loss_weights=torch.tensor([self._weights[kind] / kinds.count(kind) for kind in kinds], device=self.device),
            features=features or {},
        )

    def _latents(self, draw: Draw) -> tuple[Tensor, Tensor]:
        posterior = self._posteriors[crop_key(draw)]
        noise, posterior_noise = (torch.from_numpy(values) for values in noise_for(draw, tuple(posterior.mean.shape)))
        return posterior.mean + posterior.std * posterior_noise, noise

    def _prompt(self, draws: Sequence[Draw]) -> Prompt:
        prompts = [self._prompts[draw.kind] for draw in draws]
        crops = [self._posteriors[crop_key(draw)] for draw in draws]
        if self._with_sizes:
            prompts = [replace(prompt, sizes=crop.sizes) for prompt, crop in zip(prompts, crops, strict=True)]
        parts = {field.name: [getattr(prompt, field.name) for prompt in prompts] for field in fields(Prompt)}
        prompt = Prompt(**{name: self._to_device(torch.cat(rows)) for name, rows in parts.items() if rows[0] is not None})
        places = [crop.place for crop in crops if crop.place is not None]
        return replace(prompt, place=torch.cat(places).to(self.device)) if places else prompt  # coordinates stay float32

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)
