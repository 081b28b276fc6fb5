"""Noise schedules of training and sampling, in diffusers' own order of float32 operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pocketune_edge.errors import BundleError, SettingError
from pocketune_edge.manifest import DdimSteps, NoiseSchedule

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Levels:
    """The training timesteps, noisiest first, as the denoiser takes them, with the shares of noise and of clean latents.

    timesteps, sigmas, alphas: (train_timesteps,); alphas are None for rectified flow, where they are 1 - sigmas.
    """

    timesteps: Floats
    sigmas: Floats
    alphas: Floats | None


def training_levels(noise: NoiseSchedule) -> Levels:
    """The levels that training draws from.

    Raises:
        BundleError: the schedule of a diffusion has no signal, which a checked manifest rules out.
    """
    one = np.float32(1.0)
    if noise.kind == "ddpm":
        signal = _signal(noise)[::-1]
        timesteps = np.arange(noise.train_timesteps - 1, -1, -1).astype(np.float32)
        return Levels(timesteps, np.sqrt(one - signal), np.sqrt(signal))
    count, shift = np.float32(noise.train_timesteps), np.float32(noise.shift)
    sigmas = np.arange(noise.train_timesteps, 0, -1).astype(np.float32) / count
    sigmas = shift * sigmas / (one + np.float32(noise.shift - 1) * sigmas)
    return Levels(sigmas * count, sigmas, None)


class Sampler(Protocol):
    """A way from noise to clean latents. timesteps: (steps,), as the denoiser takes them."""

    @property
    def timesteps(self) -> Floats:
        """Of each step."""

    def step(self, number: int, latents: Floats, prediction: Floats) -> Floats:
        """The latents after one step, from those before it and what the denoiser predicted there."""


def sampler_of(noise: NoiseSchedule, steps: int) -> Sampler:
    """Euler's method for rectified flow, DDIM for a diffusion.

    Raises:
        SettingError: the schedule has no room for so many steps, or the bundle does not say where they lie.
    """
    return Euler(noise, steps) if noise.kind == "flow_match_euler" else Ddim(noise, steps)


class Euler:
    """Euler's method along the flow, as diffusers' FlowMatchEulerDiscreteScheduler steps.

    Its levels differ from those of training: the shift is applied to numbers between the shifted ends, thus twice at the
    lower end.
    """

    def __init__(self, noise: NoiseSchedule, steps: int) -> None:
        """Place the steps. sigmas: (steps + 1,), ending in 0."""
        highest, lowest = (float(sigma) * noise.train_timesteps for sigma in training_levels(noise).sigmas[[0, -1]])
        times = np.linspace(highest, lowest, steps) / noise.train_timesteps
        sigmas = (noise.shift * times / (1 + (noise.shift - 1) * times)).astype(np.float32)
        self.timesteps: Floats = sigmas * np.float32(noise.train_timesteps)
        self.sigmas: Floats = np.append(sigmas, np.float32(0.0))

    def step(self, number: int, latents: Floats, prediction: Floats) -> Floats:
        """Go along the predicted velocity."""
        change = self.sigmas[number + 1] - self.sigmas[number]
        moved: Floats = latents + change * prediction
        return moved


class Ddim:
    """Deterministic steps from noise to clean latents, as diffusers' DDIMScheduler makes them, without clipping.

    Paper: Song et al. 2021 (DDIM), equation 12, with eta 0.
    """

    def __init__(self, noise: NoiseSchedule, steps: int) -> None:
        """Place the steps.

        Raises:
            SettingError: as `sampler_of`.
        """
        if noise.ddim is None:
            msg = "this bundle is older than sampling on devices and does not say where its steps lie. Export it again."
            raise SettingError(msg)
        count = noise.train_timesteps
        places = _places(noise.ddim, steps, count) if steps <= count else None
        if places is None or places[0] >= count:
            msg = f"a sampler of {steps} steps does not fit a schedule of {count} timesteps. Ask for fewer steps, such as 28."
            raise SettingError(msg)
        signal = _signal(noise)
        before = places - count // steps
        self.timesteps: Floats = places.astype(np.float32)
        self._signal: Floats = signal[places]
        self._signal_before = np.where(before >= 0, signal[np.maximum(before, 0)], np.float32(noise.ddim.final_signal))
        self._velocity = noise.objective == "v_prediction"

    def step(self, number: int, latents: Floats, prediction: Floats) -> Floats:
        """Split the latents into clean ones and noise, and join them again with less noise."""
        one = np.float32(1.0)
        alpha, sigma = np.sqrt(self._signal[number]), np.sqrt(one - self._signal[number])
        if self._velocity:
            clean, noise = alpha * latents - sigma * prediction, alpha * prediction + sigma * latents
        else:
            clean, noise = (latents - sigma * prediction) / alpha, prediction
        following = self._signal_before[number]
        joined: Floats = np.sqrt(following) * clean + np.sqrt(one - following) * noise
        return joined


def _places(ddim: DdimSteps, steps: int, count: int) -> NDArray[np.int64]:
    """Training timesteps of the steps, noisiest first (Lin et al. 2023, table 2)."""
    if ddim.spacing == "linspace":
        return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64)
    if ddim.spacing == "trailing":
        return np.round(np.arange(count, 0, -count / steps)).astype(np.int64) - 1
    return (np.arange(steps) * (count // steps))[::-1].astype(np.int64) + ddim.offset


def _signal(noise: NoiseSchedule) -> Floats:
    if noise.signal is None:
        msg = "the bundle's noise schedule has no signal. Export it again."
        raise BundleError(msg)
    return np.array(noise.signal, np.float32)
