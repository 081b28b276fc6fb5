"""The command line: progress, one-line errors, Ctrl-C."""

import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pocketune import Progress
from pocketune_edge.cli import main
from pocketune_edge.display import Display
from pocketune_edge.versions import installed_version
from tests.edge.handmade import make_bundle

COMMAND = [sys.executable, "-m", "pocketune_edge.cli"]


class Screen(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def training(done: int) -> Progress:
    return Progress(phase="training", done=done, total=300, unit="step", rss_bytes=123_400_000, loss=0.25 if done else None)


def shown(*, terminal: bool, quiet: bool = False) -> str:
    """Two photos in no time, then 300 steps of two seconds each."""
    seconds = 0.0
    screen = Screen(terminal=terminal)
    with Display(screen, quiet=quiet, clock=lambda: seconds) as display:
        for done in (0, 1, 2):
            display(Progress(phase="photos", done=done, total=2, unit="photo", rss_bytes=80_000_000))
        for done in range(301):
            display(training(done))
            seconds += 2
    return screen.getvalue()


def test_progress_shows_rate_time_left_and_memory() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0].split("  ")[0] == "photos" and lines[1].endswith("2/2 photos  80.0 MB")
    assert "training      0/300 steps  123 MB" in lines
    assert "training      5/300 steps  2.0 s a step  9 min 50 s left  loss 0.2500  123 MB" in lines
    assert lines[-1] == "training      300/300 steps  2.0 s a step  loss 0.2500  123 MB"
    assert len(lines) < 70  # a line every ten seconds


def test_a_terminal_gets_one_line_a_phase_and_quiet_gets_nothing() -> None:
    text = shown(terminal=True)
    assert text.count("\n") == 2 and "training    " in text and text.endswith("123 MB\n")
    assert shown(terminal=True, quiet=True) == shown(terminal=False, quiet=True) == ""


def test_a_resumed_phase_does_not_count_what_was_done_before() -> None:
    seconds = 0.0
    screen = Screen(terminal=False)
    display = Display(screen, clock=lambda: seconds)
    display(training(200))
    seconds = 20.0
    display(training(210))
    assert "2.0 s a step  3 min 0 s left" in screen.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "the bundle nowhere"),
        (["inspect", "evil\x1b[31m"], "the bundle "),
        (["personalize", "B", "nophoto.jpg", "--out", "run"], "nophoto.jpg"),
        (["personalize", "B", "P", "--out", "run", "--steps", "0"], "steps: expected a number of at least 1"),
        (["personalize", "B", "P", "--out", "run", "--threads", "0"], "threads must be between"),
        (["personalize", "B", "P", "--out", "taken"], "taken exists already"),
        (["personalize", "B", "P", "--out", "run", "--resume"], "no interrupted run"),
        (["sample", "B", "--prompt", "x", "--out", "x.gif"], "end in .png"),
        (["sample", "nowhere", "--prompt", "x", "--out", "taken/file/x.png"], "is no folder"),
        (["sample", "B", "--prompt", "x", "--lora", "nowhere"], "no LoRA or scales at nowhere"),
        (["sample", "nowhere", "--prompt", "x", "--lora", "nowhere"], "no LoRA or scales at nowhere"),
        (["sample", "nowhere", "--prompt", "x", "--threads", "0"], "threads must be between"),
        (["sample", "nowhere", "--prompt", "x", "--steps", "0"], "sample_steps: expected a number of at least 1"),
        (["sample", "nowhere", "--prompt", "x", "--guidance", "nan"], "guidance_scale: expected a float, got nan"),
        (["sample", "nowhere", "--prompt", "a \udcff"], "is not UTF-8 text"),
        (["personalize", "nowhere", "P", "--out", "run", "--seed", "-1"], "seed: expected a number of at least 0"),
        (["sample", "B", "--prompt", "x", "--lora", "x" * 300], "File name too long"),
        (["personalize", "B", "P", "--out", "x" * 300], "File name too long"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    toy_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "B")
    (tmp_path / "P").symlink_to(toy_photos)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    before = sorted(tmp_path.iterdir())
    assert main([*arguments, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message.replace("nowhere", "") in err.replace(str(tmp_path) + "/", "") and "\x1b" not in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["personalize", "B"], ["sample", "B", "--prompt", "x", "--steps", "many"]]
)
def test_so_is_what_argparse_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_a_library_without_metadata_has_no_known_version() -> None:
    assert installed_version("pocketune") != installed_version("of another name") == "unknown"


def test_a_bundle_is_hashed_with_progress(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(sound)]) == 0
    out, err = capsys.readouterr()
    assert (
        "trained_parameters" in out
        and re.search(r"^bytes +[0-9.]+ [kM]B$", out, re.MULTILINE)
        and err.startswith("bundle  ")
        and "megabyte" in err
    )
    assert main(["inspect", str(sound), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_missing_library_is_said_in_one_line() -> None:
    script = (
        "import sys; sys.modules['onnxruntime'] = None; from pocketune_edge.cli import main; sys.exit(main(['inspect', 'b']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: this command needs onnxruntime, .* pip install 'pocketune\[edge\]'\n", done.stderr)


def test_wrong_arguments_exit_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["personalize", "B"])
    assert "required" in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_go_on(skipping_bundle: Path, toy_photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*COMMAND, "personalize", str(skipping_bundle), str(toy_photos), "--out", str(run), "--threads", "1"]
    with subprocess.Popen([*command, "--steps", "1000"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "loss" in line:  # the first step is done
                process.send_signal(signal.SIGINT)
                break
        lines += process.stderr
        assert process.wait(timeout=60) == 130
    found = re.search(r"^interrupted: stopped after step (\d+) of 1000; a checkpoint is saved. Add --resume", lines[-1])
    assert found, lines
    assert max((run / "checkpoints").iterdir()).name == f"step-{int(found[1]):06d}.safetensors"
