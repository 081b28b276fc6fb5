"""The command line: what it asks of the library, what it prints, and how it fails."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file
from typer.testing import CliRunner

from pocketune import cli
from pocketune.commands import personalize as personalizing
from pocketune.commands import sample as sampling
from pocketune.commands.failures import needing_extra
from pocketune.display import ProgressDisplay, print_facts, printable
from pocketune.errors import Interrupted, ModelError, PocketuneError
from pocketune.memory import MemoryReading
from pocketune.progress import Progress
from pocketune.recipe import Recipe
from pocketune.record import CheckResult, RunRecord

runner = CliRunner()
TOY = ["--instance-prompt", "a photo of sks toy"]


def a_record(recipe: Recipe) -> RunRecord:
    return RunRecord(
        model="pocket-sd3",
        model_kind="SD3Transformer2DModel",
        model_note="an interim checkpoint",
        recipe=recipe,
        plan={"blocks": 12},
        losses=(0.5, 0.25),
        memory=(),
        peaks={"training": MemoryReading(500_000_000, 400_000_000, 100_000_000)},
        seconds={"training": 61.0},
        photos=("a.jpg",),
        samples=(),
        check=CheckResult(image_change=0.25, norms={"x": 1.0, "y": 0.0}),
        versions={},
        started="2030-01-01T00:00:00+00:00",
    )


class FakeJob:
    """Stands in for the training, which has tests of its own; remembers how it was called."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error = error

    def __call__(self, photos: list[Path], *, on_progress: Callable[[Progress], None], **given: Any) -> RunRecord:
        self.calls.append({"photos": photos, **given})
        if self.error is not None:
            raise self.error
        for done in range(3):
            on_progress(Progress(phase="training", done=done, total=2, unit="step", rss_bytes=500_000_000, loss=0.5))
        return a_record(given["recipe"])


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> FakeJob:
    fake = FakeJob()
    monkeypatch.setattr(personalizing, "import_job", lambda **_: fake)
    return fake


def one_line(stderr: str, start: str) -> None:
    assert stderr.startswith(start)
    assert stderr.count("\n") == 1 and "Traceback" not in stderr


