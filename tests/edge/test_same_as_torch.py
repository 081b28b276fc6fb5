"""What the edge runtime computes by itself is what PyTorch's side computes, and their files are each other's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import nn

from pocketune import checkpoint as torch_checkpoint
from pocketune.delta import save_lora as save_lora_with_diffusers
from pocketune.errors import RunError
from pocketune.methods.lora import add_lora
from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune.runfolder import run_fingerprint
from pocketune.sampling.batches import NoiseSchedule as TorchNoiseSchedule
from pocketune.train import new_optimizer
from pocketune_edge.bundle import Bundle
from pocketune_edge.cache import from_bfloat16, to_bfloat16
from pocketune_edge.delta import Adapter, by_name, flatten, load_result, save_result, start_values
from pocketune_edge.errors import LoraError, SettingError
from pocketune_edge.manifest import DdimSteps, Lora, NoiseSchedule, Parameter, Tuned
from pocketune_edge.noise import Euler, sampler_of, training_levels
from pocketune_edge.sample import to_image
from pocketune_edge.settings import Settings
from pocketune_edge.state import CheckpointFolder, State, fresh_state
from pocketune_edge.storage import Place
from pocketune_edge.strict import MisfitError

CPU = torch.device("cpu")


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.15])
def test_schedules_equal_diffusers(shift: float) -> None:
    noise = NoiseSchedule("flow_match_euler", "flow", 1000, shift, None)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    levels = training_levels(noise)
    assert np.array_equal(levels.timesteps, scheduler.timesteps.numpy())
    assert np.array_equal(levels.sigmas, scheduler.sigmas.numpy())
    assert levels.alphas is None
    for steps in (1, 2, 28):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        sampler = Euler(noise, steps)
        assert np.array_equal(sampler.timesteps, scheduler.timesteps.numpy())
        assert np.array_equal(sampler.sigmas, scheduler.sigmas.numpy())


def diffusion(objective: str, **ddim: Any) -> tuple[NoiseSchedule, DDIMScheduler]:
    """Equal schedules of both sides."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=objective,
        timestep_spacing=ddim["spacing"],
        steps_offset=ddim["offset"],
        set_alpha_to_one=ddim["final_signal"] == 1.0,
    )
    signal = tuple(float(share) for share in scheduler.alphas_cumprod)
    steps = DdimSteps(**ddim | {"final_signal": ddim["final_signal"] or signal[0]})
    return NoiseSchedule("ddpm", objective, 1000, 1.0, signal, steps), scheduler  # type: ignore[arg-type]


def test_training_levels_of_a_diffusion_equal_pytorch() -> None:
    noise, scheduler = diffusion("epsilon", spacing="leading", offset=1, final_signal=1.0)
    ours, theirs = training_levels(noise), TorchNoiseSchedule.of(DDPMScheduler.from_config(scheduler.config))
    assert theirs.alphas is not None and ours.alphas is not None
    assert np.array_equal(ours.timesteps, theirs.timesteps.numpy())
    for found, expected in ((ours.sigmas, theirs.sigmas), (ours.alphas, theirs.alphas)):
        np.testing.assert_array_max_ulp(found, expected.numpy(), 1)  # torch's vectorised root is not always rounded to nearest


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "ddim",
    [
        {"spacing": "leading", "offset": 1, "final_signal": 0.0},
        {"spacing": "leading", "offset": 0, "final_signal": 1.0},
        {"spacing": "trailing", "offset": 0, "final_signal": 1.0},
        {"spacing": "linspace", "offset": 0, "final_signal": 0.0},
    ],
)
@pytest.mark.parametrize("steps", [1, 3, 28])
def test_ddim_steps_equal_diffusers(objective: str, ddim: dict[str, Any], steps: int) -> None:
    noise, scheduler = diffusion(objective, **ddim)
    scheduler.set_timesteps(steps)
    sampler = sampler_of(noise, steps)
    assert np.array_equal(sampler.timesteps, scheduler.timesteps.numpy())
    rng = np.random.default_rng(0)
    ours = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    theirs = torch.from_numpy(ours)
    for number, timestep in enumerate(scheduler.timesteps):
        prediction = rng.standard_normal(ours.shape).astype(np.float32)
        ours = sampler.step(number, ours, prediction)
        theirs = scheduler.step(torch.from_numpy(prediction), timestep, theirs).prev_sample
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("steps", [1000, 1001])
def test_more_steps_than_a_schedule_has_are_refused(steps: int) -> None:
    noise, _ = diffusion("epsilon", spacing="leading", offset=1, final_signal=1.0)
    with pytest.raises(SettingError, match="fewer steps"):
        sampler_of(noise, steps)


