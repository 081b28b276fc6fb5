"""`pocketune select-blocks`: what it refuses, and that it does so before anything that takes long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel
from typer.testing import CliRunner

from pocketune import cli
from pocketune.errors import Interrupted
from pocketune.plan.selection import Measured, Selection
from pocketune.recipe import Recipe
from pocketune.selection import search, sources, toys
from tests.unit.test_cli import a_record

PROMPT = "a photo of sks toy"
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def slow_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may train toys or open a pipeline."""

    def too_late(*_: object, **__: object) -> None:
        pytest.fail("slow work began before the command was refused")

    monkeypatch.setattr(sources, "personalized_toys", too_late)
    monkeypatch.setattr(search.ModelFolder, "pipeline", too_late)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, as far as a search reads it before it samples."""
    return a_run(tmp_path / "run")


def a_run(folder: Path, **settings: Any) -> Path:
    (folder / "lora").mkdir(parents=True)
    (folder / "run.json").write_text(a_record(Recipe(instance_prompt=PROMPT, **settings)).to_text())
    (folder / "lora" / "pytorch_lora_weights.safetensors").write_bytes(folder.name.encode())
    return folder


def command(out: Path, *options: object) -> Result:
    return CliRunner().invoke(cli.app, ["select-blocks", "--quiet", "--out", str(out), *map(str, options)])


def refused(out: Path, *options: object) -> str:
    result = command(out, *options)
    assert result.exit_code == 2 and not out.exists(), result.output
    return " ".join(result.stderr.split())


def test_a_unet_is_refused_before_toys_are_trained(tmp_path: Path) -> None:
    assert "pocket-sd15 is a U-Net" in refused(tmp_path / "s.json", "--model", "pocket-sd15")
    assert "pocket-sd15 is a U-Net" in refused(
        tmp_path / "s.json", "--model", "pocket-sd15", "--embedder", "dino", "--embedder-model", tmp_path
    )


def test_the_beginning_of_another_search_is_refused_before_toys_are_trained(tmp_path: Path) -> None:
    begun = Selection(
        model="pocket-sd3",
        fingerprint="of other weights",
        blocks=12,
        embedder="pocket",
        steps=9,
        guidance=4.0,
        resolution=128,
        seeds=(0,),
        models=(Measured(name="toy00", lora="00ff", prompts=(PROMPT,)),),
    )
    begun.write(tmp_path / "s.json.partial")
    expected = "differs in weights of the model, weights of the embedder, steps. Delete it"
    assert expected in refused(tmp_path / "s.json")


def test_options_without_effect_are_refused(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "s.json"
    assert "takes no --embedder-model" in refused(out, "--run", run, "--embedder", "pocket", "--embedder-model", "X")
    assert "takes no --embedder-model" in refused(out, "--embedder-model", "X")
    assert "Leave out --work, or --run" in refused(out, "--run", run, "--work", tmp_path / "work")
    assert "are one LoRA" in refused(out, "--run", run, "--run", run)


def test_a_judge_of_another_kind_is_refused_before_toys_are_trained(tmp_path: Path) -> None:
    ViTModel(ViTConfig(image_size=8, patch_size=4, **TINY)).save_pretrained(tmp_path / "vit")
    CLIPModel(
        CLIPConfig(
            text_config=TINY | {"vocab_size": 16},
            vision_config=TINY | {"image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    ).save_pretrained(tmp_path / "clip")
    for kind, other, name in (("clip", "vit", "ViTModel, expected a CLIP"), ("dino", "clip", "CLIPModel, expected a DINO")):
        assert name in refused(tmp_path / "s.json", "--embedder", kind, "--embedder-model", tmp_path / other)


def test_a_search_samples_at_the_guidance_of_its_runs(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def stop(found: Any, number: int, _: Path) -> None:
        asked.append(found.selection.guidance)
        raise KeyboardInterrupt

    monkeypatch.setattr(search._Search, "measure", stop)
    low, lower = (a_run(tmp_path / str(scale), guidance_scale=scale) for scale in (3.0, 2.5))
    for given in (run, low):
        assert command(tmp_path / "s.json", "--run", given).exit_code == 130
    assert asked == [7.0, 3.0]
    assert "guidance scales 2.5, 3.0" in refused(tmp_path / "s.json", "--run", low, "--run", lower)


@pytest.mark.parametrize("error", [Interrupted("stopped after step 3. Add --resume to go on."), KeyboardInterrupt()])
def test_interrupted_training_of_toys_says_how_this_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(toys, "personalize", interrupted)
    monkeypatch.setattr(sources, "personalized_toys", toys.personalized_toys)
    result = command(tmp_path / "s.json")
    assert result.exit_code == 130 and "--resume" not in result.stderr
    assert "Give the same command to go on" in " ".join(result.stderr.split())
    assert not (tmp_path / "s.json").exists()


def test_equal_weights_are_one_judge_and_others_another(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    from pocketune.embedders import DinoEmbedder

    digests = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            ViTModel(ViTConfig(image_size=8, patch_size=4, **TINY)).save_pretrained(tmp_path / name)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / name)
        digests.append(DinoEmbedder(str(tmp_path / name)).digest)
    assert digests[0] == digests[1] != digests[2]