@pytest.mark.parametrize("arguments", [[], ["personalize"], ["sample"], ["inspect"], ["doctor"]])
def test_help_works(arguments: list[str]) -> None:
    result = runner.invoke(cli.app, [*arguments, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize("command", ["personalize", "plan"])
def test_help_of_a_choice_names_every_value(command: str) -> None:
    told = {}
    for option in typer.main.get_command(cli.app).commands[command].params:  # type: ignore[attr-defined]
        field = Recipe.model_fields.get(option.name or "")
        if field is not None and get_origin(field.annotation) is Literal:
            values = get_args(field.annotation)
            told[option.name] = [value for value in values if value not in re.findall(r"[\w-]+", option.help)]
    assert {"method", "weights", "activations"} <= told.keys() and not any(told.values()), told


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom pocketune.cli import app\n"
        "assert CliRunner().invoke(app, ['personalize', '--help']).exit_code == 0\n"
        "sys.exit(bool({'torch', 'diffusers', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_reach_the_job(job: FakeJob, tmp_path: Path) -> None:
    options = ["--skip", "0-3", "--steps", "7", "--rank", "2", "--seed", "5", "--resolution", "64", "--batch-size", "2"]
    more = ["--learning-rate", "0.5", "--class-prompt", "a photo of a toy", "--model", "folder", "--resume"]
    result = runner.invoke(cli.app, ["personalize", "a.jpg", "b", *TOY, "--out", str(tmp_path / "run"), *options, *more])
    assert result.exit_code == 0, result.stderr
    (call,) = job.calls
    assert call == {
        "photos": [Path("a.jpg"), Path("b")],
        "recipe": Recipe(
            instance_prompt="a photo of sks toy",
            class_prompt="a photo of a toy",
            skip="0-3",
            steps=7,
            rank=2,
            seed=5,
            resolution=64,
            batch_size=2,
            learning_rate=0.5,
        ),
        "out": tmp_path / "run",
        "model": "folder",
        "resume": True,
    }


def test_options_not_given_leave_the_recipe_alone(job: FakeJob, tmp_path: Path) -> None:
    runner.invoke(cli.app, ["personalize", "a.jpg", *TOY, "--out", "run"])
    assert job.calls[0]["recipe"] == Recipe(instance_prompt="a photo of sks toy")
    file = tmp_path / "recipe.toml"
    file.write_text('instance_prompt = "a photo of sks cat"\nsteps = 9\nrank = 8\n')
    runner.invoke(cli.app, ["personalize", "a.jpg", "--recipe", str(file), "--rank", "3", "--out", "run"])
    assert job.calls[1]["recipe"] == Recipe(instance_prompt="a photo of sks cat", steps=9, rank=3)


def test_json_is_one_object_on_stdout(job: FakeJob) -> None:
    result = runner.invoke(cli.app, ["personalize", "a.jpg", *TOY, "--out", "run", "--json"])
    values = json.loads(result.stdout)
    assert values["check"] == {"tensors": 2, "moved": 1, "image_change": 0.25}
    assert (values["steps"], values["last_loss"], values["report"]) == (2, 0.25, str(Path("run/report.html")))
    assert "training: 2/2 steps loss 0.5000 (500 MB)" in result.stderr


def test_text_names_the_result_and_the_note(job: FakeJob) -> None:
    result = runner.invoke(cli.app, ["personalize", "a.jpg", *TOY, "--out", "run"])
    for expected in (
        "report.html",
        "pytorch_lora_weights.safetensors",
        "1 min 1 s",
        "500 MB",
        "25.0 %",
        "an interim checkpoint",
    ):
        assert expected in result.stdout, expected


def test_quiet_prints_nothing(job: FakeJob) -> None:
    result = runner.invoke(cli.app, ["personalize", "a.jpg", *TOY, "--out", "run", "--quiet"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert json.loads(runner.invoke(cli.app, ["personalize", "a.jpg", *TOY, "--out", "run", "--quiet", "--json"]).stdout)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["personalize", "a.jpg", "--out", "run"], "no instance prompt"),
        (["personalize", "a.jpg", *TOY, "--out", "run", "--steps", "0"], "steps"),
        (["personalize", "a.jpg", *TOY, "--out", "run", "--learning-rate", "-1"], "learning_rate"),
        (["personalize", "a.jpg", *TOY, "--out", "run", "--recipe", "no-such.toml"], "no-such.toml"),
        (["sample", "run", "--prompt", "a", "--out", "image.txt"], "image.txt"),
        (["sample", "run", "--prompt", "a", "--out", "/dev/null/image.png"], "/dev/null is no folder"),
        (["sample", "x" * 5000, "--prompt", "a"], "File name too long"),
        (["select-blocks", "--out", "."], "it is a folder"),
        (["select-blocks", "--out", "selection.html"], "where the page would go"),
        (["select-blocks", "--out", "/dev/null/selection.json"], "/dev/null is no folder"),
        (["inspect", "no-such-file"], "no-such-file"),
    ],
)
def test_bad_input_is_one_clear_line(job: FakeJob, arguments: list[str], expected: str) -> None:
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 2
    one_line(result.stderr, "error: ")
    assert expected in result.stderr and result.stdout == "" and job.calls == []


def test_missing_or_unknown_option_is_refused(job: FakeJob) -> None:
    assert runner.invoke(cli.app, ["personalize", "a.jpg", *TOY]).exit_code == 2
    assert runner.invoke(cli.app, ["personalize", "--out", "run", *TOY]).exit_code == 2
    assert runner.invoke(cli.app, ["personalize", "a.jpg", *TOY, "--out", "run", "--no-such"]).exit_code == 2
    assert job.calls == []


@pytest.mark.parametrize("command", [["sample", "run", "--prompt", "a"], ["select-blocks", "--out", "selection.json"]])
@pytest.mark.parametrize("seed", ["-1", f"{2**63}", "99999999999999999999"])
def test_a_seed_that_torch_cannot_take_is_refused(command: list[str], seed: str) -> None:
    result = runner.invoke(cli.app, [*command, "--seed", seed])
    assert result.exit_code == 2 and "Usage" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (ModelError("no model x:\ngive \x1b[31manother."), 2, "error: no model x: give  [31manother."),
        (Interrupted("stopped after step 3. Go on with --resume."), 130, "interrupted: stopped after step 3"),
        (KeyboardInterrupt(), 130, "interrupted: give the same command to start again"),
    ],
)
def test_errors_of_the_job_become_exit_codes(job: FakeJob, error: BaseException, code: int, start: str, tmp_path: Path) -> None:
    job.error = error
    result = runner.invoke(cli.app, ["personalize", "a.jpg", *TOY, "--out", str(tmp_path / "run"), "--quiet"])
    assert (result.exit_code, result.stdout) == (code, "")
    one_line(result.stderr, start)


