"""`export-trainable` makes a bundle and verifies it; what it cannot do it says in one line, and leaves nothing behind."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pocketune.models.load import ModelFolder
from pocketune_edge.bundle import Bundle, open_bundle
from pocketune_export.cli import app
from pocketune_export.verify import TOLERANCE, Verification


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('instance_prompt = "a photo of sks toy"\nskip = "0-1"\nrank = 2\n')
    return path


def test_an_archive_is_made_and_verified(small_model: ModelFolder, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "toy.ptb"
    arguments = ["--model", str(small_model.path), "--recipe", str(recipe), "--out", str(out)]
    made = CliRunner().invoke(app, [*arguments, "--weights", "int8", "--json"])
    assert made.exit_code == 0, made.stderr
    told = json.loads(made.stdout)
    assert told["bundle"] == str(out)
    assert told["weights"] == "int8"
    assert told["planned_memory"]["one_graph_anonymous"] > 0
    bundle = open_bundle(out)
    assert told["size_bytes"] == bundle.total_bytes
    assert all(
        bundle.place(path).start % 64 == 0 for path in {path for graph in bundle.manifest.graphs for path in graph.weights}
    )
    arguments = ["verify", str(out), "--model", str(small_model.path), "--steps", "2"]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.stderr
    assert "bundle" in found.stderr  # the progress of hashing
    compared = json.loads(found.stdout)
    assert compared["passed"]
    assert compared["steps"] == 2
    assert set(compared["gradients"]) == {item.name for item in bundle.manifest.tuned.parameters if item.offset is not None}
    assert max(compared["parameters"].values()) == compared["largest_parameter_difference"]["value"] <= TOLERANCE
    quiet = CliRunner().invoke(app, ["--quiet", *arguments])  # before the command's name or behind it
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_quiet_export_prints_nothing(
    small_model: ModelFolder, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither by the command line nor by a library under it, which would write past the runner's streams."""
    arguments = ["--model", str(small_model.path), "--recipe", str(recipe), "--out", str(tmp_path / "toy"), "--quiet"]
    made = CliRunner().invoke(app, arguments)
    assert (made.exit_code, made.stdout, made.stderr) == (0, "", "")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "B"], "no recipe"),
        (["--recipe", "R"], "no place for the bundle"),
        (["--recipe", "nowhere.toml", "--out", "B"], "cannot read the recipe nowhere.toml"),
        (["--recipe", "R", "--out", "B", "--model", "./nowhere"], "no model ./nowhere"),
        (["--recipe", "R", "--out", "R"], "exists already"),
        (["--recipe", "R", "--out", "R", "--model", "./nowhere"], "exists already"),
        (["--recipe", "R", "--out", "R/B"], "cannot write"),
        (["--recipe", "R", "--out", "x" * 300], "File name too long"),
        (["--recipe", "TILES", "--out", "B", "--model", "./nowhere"], "cannot hold vae_tile"),
        (["--recipe", "R", "--out", "B", "--weights", "int2"], "int2"),
        (["--recipe", "R", "--out", "B", "--backend", "tea"], "tea"),
        (["--recipe", "R", "--out", "B", "--weights", "int4", "--weight-block", "1"], "weight-block"),
        (["--recipe", "R", "--out", "B", "--weights", "fp16", "--weight-block", "32"], "no scales for a block"),
        (["--recipe", "BAD", "--out", "B"], "the model has blocks 0 to 2"),
        (["--recipe", "LARGE", "--out", "B"], "resolution 512 does not fit"),
        (["verify", "nowhere"], "does not exist|no bundle"),
        (["verify", "R"], "not a bundle|no bundle"),
        (["verify", "BUNDLE", "--model", "MODEL", "--steps", "0"], "steps"),
        (["verify", "BUNDLE", "--model", "pocket-sd3"], "is not the model that was exported"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(
    arguments: list[str], message: str, small_model: ModelFolder, bundles: Mapping[str, Bundle], recipe: Path, tmp_path: Path
) -> None:
    bad, large, tiles = (tmp_path / f"{name}.toml" for name in ("bad", "large", "tiles"))
    bad.write_text('instance_prompt = "a toy"\nskip = "7"\n')
    large.write_text('instance_prompt = "a toy"\nresolution = 512\n')
    tiles.write_text('instance_prompt = "a toy"\nvae_tile = 64\n')
    names = {"R": recipe, "BAD": bad, "LARGE": large, "TILES": tiles, "B": tmp_path / "bundle", "R/B": recipe / "bundle"}
    names |= {"BUNDLE": bundles["fp32"].path, "MODEL": small_model.path}
    given = [str(names.get(argument, argument)) for argument in arguments]
    if "verify" not in given and "--model" not in given:
        given += ["--model", str(small_model.path)]
    before = sorted(path.name for path in tmp_path.iterdir())
    result = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    assert result.exit_code == 2

    assert re.search(message, result.stderr.replace("\n", " ")), result.stderr
    assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("loss", "gradient", "parameter", "passed"),
    [
        (0.0, 0.0, 5e-5, True),
        (0.0, 0.0, 2e-4, False),
        (2e-5, 0.0, 0.0, False),
        (0.0, 2e-5, 0.0, True),
        (0.0, 2e-4, 0.0, False),
        (0.0, 0.0, math.nan, False),
    ],
)
def test_each_difference_has_its_bar(loss: float, gradient: float, parameter: float, passed: bool) -> None:
    gradients, parameters = {"a": 0.0, "b": gradient}, {"a": 0.0, "b": parameter}
    assert Verification("one graph", 1, loss, gradients, parameters, parameter_tolerance=1e-4).passed == passed


def test_a_failed_verification_is_an_error(bundles: Mapping[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketune_export import verify

    worse = verify.Verification("one graph", 1, 0.0, {"a.lora_A": 0.0}, {"a.lora_A": 1.0})
    monkeypatch.setattr(verify, "verify", lambda *_, **__: worse)
    result = CliRunner().invoke(app, ["verify", str(bundles["fp32"].path)])
    assert result.exit_code == 2
    assert "a.lora_A" in result.stdout
    assert "does not train as PyTorch does" in result.stderr


def test_a_difference_that_is_no_number_is_null_for_machines(
    bundles: Mapping[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketune_export import verify

    worse = verify.Verification("one graph", 1, math.inf, {"a.lora_A": math.inf}, {"a.lora_A": math.inf})
    monkeypatch.setattr(verify, "verify", lambda *_, **__: worse)
    result = CliRunner().invoke(app, ["verify", str(bundles["fp32"].path), "--json"])

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    compared = json.loads(result.stdout, parse_constant=refuse)
    assert compared["loss_difference"] is None
    assert compared["gradients"] == {"a.lora_A": None}
    assert compared["largest_parameter_difference"] == {"name": "a.lora_A", "value": None}
