"""The Python of docs/edge.md runs, at tiny scale."""

import re
from pathlib import Path

import pytest
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "edge.md"


def test_the_page_on_devices(
    skipping_bundle: Path, toy_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for full, tiny in {
        '"bundles/toy"': repr(str(skipping_bundle)),
        '"demo/photos/toy"': repr(str(toy_photos)),
        '{"steps": 200}': '{"steps": 2}',
        "steps=20": "steps=2",
    }.items():
        assert full in code
        code = code.replace(full, tiny)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    with Image.open("toy.png") as image:
        assert image.size == (64, 64)
    assert "training 2/2" in capsys.readouterr().out