def test_interruption_that_left_a_run_says_how_to_go_on(job: FakeJob, tmp_path: Path) -> None:
    job.error = KeyboardInterrupt()
    result = runner.invoke(cli.app, ["personalize", "a.jpg", *TOY, "--out", str(tmp_path), "--quiet"])
    assert result.exit_code == 130 and "--resume" in result.stderr


def test_mistakes_of_the_program_are_not_dressed_up(job: FakeJob) -> None:
    job.error = ZeroDivisionError()
    assert isinstance(runner.invoke(cli.app, ["personalize", "a.jpg", *TOY, "--out", "run"]).exception, ZeroDivisionError)


def test_a_budget_is_planned_before_the_libraries_are_there(
    job: FakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        personalizing, "ask_apart", lambda recipe, question: asked.append((recipe, question)) or {"settings": {}}
    )
    command = ["personalize", "a.jpg", *TOY, "--out", str(tmp_path / "run"), "--memory-budget", "1GiB"]
    assert runner.invoke(cli.app, command).exit_code == 0
    assert job.calls[-1]["memory_budget"] == 2**30
    assert job.calls[-1]["made_plan"] == {"settings": {}}
    assert asked[0][1].photos == ("a.jpg",)
    assert runner.invoke(cli.app, [*command, "--resume"]).exit_code == 0
    assert job.calls[-1]["made_plan"] is None
    assert len(asked) == 1
    one_line(runner.invoke(cli.app, [*command[:-1], "much"]).stderr, "error: ")


def test_missing_extra_is_named() -> None:
    with pytest.raises(PocketuneError, match=r"needs torch.*pocketune\[train\]"), needing_extra("train"):
        raise ModuleNotFoundError(name="torch")
    with pytest.raises(ModuleNotFoundError), needing_extra("train"):
        raise ModuleNotFoundError(name="pocketune.lost")


