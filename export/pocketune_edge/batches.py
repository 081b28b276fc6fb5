"""From draws to the inputs of graphs: crops are encoded once, then any draws become parts of the graphs' number of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketune.sampling.draws import Crop, Draw, Kind, crop_sizes, cut, noise_for
from pocketune_edge.manifest import Manifest
from pocketune_edge.noise import training_levels
from pocketune_edge.session import Array, Sessions
from pocketune_edge.text import Prompt, stack

CropKey = tuple[Kind, int, Crop]


@dataclass(frozen=True)
class Posterior:
    """The image encoder's distribution of one crop, and what it was cut from.

    mean, std: (1, channels, height, width). sizes: (1, 6), of photo, crop and result as SDXL takes them.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    sizes: NDArray[np.float32]


def encode_crops(
    sessions: Sessions,
    images: Mapping[Kind, Sequence[Image.Image]],
    draws: Sequence[Draw],
    *,
    on_crop: Callable[[int, int], None],
) -> dict[CropKey, Posterior]:
    """Encode each distinct crop of the draws once, one at a time. on_crop: called with (done, total)."""
    manifest = sessions.bundle.manifest
    wanted = list(dict.fromkeys((draw.kind, draw.image, draw.crop) for draw in draws))
    posteriors: dict[CropKey, Posterior] = {}
    graphs = manifest.named(manifest.vae.encoder)
    rows = graphs[0].shape_of("pixels")[0]
    for done, (kind, image, crop) in enumerate(wanted):
        resolution = manifest.batch.resolution
        pixels = cut(images[kind][image], crop, resolution=resolution)[None]
        found = sessions.run_parts(graphs, {"pixels": np.repeat(pixels, rows, axis=0)}, ("mean", "std"))
        mean, std = (found[name][:1].astype(np.float32) for name in ("mean", "std"))
        sizes = np.array([crop_sizes(images[kind][image].size, crop, resolution=resolution)], np.float32)
        posteriors[kind, image, crop] = Posterior(mean, std, sizes)
        on_crop(done + 1, len(wanted))
    return posteriors


class BatchMaker:
    """Builds the graph inputs of given draws."""

    def __init__(
        self,
        manifest: Manifest,
        posteriors: Mapping[CropKey, Posterior],
        prompts: Mapping[Kind, Prompt],
        *,
        prior_loss_weight: float,
    ) -> None:
        """Keep what draws refer to. `prompts` holds the encoded prompt of each kind."""
        self._rows = manifest.batch.rows
        self._posteriors = posteriors
        self._prompts = prompts
        self._levels = training_levels(manifest.noise_schedule)
        self._weights: dict[Kind, float] = {"instance": 1.0, "class": prior_loss_weight}

    def __call__(self, draws: Sequence[Draw], features: Sequence[Mapping[str, Array]] = ()) -> list[dict[str, Array]]:
        """The parts of a batch; together their losses, and gradients, add up to the batch's.

        A last part with too few draws is filled with a draw whose loss weighs nothing.

        Args:
            draws: in their order.
            features: of each draw, if spans are skipped.
        """
        kinds = [draw.kind for draw in draws]
        weights = [self._weights[kind] / kinds.count(kind) for kind in kinds]
        parts = []
        for start in range(0, len(draws), self._rows):
            chosen = list(range(start, min(start + self._rows, len(draws))))
            missing = self._rows - len(chosen)
            rows = [*chosen, *[chosen[-1]] * missing]
            part = self._stack([draws[row] for row in rows])
            part["loss_weights"] = np.array([weights[row] for row in chosen] + [0.0] * missing, np.float32)
            if features:
                part |= {name: np.concatenate([features[row][name] for row in rows]) for name in features[start]}
            parts.append(part)
        return parts

    def _stack(self, draws: Sequence[Draw]) -> dict[str, Array]:
        latents, noises = zip(*(self._latents(draw) for draw in draws), strict=True)
        indices = [draw.timestep_index for draw in draws]
        stacked = {
            "latents": np.concatenate(latents),
            "noise": np.concatenate(noises),
            "timesteps": self._levels.timesteps[indices],
            "sigmas": self._levels.sigmas[indices],
            "prompt_sizes": np.concatenate([self._posteriors[draw.kind, draw.image, draw.crop].sizes for draw in draws]),
        }
        if self._levels.alphas is not None:
            stacked["alphas"] = self._levels.alphas[indices]
        return stacked | stack([self._prompts[draw.kind] for draw in draws])

    def _latents(self, draw: Draw) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        posterior = self._posteriors[draw.kind, draw.image, draw.crop]
        noise, posterior_noise = noise_for(draw, posterior.mean.shape)
        return posterior.mean + posterior.std * posterior_noise, noise
