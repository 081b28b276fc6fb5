"""The Python in README and docs runs: at tiny scale where it trains, as it stands elsewhere."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from pocketune.recipe import Recipe
from pocketune.record import RunRecord

ROOT = Path(__file__).parent.parent.parent
SETTINGS = "steps=300, learning_rate=4e-3, rank=8"
TINY_SETTINGS = 'steps=4, learning_rate=1e-2, rank=2, sample_steps=2, sample_prompts=("a photo of sks toy",)'


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(code: str, page: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": page}
    exec(compile(code, page, "exec"), names)
    return names


def at_tiny_scale(code: str, model: Path, photos: Path) -> str:
    for full, tiny in {
        SETTINGS: TINY_SETTINGS,
        '"pocket-sd3"': repr(str(model)),
        '"demo/photos/toy"': repr(str(photos)),
    }.items():
        assert full in code, f"{full} is not in the code any more: adapt this test"
        code = code.replace(full, tiny)
    return code


def test_readme_code_personalizes_and_samples(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks("README.md")
    monkeypatch.chdir(tmp_path)
    names = run(at_tiny_scale(code, tiny_folder, toy_photos), "README.md")
    assert names["record"].check.image_change > 0
    assert RunRecord.read(tmp_path / "runs/toy/run.json") == names["record"]
    assert (tmp_path / "toy-in-snow.png").stat().st_size > 0
    assert "training 4 4" in capsys.readouterr().out


def test_embedding_page_shows_progress_stops_and_goes_on(
    tiny_folder: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "".join(blocks("docs/embedding.md"))
    monkeypatch.chdir(tmp_path)
    names = run(at_tiny_scale(code, tiny_folder, toy_photos), "docs/embedding.md")
    shown = capsys.readouterr().out
    assert "training: 100%" in shown and "stopped after step 2 of 4" in shown
    lora = "lora/pytorch_lora_weights.safetensors"
    assert (tmp_path / "runs/toy" / lora).read_bytes() == (tmp_path / "runs/stopped" / lora).read_bytes()
    assert len(names["record"].losses) == 4


@pytest.mark.parametrize(
    "page",
    [
        "docs/concepts.md",
        "docs/models.md",
        "docs/methods/block-skip.md",
        "docs/methods/block-selection.md",
        "docs/methods/dynamic-patches.md",
        "docs/methods/hollowed-net.md",
        "docs/decisions/0001-absolute-prefix.md",
    ],
)
def test_code_of_the_other_pages_runs(page: str) -> None:
    found = blocks(page)
    assert found
    run("\n".join(found), page)


def test_the_page_of_the_recipe_has_every_field() -> None:
    """Some by a common beginning, as `zo_*`."""
    named = re.findall(r"`(\w+\*?)`", (ROOT / "docs/recipe.md").read_text(encoding="utf-8"))
    assert [field for field in Recipe.model_fields if not any(fnmatch(field, name) for name in named)] == []


def test_links_between_pages_lead_somewhere() -> None:
    later = {"docs/images/demo.png"}
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                place = (path.parent / target).resolve()
                assert place.exists() or place.relative_to(ROOT.resolve()).as_posix() in later, f"{path}: {target}"
