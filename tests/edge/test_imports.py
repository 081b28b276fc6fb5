"""The edge runtime runs where torch and its kind do not exist."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.edge.handmade import make_bundle

ABSENT = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "pydantic",
    "typer",
    "rich",
    "onnx",
    "onnx_ir",
    "psutil",
)

SCRIPT = """
import importlib, pkgutil, sys

before = set(sys.modules)

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"{{name}} is absent here", name=name)

sys.meta_path.insert(0, Absent())
import pocketune_edge
for module in pkgutil.iter_modules(pocketune_edge.__path__):
    importlib.import_module(f"pocketune_edge.{{module.name}}")
from pocketune_edge.cli import main
code = main({arguments!r})
known = {{"pocketune", "pocketune_edge", "numpy", "onnxruntime", "PIL", "tokenizers", "safetensors"}}
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not loaded & set({absent!r}), loaded & set({absent!r})
others = {{
    name for name in loaded - known - set(sys.stdlib_module_names)
    if "site-packages" in (getattr(sys.modules[name], "__file__", None) or "")
}}
assert not others, others
sys.exit(code)
"""


def test_personalizes_and_samples_without_torch(skipping_bundle: Path, toy_photos: Path, tmp_path: Path) -> None:
    common = ("--threads", "1", "--quiet", "--json")
    given = ("--instance-prompt", "a photo of sks cat", "--steps", "2", "--streaming")
    done = run("personalize", str(skipping_bundle), str(toy_photos), "--out", str(tmp_path / "run"), *given, *common)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 2 and Path(result["lora"]).is_file() and result["peaks"]["training"]["rss_bytes"] > 0
    record = json.loads(Path(result["record"]).read_text())
    assert record["recipe"]["instance_prompt"] == "a photo of sks cat"
    assert done.stderr == ""

    image = tmp_path / "image.png"
    sampled = ("--lora", result["run"], "--prompt", "a photo of sks cat", "--steps", "2", "--out", str(image))
    done = run("sample", str(skipping_bundle), *sampled, *common)
    assert done.returncode == 0, done.stderr
    base = tmp_path / "base.png"
    assert run("sample", str(skipping_bundle), *sampled[2:-1], str(base), *common).returncode == 0
    with Image.open(image) as first, Image.open(base) as second:
        assert first.size == (64, 64) and first.tobytes() != second.tobytes()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(absent=ABSENT, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)


def test_every_module_and_the_command_line_without_torch(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    done = run("inspect", str(tmp_path / "b"), "--json")
    assert done.returncode == 0, done.stderr
    assert '"trained_parameters": 256' in done.stdout
