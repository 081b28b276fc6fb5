"""The type to sample in, and that a LoRA is checked by its values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketune.delta as delta
import pocketune.sample as sample
from pocketune.delta import check_lora_loads, load_lora, save_lora
from pocketune.errors import FileFormatError, NoEffectError
from pocketune.methods.lora import add_lora
from pocketune.models import dit, mmdit
from pocketune.models.load import ModelFolder
from pocketune.models.registry import FAMILIES
from pocketune.runfolder import LORA_FILE, RECORD_FILE
from pocketune.sample import generate, sampling_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def trained(run: Path, dtype: str) -> Path:
    path = run / LORA_FILE
    path.parent.mkdir(parents=True)
    path.touch()
    (run / RECORD_FILE).write_text(f'{{"recipe": {{"dtype": "{dtype}"}}}}')
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_result_is_sampled_in_the_type_that_trained_it(tmp_path: Path, dtype: str) -> None:
    path = trained(tmp_path / "run", dtype)
    assert sampling_dtype(mmdit.FAMILY, GPU, result=path) == getattr(torch, dtype)
    assert sampling_dtype(mmdit.FAMILY, CPU, result=path) == torch.float32


def test_without_a_record_the_gpu_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "loras" / "toy.safetensors"
    (tmp_path / RECORD_FILE).write_text('{"recipe": {"dtype": "float32"}}')
    for capability, family, expected in (
        ((9, 0), mmdit.FAMILY, torch.bfloat16),
        ((8, 0), dit.SANA, torch.bfloat16),
        ((7, 5), mmdit.FAMILY, torch.float16),
        ((7, 5), dit.SANA, torch.float32),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert sampling_dtype(family, GPU) == sampling_dtype(family, GPU, result=elsewhere) == expected


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    path = trained(tmp_path / "run", "float32")
    (tmp_path / "run" / RECORD_FILE).write_text("{")
    with pytest.raises(FileFormatError, match=RECORD_FILE):
        sampling_dtype(mmdit.FAMILY, GPU, result=path)


def test_images_are_sampled_in_that_type(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(Exception):  # noqa: N818 - it ends the test
        pass

    def pipeline(_: ModelFolder, *, dtype: torch.dtype, **__: Any) -> None:
        raise Loaded(dtype)

    monkeypatch.setattr(sample, "sampling_dtype", lambda *_, **__: torch.bfloat16)
    monkeypatch.setattr(ModelFolder, "pipeline", pipeline)
    with pytest.raises(Loaded, match="bfloat16"):
        generate(tiny_folder, ["a toy"], device="cpu")


def test_the_autoencoder_of_sana_alone_decodes_in_float32() -> None:
    for family in FAMILIES.values():
        expected = torch.float32 if family is dit.SANA else torch.bfloat16
        assert family.vae_dtype(torch.bfloat16) == expected


def test_sana_reads_prompts_in_bfloat16_beside_a_float16_denoiser(tiny_pipelines: Callable[[str], ModelFolder]) -> None:
    """Gemma, its text encoder, overflows in float16."""
    for dtype, expected in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        pipeline = tiny_pipelines("sana").pipeline(dtype=dtype, device=CPU)
        assert (pipeline.text_encoder.dtype, pipeline.transformer.dtype) == (expected, dtype)
        assert mmdit.FAMILY.text_dtype(dtype) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_that_arrives_with_other_values_is_no_success(
    tiny_model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Rounded to the pipeline's type they are the same."""
    adapter = tiny_model.load_denoiser(dtype=torch.float32, device=CPU)
    parameters = add_lora(adapter, blocks=[1], rank=2)
    with torch.no_grad():
        for number, parameter in enumerate(parameters.values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    path = save_lora(adapter, tmp_path)
    check_lora_loads(tiny_model.pipeline(dtype=dtype, device=CPU), path)

    def load_wrongly(pipeline: Any, path: Path, *, name: str | None = None) -> None:
        load_lora(pipeline, path, name=name)
        next(value for key, value in pipeline.transformer.named_parameters() if "lora_A" in key).data.mul_(0.5)

    monkeypatch.setattr(delta, "load_lora", load_wrongly)
    with pytest.raises(NoEffectError, match=r"^1 of .* arrived with other values"):
        check_lora_loads(tiny_model.pipeline(dtype=dtype, device=CPU), path)