def test_a_bundle_that_does_not_say_how_to_sample_is_refused() -> None:
    noise, _ = diffusion("epsilon", spacing="leading", offset=1, final_signal=1.0)
    with pytest.raises(SettingError, match="Export it again"):
        sampler_of(replace(noise, ddim=None), 10)


def test_bfloat16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]  # the last two are ties
    assert np.array_equal(from_bfloat16(to_bfloat16(values)), torch.from_numpy(values).bfloat16().float().numpy())


def test_pixels_become_the_image_that_diffusers_makes() -> None:
    from diffusers.image_processor import VaeImageProcessor

    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = VaeImageProcessor().postprocess(pixels, output_type="pil")[0]
    assert np.array_equal(np.asarray(to_image(pixels[0].numpy())), np.asarray(expected))


def test_a_run_has_one_fingerprint() -> None:
    """The device reads the recipe from a manifest, where tuples are lists."""
    recipe = Recipe(instance_prompt="a photo of sks toy", lora_targets=("attn.to_q",)).model_dump()
    there = run_fingerprint(json.loads(json.dumps(recipe)), model="m", photos=["b", "a"])
    assert run_fingerprint(recipe, model="m", photos=("b", "a")) == there


def test_every_valid_recipe_has_settings() -> None:
    recipe = Recipe(
        instance_prompt="x", skip="auto", draws=3, refresh_every=9, class_prompt="y", cache_dtype="bfloat16", seed=2**63 - 1
    )
    settings = Settings.of(json.loads(recipe.model_dump_json()))
    assert all(getattr(settings, name) == getattr(recipe, name) for name in Settings.__dataclass_fields__)
    for name, value in (("steps", 0), ("seed", -1), ("learning_rate", 0), ("batch_size", 1.5), ("instance_prompt", "")):
        with pytest.raises(MisfitError, match=name):
            Settings.of(recipe.model_dump() | {name: value})


class TunedHere:
    """A tiny torch adapter that has trained a little, and the same as a bundle would describe it."""

    def __init__(self, model: ModelFolder, folder: Path) -> None:
        self.adapter = model.load_denoiser(dtype=torch.float32, device=CPU)
        self.parameters = add_lora(self.adapter, blocks=(1, 5), rank=2, seed=3)
        self.optimizer = new_optimizer(self.parameters, Recipe(instance_prompt="x"))
        self.without = {name for name in self.parameters if ".5.attn.to_add_out" in name or ".5.attn.add_q" in name}
        path = save_lora_with_diffusers(self.adapter, folder / "start")
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            for name, parameter in self.parameters.items():
                parameter.grad = None if name in self.without else torch.randn(parameter.shape, generator=generator)
            self.optimizer.step()
        described, offset = [], 0
        keys = list(load_file(path))
        for name, parameter in self.parameters.items():
            key = f"transformer.{name.replace('.default', '')}"
            assert key in keys
            at = None if name in self.without else offset
            described.append(Parameter(name, key, tuple(parameter.shape), 0, int(name.split(".")[1]), at))
            offset += 0 if at is None else parameter.numel()
        self.lora = Tuned("lora", Lora(2, 2.0, ("attn.to_q",)), 1, tuple(described), offset, "start.safetensors")
        self.bundle = FakeBundle(self.lora, path)


class FakeBundle(Bundle):
    """A bundle of nothing but a LoRA."""

    def __init__(self, lora: Tuned, path: Path) -> None:
        self.path = path.parent
        self.manifest = type("Manifest", (), {"tuned": lora})()  # type: ignore[assignment]
        self._content = path.read_bytes()
        self._place = Place(path, 0, path.stat().st_size)

    def read(self, path: str) -> bytes:
        return self._content

    def place(self, path: str) -> Place:
        return self._place