class FakeGenerate:
    """Stands in for the pipeline; remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, model: str, prompts: list[str], *, on_image: Callable[[int, int], None], **given: Any
    ) -> list[Image.Image]:
        self.calls.append({"model": model, "prompts": prompts, **given})
        on_image(len(prompts), len(prompts))
        return [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(len(prompts))]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakeGenerate:
    fake = FakeGenerate()
    monkeypatch.setattr(sampling, "import_generate", lambda: fake)
    return fake


def test_sample_writes_one_image_for_each_prompt(pipeline: FakeGenerate, tmp_path: Path) -> None:
    out = tmp_path / "image.png"
    result = runner.invoke(
        cli.app, ["sample", "x.safetensors", "--prompt", "a", "--prompt", "b", "--seed", "4", "--out", str(out)]
    )
    assert result.exit_code == 0, result.stderr
    asked = {"prompts": ["a", "b"], "lora": Path("x.safetensors"), "seeds": [4, 5], "streamed": False}
    assert pipeline.calls == [{"model": "pocket-sd3", **asked}]
    names = ["image-00.png", "image-01.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [np.asarray(Image.open(tmp_path / name))[0, 0, 0] for name in names] == [0, 1]
    assert result.stdout.split() == [str(tmp_path / name) for name in names]


def test_sample_takes_model_and_settings_from_the_run(pipeline: FakeGenerate, tmp_path: Path) -> None:
    recipe = Recipe(instance_prompt="a photo of sks toy", sample_steps=11, guidance_scale=3.0, resolution=64)
    (tmp_path / "run.json").write_text(replace(a_record(recipe), model="other/model").to_text())
    command = ["sample", str(tmp_path), "--prompt", "a", "--out", str(tmp_path / "a.jpg"), "--json"]
    result = runner.invoke(cli.app, command)
    assert json.loads(result.stdout)["images"] == [str(tmp_path / "a.jpg")]
    assert runner.invoke(cli.app, [*command, "--guidance", "0", "--steps", "2", "--model", "mine"]).exit_code == 0
    shared = {"prompts": ["a"], "lora": tmp_path, "seeds": [0], "resolution": 64, "streamed": False}
    assert pipeline.calls == [
        {"model": "other/model", "steps": 11, "guidance": 3.0, **shared},
        {"model": "mine", "steps": 2, "guidance": 0.0, **shared},
    ]


def test_a_search_wants_runs_that_skip_nothing(tmp_path: Path) -> None:
    skipping = replace(a_record(Recipe(instance_prompt="a photo of sks toy")), plan={"blocks": 12, "skipped": "0-3"})
    (tmp_path / "run.json").write_text(skipping.to_text())
    out = tmp_path / "selection.json"
    result = runner.invoke(cli.app, ["select-blocks", "--run", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 2 and "blocks 0-3 skipped" in " ".join(result.stderr.split())
    assert not out.exists()


def test_inspect_gives_json_and_text_without_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"weight": np.ones((2, 3), np.float32)}, path, metadata={"note": "\x1b[31mred\nline"})
    values = json.loads(runner.invoke(cli.app, ["inspect", str(path), "--json"]).stdout)
    assert values["kind"] == "tensors" and values["facts"]["parameters"] == 6
    text = runner.invoke(cli.app, ["inspect", str(path)]).stdout
    assert "tensors" in text and "[31mred line" in text and "\x1b[31m" not in text


def test_doctor_gives_json() -> None:
    result = runner.invoke(cli.app, ["doctor", "--json"])
    values = json.loads(result.stdout)
    assert result.exit_code == 0 and values["cpu"]["logical_cores"] >= 1 and values["advice"]


def test_version_is_printed() -> None:
    assert runner.invoke(cli.app, ["--version"]).stdout.startswith("pocketune 0.")


def test_bars_show_phase_count_memory_and_loss_in_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with ProgressDisplay(console) as display:
        display(Progress(phase="photos", done=0, total=0, unit="photo", rss_bytes=100_000_000))
        display(Progress(phase="training", done=3, total=3, unit="step", rss_bytes=512_000_000, loss=0.25))
    shown = stream.getvalue()
    for expected in ("photos", "training", "3/3 steps", "512 MB", "loss 0.2500"):
        assert expected in shown, expected


def test_facts_are_printed_in_units_and_nested() -> None:
    stream = io.StringIO()
    facts = {
        "size_bytes": 2_500_000,
        "ok": True,
        "none": None,
        "cpu": {"cores": 2},
        "gpus": [{"name": "[b]x"}],
        "flags": ["a", "b"],
        "many": dict.fromkeys(map(str, range(99)), 0.5),
        "long": "x" * 1000,
    }
    print_facts(Console(file=stream, width=80), facts)
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert lines[:9] == [
        "size 2.5 MB",
        "ok yes",
        "none -",
        "cpu",
        "cores 2",
        "gpus 0",
        "name [b]x",
        "flags a, b",
        "many 99 numbers",
    ]
    assert sum(line.count("x") for line in lines[9:]) == 300 and lines[-1].endswith("...")
    assert printable("a\x07\x1b\nb") == "a   b"


def test_files_of_a_bundle_are_shown_in_units(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "graphs": {}}')
    (tmp_path / "train.onnx").write_bytes(bytes(1_500_000))
    shown = runner.invoke(cli.app, ["inspect", str(tmp_path)]).stdout
    assert re.search(r"train.onnx +1.5 MB", shown)
