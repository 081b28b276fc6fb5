"""Model folders as publishers lay them out, which differ from what `save_pretrained` writes today."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from safetensors.torch import load_file

from pocketune import Recipe, generate, personalize
from pocketune.errors import ModelError
from pocketune.models.load import ModelFolder
from tests.tiny_models import with_values

CPU = torch.device("cpu")
Pipelines = Callable[[str], ModelFolder]


def named_as_before(model: Path, folder: Path, *, norm: str = "ada_norm_single") -> Path:
    """A folder from before diffusers split `Transformer2DModel`, as those of PixArt are on the hub."""
    index = {"transformer": ["diffusers", "Transformer2DModel"]}
    config = {"_class_name": "Transformer2DModel", "norm_type": norm}
    return with_values(with_values(model, folder / "index", "model_index.json", index), folder / "all", CONFIG, config)


CONFIG = "transformer/config.json"


def test_pixart_under_its_former_class_name(tiny_pipelines: Pipelines, tmp_path: Path) -> None:
    model = tiny_pipelines("pixart")
    former = ModelFolder("former", named_as_before(model.path, tmp_path))
    assert (former.family, former.denoiser_kind) == (model.family, "PixArtTransformer2DModel")
    images = [generate(folder.path, ["a toy"], steps=2, resolution=64)[0] for folder in (model, former)]
    assert images[0].tobytes() == images[1].tobytes()
    prompts = [folder.encode_prompts(["a toy"], device=CPU)["a toy"].hidden for folder in (model, former)]
    assert torch.equal(*prompts)


def test_other_models_under_that_name_are_refused(tiny_pipelines: Pipelines, tmp_path: Path) -> None:
    folder = named_as_before(tiny_pipelines("pixart").path, tmp_path, norm="ada_norm_zero")
    with pytest.raises(ModelError, match="Transformer2DModel with norm_type ada_norm_zero"):
        ModelFolder("dit", folder)


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_weights_that_are_there_as_a_variant_alone(tiny_pipelines: Pipelines, tmp_path: Path, name: str) -> None:
    model = tiny_pipelines(name)
    folder = Path(shutil.copytree(model.path, tmp_path / "fp16"))
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    images = [generate(path, ["a toy"], steps=2, resolution=64)[0] for path in (model.path, folder)]
    assert images[0].tobytes() == images[1].tobytes()
    prompts = [ModelFolder(name, path).encode_prompts(["a toy"], device=CPU)["a toy"] for path in (model.path, folder)]
    assert torch.equal(prompts[0].hidden, prompts[1].hidden)
    ModelFolder(name, folder).load_vae(device=CPU)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_pickled_weights_are_not_opened(tiny_pipelines: Pipelines, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_pipelines("sd15").path, tmp_path / "pickled"))
    (weights,) = (folder / part).glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors, folder / part / ("pytorch_model.bin" if part == "text_encoder" else f"{weights.stem}.bin"))
    model = ModelFolder("pickled", folder)
    with pytest.raises(ModelError, match="safetensors"):
        model.load_vae(device=CPU) if part == "vae" else model.encode_prompts(["a toy"], device=CPU)


def test_a_model_with_the_noise_levels_of_edm_samples_and_does_not_train(
    tiny_pipelines: Pipelines, toy_photos: Path, tmp_path: Path
) -> None:
    """Its scheduler names none of the levels that DDPM would take, and DDPM's own would train it wrongly."""
    edm = EDMDPMSolverMultistepScheduler()
    index = {"scheduler": ["diffusers", type(edm).__name__]}
    folder = with_values(tiny_pipelines("sdxl").path, tmp_path / "edm", "model_index.json", index)
    shutil.rmtree(folder / "scheduler")
    edm.save_pretrained(folder / "scheduler")
    assert len(generate(folder, ["a toy"], steps=2, resolution=64)) == 1
    with pytest.raises(ModelError, match="EDM"):
        personalize(toy_photos, model=folder, recipe=Recipe.create(instance_prompt="a photo of sks toy"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