@pytest.fixture(scope="module")
def tuned(tiny_model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> TunedHere:
    return TunedHere(tiny_model, tmp_path_factory.mktemp("tuned"))


def as_numpy(parameters: dict[str, nn.Parameter]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def test_lora_files_have_the_bytes_that_diffusers_writes(tuned: TunedHere, tmp_path: Path) -> None:
    start = start_values(tuned.bundle)
    assert set(start.fixed) == tuned.without and start.flat.any()
    values = as_numpy(tuned.parameters)
    flat = flatten(tuned.lora, values)
    assert not np.array_equal(flat, start.flat)
    ours = save_result(tuned.bundle, Adapter(flat, start.fixed), tmp_path / "ours")
    theirs = save_lora_with_diffusers(tuned.adapter, tmp_path / "theirs")
    assert ours.read_bytes() == theirs.read_bytes()
    again = load_result(tuned.bundle, tmp_path / "ours")
    assert np.array_equal(again.flat, flat)
    assert all(
        np.array_equal(by_name(tuned.lora, again.flat)[name], values[name]) for name in values if name not in tuned.without
    )


def test_strange_lora_files_are_refused(tuned: TunedHere, tmp_path: Path) -> None:
    from safetensors.numpy import load, save

    good = save_result(tuned.bundle, start_values(tuned.bundle), tmp_path / "good").read_bytes()
    tensors = load(good)
    first = sorted(tensors)[0]
    cases = {
        "cut": good[: len(good) // 2],
        "empty": b"",
        "shape": save(tensors | {first: tensors[first][:1]}),
        "missing": save({key: value for key, value in tensors.items() if key != first}),
        "more": save(tensors | {"transformer.other.lora_A.weight": tensors[first]}),
        "nan": save(tensors | {first: np.full_like(tensors[first], np.nan)}),
        "strength": save(tensors, {"lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.r": 2}'}),
        "metadata": save(tensors, {"lora_adapter_metadata": "[["}),
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(LoraError, match="does not fit the bundle"):
            load_result(tuned.bundle, path)
    with pytest.raises(LoraError, match="no LoRA at"):
        load_result(tuned.bundle, tmp_path / "nowhere")


def test_a_checkpoint_of_torch_is_one_of_ours(tuned: TunedHere, tmp_path: Path) -> None:
    torch_checkpoint.CheckpointFolder(tmp_path, fingerprint="f").save(
        tuned.parameters, tuned.optimizer, step=3, losses=(3.0, 2.0, 1.5)
    )
    state = CheckpointFolder(tmp_path, tuned.lora, fingerprint="f").restore(start_values(tuned.bundle))
    assert state.losses == (3.0, 2.0, 1.5)
    moments = {name: tuned.optimizer.state[parameter] for name, parameter in tuned.parameters.items()}
    assert np.array_equal(state.parameters, flatten(tuned.lora, as_numpy(tuned.parameters)))
    for kind, flat in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
        found = by_name(tuned.lora, flat)
        assert all(np.array_equal(found[name], moments[name][kind].numpy()) for name in found)


def test_a_checkpoint_of_ours_is_one_of_torch(tuned: TunedHere, tiny_model: ModelFolder, tmp_path: Path) -> None:
    start = start_values(tuned.bundle)
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal(start.flat.shape).astype(np.float32) for _ in range(3)]
    folder = CheckpointFolder(tmp_path, tuned.lora, fingerprint="f")
    for steps in range(1, 5):
        folder.save(State(vectors[0], vectors[1], np.abs(vectors[2]), (1.0,) * steps, start.fixed, (steps,)))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000003.safetensors", "step-000004.safetensors"]

    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    parameters = add_lora(adapter, blocks=(1, 5), rank=2, seed=99)
    optimizer = new_optimizer(parameters, Recipe(instance_prompt="x"))
    progressed = torch_checkpoint.CheckpointFolder(tmp_path, fingerprint="f").restore(parameters, optimizer)
    assert progressed.step == 4
    ours = by_name(tuned.lora, vectors[0]) | start.fixed
    assert all(np.array_equal(parameter.detach().numpy(), ours[name]) for name, parameter in parameters.items())
    second = by_name(tuned.lora, np.abs(vectors[2]))
    for name, parameter in parameters.items():
        assert (name in second) == (parameter in optimizer.state)
        if name in second:
            assert np.array_equal(optimizer.state[parameter]["exp_avg_sq"].numpy(), second[name])
            assert optimizer.state[parameter]["step"].item() == 4


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tuned: TunedHere, tmp_path: Path) -> None:
    start = start_values(tuned.bundle)
    folder = CheckpointFolder(tmp_path, tuned.lora, fingerprint="f")
    assert folder.restore(start).step == 0
    path = folder.save(fresh_state(start))
    assert np.array_equal(folder.restore(start).parameters, start.flat)
    with pytest.raises(RunError, match="another recipe"):
        CheckpointFolder(tmp_path, tuned.lora, fingerprint="g").restore(start)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunError, match="damaged"):
        folder.restore(start)
