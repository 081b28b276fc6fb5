"""The inference model of a bundle in optimum's ORTDiffusionPipeline: a client of others, in its own environment."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pocketune import Recipe
from pocketune.errors import ModelError, RunError
from pocketune.models.load import ModelFolder, open_model
from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_edge.delta import Adapter, save_result, start_values
from pocketune_edge.denoiser import Denoiser
from pocketune_edge.errors import BundleError
from pocketune_edge.sample import decode
from pocketune_edge.session import Sessions
from pocketune_export.exporter import export_trainable
from pocketune_export.ort_pipeline import write_ort_pipeline
from tests.tolerances import EDGE_IMAGE_LEVELS

ROOT = Path(__file__).parents[2]
OPTIMUM = Path(os.environ.get("POCKETUNE_OPTIMUM", ROOT / "build" / "optimum")) / "bin" / "python"
PROMPTS = ("a red ball on grass", "a photo of a blue cat at night")
SAMPLING = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 128, "width": 128, "max_sequence_length": 0}
SCRIPT = """
import json, sys
import numpy as np, torch
from optimum.onnxruntime import ORTDiffusionPipeline

folder, noise, prompts, sampling, out = sys.argv[1:]
pipeline = ORTDiffusionPipeline.from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
images = [
    pipeline(prompt, latents=torch.from_numpy(latents)[None], output_type="np", **json.loads(sampling)).images[0]
    for prompt, latents in zip(json.loads(prompts), np.load(noise))
]
np.save(out, np.stack(images))
"""


def run(model: Path, **given: np.ndarray) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def test_the_joined_denoiser_is_the_blocks_one_after_the_other(
    bundle_in_pieces: Bundle, small_model: ModelFolder, tmp_path: Path
) -> None:
    """Also where blocks are in pieces."""
    bundle = bundle_in_pieces
    rng = np.random.default_rng(0)
    start = start_values(bundle)
    flat = rng.standard_normal(start.flat.shape).astype(np.float32) / 4
    save_result(bundle, Adapter(flat, start.fixed), tmp_path / "lora")
    write_ort_pipeline(bundle, tmp_path / "out", lora=tmp_path / "lora", model=small_model.path)
    sizes = bundle.manifest.batch
    given = {
        "noisy": rng.standard_normal((2, *sizes.latent_shape)).astype(np.float32),
        "timesteps": np.array([300.0, 700.0], np.float32),
        "prompt_hidden": rng.standard_normal((2, sizes.text_tokens, sizes.text_width)).astype(np.float32),
        "prompt_pooled": rng.standard_normal((2, sizes.pooled_width)).astype(np.float32),
    }
    asked = {
        "hidden_states": "noisy",
        "timestep": "timesteps",
        "encoder_hidden_states": "prompt_hidden",
        "pooled_projections": "prompt_pooled",
    }
    found = run(tmp_path / "out" / "transformer" / "model.onnx", **{name: given[own] for name, own in asked.items()})
    sessions = Sessions(bundle, keep=False, threads=1)
    (expected,) = Denoiser(sessions).predict([given], flat)
    np.testing.assert_allclose(found["out_hidden_states"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    (base,) = Denoiser(sessions).predict([given], np.zeros_like(flat))
    assert np.abs(base - expected).max() > 1e-2 * np.abs(expected).max()

    latents = given["noisy"][:1]
    pixels = run(tmp_path / "out" / "vae_decoder" / "model.onnx", latent_sample=latents)["sample"]
    np.testing.assert_allclose(pixels[0], decode(sessions, [latents])[0], atol=1e-5)
    texts = run(tmp_path / "out" / "text_encoder_2" / "model.onnx", input_ids=np.ones((1, 20), np.int64))
    assert list(texts) == ["text_embeds", "hidden_states.0", "last_hidden_state"]


def test_an_existing_folder_is_not_touched(bundle_in_pieces: Bundle, small_model: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="exists already"):
        write_ort_pipeline(bundle_in_pieces, tmp_path, model=small_model.path)
    assert list(tmp_path.iterdir()) == []


def test_a_unet_is_refused_before_anything_is_written(
    bundle_in_pieces: Bundle, tiny_pipelines: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="which this folder cannot hold yet"):
        write_ort_pipeline(bundle_in_pieces, tmp_path / "out", model=tiny_pipelines("sd15").path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_whole_or_not_at_all(
    bundle_in_pieces: Bundle, small_model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pocketune_export.ort_pipeline._denoiser", full)
    with pytest.raises(RunError, match="No space left"):
        write_ort_pipeline(bundle_in_pieces, tmp_path / "out", model=small_model.path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_outside_the_bundle_is_read_or_written(
    bundle_in_pieces: Bundle, small_model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the check of the bundle had seen another place than the graph's parser here."""
    weight = onnx.TensorProto(name="W", data_type=onnx.TensorProto.FLOAT, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../../secret.bin")
    graph = onnx.helper.make_graph([], "main", [], [], [weight])
    monkeypatch.setattr("pocketune_export.ort_pipeline._denoiser", lambda *_: onnx.helper.make_model(graph))
    with pytest.raises(BundleError, match="leaves the bundle"):
        write_ort_pipeline(bundle_in_pieces, tmp_path / "out", model=small_model.path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def ort_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pocket-sd3 with two rows, so that guidance works."""
    folder = tmp_path_factory.mktemp("optimum")
    recipe = Recipe(instance_prompt="a photo of sks toy", skip="auto", rank=2, batch_size=2)
    export_trainable(recipe=recipe, out=folder / "bundle")
    write_ort_pipeline(open_bundle(folder / "bundle"), folder / "pipeline")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not OPTIMUM.is_file(), reason="no environment with optimum: make it with `make optimum`")
def test_optimum_gives_the_pictures_of_diffusers(ort_folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    shape = open_bundle(ort_folder / "bundle").manifest.batch.latent_shape
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "noise.npy", noise.numpy())
    arguments = [
        ort_folder / "pipeline",
        tmp_path / "noise.npy",
        json.dumps(PROMPTS),
        json.dumps(SAMPLING),
        tmp_path / "out.npy",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [OPTIMUM, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=900, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        open_model("pocket-sd3").path, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = [
        pipeline(prompt, latents=noise[row : row + 1], output_type="np", **SAMPLING).images[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    difference = 255 * np.abs(np.load(tmp_path / "out.npy") - np.stack(expected))
    assert difference.max() <= EDGE_IMAGE_LEVELS
