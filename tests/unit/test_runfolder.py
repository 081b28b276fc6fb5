"""RUN folders: what took long to make is never thrown away, and nothing else is left behind."""

import pytest

from pocketune.errors import RunError
from pocketune.runfolder import run_folder


@pytest.mark.parametrize(
    ("made", "kept"),
    [
        (None, False),
        ("samples/00.png", False),
        ("features/abc/.shard-0000.safetensors.x.partial", False),
        ("class_images/000.png", True),
        ("features/abc/shard-0000.safetensors", True),
        ("checkpoints/step-000001.safetensors", True),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError, MemoryError])
def test_a_run_that_fails_keeps_what_took_long(tmp_path, made, kept, error):
    run = tmp_path / "run"
    with pytest.raises(error), run_folder(run, resume=False, fingerprint="f"):
        if made:
            (run / made).parent.mkdir(parents=True)
            (run / made).touch()
        raise error
    assert run.exists() == kept
    if kept:
        with run_folder(run, resume=True, fingerprint="f"):
            assert (run / made).exists()


def test_a_place_that_cannot_be_looked_at_is_refused(tmp_path):
    run = tmp_path / ("x" * 300)
    for resume in (False, True):
        with pytest.raises(RunError, match="File name too long"), run_folder(run, resume=resume, fingerprint="f"):
            pass
