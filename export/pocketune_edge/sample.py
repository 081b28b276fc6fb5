"""Images from prompts with the graphs of a bundle: Euler steps along a flow, or DDIM steps, with classifier-free guidance.

Equal seeds give equal images on every device. They differ from those of PyTorch's side, whose start noise is of torch's own
generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from pocketune.sampling.intervals import interval_of
from pocketune.sampling.philox import Stream, normals
from pocketune_edge.denoiser import Denoiser, Floats
from pocketune_edge.errors import SettingError
from pocketune_edge.noise import sampler_of
from pocketune_edge.session import Array, Sessions
from pocketune_edge.text import Prompt, encode_prompts, negative_prompt, stack

GROUP = 4
"""Images that are made at once; with streaming, each block is read once a step for so many."""


def render(
    sessions: Sessions,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    parameters: Floats,
    on_step: Callable[[int, int], None],
) -> Iterator[Image.Image]:
    """Sample an image for each prompt, in their order, some at a time.

    Args:
        sessions: of a bundle.
        prompts: one image each.
        seeds: of the start noise, one a prompt.
        steps: of the sampler.
        guidance: scale; 1 or less turns guidance off, as in diffusers.
        parameters: the vectors of what was trained, of all intervals; `neutral` for the base model.
        on_step: called with (done, total) sampler steps of all images.

    Raises:
        SettingError: no step, or seeds that do not fit the prompts.
    """
    if steps < 1 or len(seeds) != len(prompts) or any(seed < 0 for seed in seeds):
        msg = f"cannot sample {len(prompts)} prompts with seeds {list(seeds)} in {steps} steps. Give a seed from 0 on for each."
        raise SettingError(msg)
    manifest = sessions.bundle.manifest
    encoded = encode_prompts(sessions, [*prompts, ""] if guidance > 1 else prompts)
    negative = negative_prompt(manifest, encoded[""]) if guidance > 1 else None
    shape = (1, *manifest.batch.latent_shape)
    total = len(prompts) * steps
    for start in range(0, len(prompts), GROUP):
        chosen = range(start, min(start + GROUP, len(prompts)))

        def tell(step: int, before: int = start * steps, images: int = len(chosen)) -> None:
            on_step(before + step * images, total)

        latents = denoise(
            Denoiser(sessions),
            [normals(seeds[number], Stream.SAMPLING, shape).astype(np.float32) for number in chosen],
            [encoded[prompts[number]] for number in chosen],
            negative,
            steps=steps,
            guidance=guidance,
            parameters=parameters,
            on_step=tell,
        )
        yield from (to_image(pixels) for pixels in decode(sessions, latents))


def denoise(
    denoiser: Denoiser,
    latents: Sequence[Floats],
    prompts: Sequence[Prompt],
    negative: Prompt | None,
    *,
    steps: int,
    guidance: float,
    parameters: Floats,
    on_step: Callable[[int], None],
) -> list[Floats]:
    """Go from noise to clean latents, each (1, channels, height, width).

    Args:
        denoiser: of a bundle.
        latents: the noise each image starts from.
        prompts: one a latent.
        negative: what guidance leads away from; None turns it off.
        steps: of the sampler.
        guidance: scale.
        parameters: the vectors of all intervals.
        on_step: called with the number of finished steps.
    """
    sampler = sampler_of(denoiser.manifest.noise_schedule, steps)
    current = list(latents)
    for number in range(steps):
        rows = [*current, *current] if negative else current
        texts = [*[negative] * len(current), *prompts] if negative else prompts
        predictions = _predictions(denoiser, rows, texts, sampler.timesteps[number], parameters)
        if negative:
            pairs = zip(predictions[: len(current)], predictions[len(current) :], strict=True)
            predictions = [plain + np.float32(guidance) * (led - plain) for plain, led in pairs]
        current = [sampler.step(number, latent, given) for latent, given in zip(current, predictions, strict=True)]
        on_step(number + 1)
    return current


def decode(sessions: Sessions, latents: Sequence[Floats]) -> list[Floats]:
    """Latents to pixels in [-1, 1], each (3, height, width)."""
    graphs = sessions.bundle.manifest.named(sessions.bundle.manifest.vae.decoder)
    rows = graphs[0].shape_of("latents")[0]
    results = [sessions.run_parts(graphs, {"latents": np.repeat(latent, rows, axis=0)}, ("pixels",)) for latent in latents]
    return [np.asarray(found["pixels"][0], np.float32) for found in results]


def to_image(pixels: Floats) -> Image.Image:
    """An RGB image of (3, height, width) numbers in [-1, 1]."""
    levels = np.clip(pixels / 2 + np.float32(0.5), 0.0, 1.0) * np.float32(255.0)
    return Image.fromarray(np.ascontiguousarray(levels.round().astype(np.uint8).transpose(1, 2, 0)))


def _predictions(
    denoiser: Denoiser, rows: Sequence[Floats], prompts: Sequence[Prompt], timestep: np.float32, parameters: Floats
) -> list[Floats]:
    """What the denoiser predicts for each row; rows are run in parts of the graphs' size, the last one filled up."""
    batches: list[dict[str, Array]] = []
    side = denoiser.manifest.batch.resolution
    for start in range(0, len(rows), denoiser.rows):
        numbers = [min(start + number, len(rows) - 1) for number in range(denoiser.rows)]
        batches.append(
            {
                "noisy": np.concatenate([rows[number] for number in numbers]),
                "timesteps": np.full((denoiser.rows,), timestep, np.float32),
                "prompt_sizes": np.array([[side, side, 0, 0, side, side]] * denoiser.rows, np.float32),
                **stack([prompts[number] for number in numbers]),
            }
        )
    tuned = denoiser.manifest.tuned
    interval = interval_of(float(timestep), tuned.intervals)
    found = denoiser.predict(batches, parameters[tuned.place(interval)])
    return [part[row : row + 1] for part in found for row in range(denoiser.rows)][: len(rows)]
