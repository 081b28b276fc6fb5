"""The scenes that the built-in denoisers learn from: rendered, encoded once, and captioned anew whenever they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pocketune.pocket.autoencoder import to_unit
from pocketune.pocket.draw import render
from pocketune.pocket.scenes import IDENTIFIERS, Scene, caption, held_out_combinations, random_scene, shows_held_out

SIDES = (128, 64)
CAPTION_DROPOUT = 0.1
HARD_CLASSES = {"star": 3, "duck": 2}
"""How much more often scenes of the classes that come out wrong most often are drawn."""
_SEED = "seed"


@dataclass(frozen=True)
class LatentPool:
    """Rendered scenes as latents. `latents[side]`: (count, 8, side / 8, side / 8), already scaled and shifted."""

    scenes: list[Scene]
    latents: dict[int, Tensor]

    def drawable(self) -> np.ndarray:
        """Numbers of the scenes that show no held-out combination, those of hard classes several times."""
        held_out = frozenset(held_out_combinations())
        allowed = [number for number, scene in enumerate(self.scenes) if not shows_held_out(scene, held_out)]
        return np.repeat(allowed, [_repeats(self.scenes[number]) for number in allowed])


class _Renders(Dataset[dict[int, Tensor]]):
    def __init__(self, seed: int, count: int) -> None:
        self._seed, self._count = seed, count

    def __len__(self) -> int:
        return self._count // 32

    def __getitem__(self, index: int) -> dict[int, Tensor]:
        scenes = [_scene(self._seed, number) for number in range(index * 32, index * 32 + 32)]
        return {side: torch.from_numpy(np.stack([np.asarray(render(s, size=side)) for s in scenes])) for side in SIDES}


@torch.no_grad()
def prepare_latents(path: Path, vae: AutoencoderKL, *, count: int, seed: int, device: torch.device) -> LatentPool:
    """Render and encode `count` scenes at both sizes, or load them if `path` already holds that many of this seed."""
    scenes = [_scene(seed, number) for number in range(count)]
    if path.exists() and _seed_of(path) == str(seed):  # captions are those of the seed's scenes
        stored = load_file(path)
        if len(stored["128"]) >= count:
            return LatentPool(scenes, {side: stored[str(side)][:count] for side in SIDES})
    vae = vae.to(device)
    parts: dict[int, list[Tensor]] = {side: [] for side in SIDES}
    for pixels in DataLoader(_Renders(seed, count), batch_size=None, num_workers=1, prefetch_factor=8):
        for side, images in pixels.items():
            mean = vae.encode(to_unit(images.to(device))).latent_dist.mean
            parts[side].append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu().contiguous())
    latents = {side: torch.cat(part) for side, part in parts.items()}
    save_file({str(side): tensor for side, tensor in latents.items()}, path, metadata={_SEED: str(seed)})
    return LatentPool(scenes, latents)


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as the training draws it: empty for guidance now and then, rarely with a meaningless identifier."""
    if rng.random() < CAPTION_DROPOUT:
        return ""
    identifier = IDENTIFIERS[int(rng.integers(len(IDENTIFIERS)))] if len(scene.subjects) == 1 and rng.random() < 0.05 else None
    return caption(scene, rng, identifier=identifier)


def _seed_of(path: Path) -> str | None:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get(_SEED)


def _scene(seed: int, number: int) -> Scene:
    return random_scene(np.random.default_rng([seed, 4, number]))


def _repeats(scene: Scene) -> int:
    return max(HARD_CLASSES.get(subject.noun, 1) for subject in scene.subjects)
