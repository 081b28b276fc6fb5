"""What cannot be sampled is said before anything is loaded."""

from pathlib import Path

import pytest
import torch

from pocketune.errors import FileFormatError, ModelError, PlanError, PocketuneError, RecipeError
from pocketune.job import personalize
from pocketune.models.load import ModelFolder, open_model
from pocketune.recipe import Recipe
from pocketune.sample import device_named, generate
from pocketune.tuning import find_result


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError

    for name in ("pipeline", "text_pipeline", "load_denoiser", "load_vae"):
        monkeypatch.setattr(ModelFolder, name, load)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"steps": 0}, PlanError, "0 sampler steps do not fit pocket-sd15: expected 1 to 1000"),
        ({"steps": 1001}, PlanError, "1001 sampler steps"),
        ({"resolution": -16}, PlanError, "resolution -16"),
        ({"resolution": 0}, PlanError, "resolution 0"),
        ({"prompts": "abc"}, RecipeError, "a single text"),
        ({"prompts": ["a", "b"], "seeds": [1]}, RecipeError, "1 seeds for 2 prompts"),
        ({"seeds": [2**64]}, RecipeError, "expected 0 to 2"),
        ({"seeds": [-1]}, RecipeError, "expected 0 to 2"),
        ({"guidance": float("inf")}, RecipeError, "finite"),
        ({"guidance": float("nan")}, RecipeError, "finite"),
        ({"device": "foo"}, RecipeError, "no device foo"),
        ({"device": "cuda:999"}, RecipeError, "no device cuda:999: torch finds"),
        ({"model": "x" * 5000}, ModelError, "too long"),
        ({"lora": "x" * 5000}, FileFormatError, "too long"),
    ],
)
def test_an_argument_that_makes_no_image_is_refused(changes: dict[str, object], kind: type[PocketuneError], words: str) -> None:
    asked: dict[str, object] = {"model": "pocket-sd15", "prompts": ["a toy"]} | changes
    with pytest.raises(kind, match=words):
        generate(**asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": Recipe(instance_prompt="a sks toy", sample_steps=1001)}, "1001 sampler steps"),
        ({"device": "foo"}, "no device foo"),
        ({"memory_budget": 0}, "no size of memory"),
        ({"memory_budget": -1}, "no size of memory"),
    ],
)
def test_a_job_that_could_not_end_is_not_begun(
    changes: dict[str, object], words: str, toy_photos: Path, tmp_path: Path
) -> None:
    asked: dict[str, object] = {"recipe": Recipe(instance_prompt="a sks toy"), "model": "pocket-sd15"} | changes
    with pytest.raises(PocketuneError, match=words):
        personalize(toy_photos, out=tmp_path / "run", **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_without_a_name_there_is_a_device() -> None:
    assert device_named("cpu") == torch.device("cpu")
    assert device_named(None).type in ("cpu", "cuda")


def test_a_place_that_may_not_be_looked_at_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(FileFormatError, match="Permission denied"):
        find_result(tmp_path)
    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ModelError, match="Permission denied"):
        open_model(tmp_path)
