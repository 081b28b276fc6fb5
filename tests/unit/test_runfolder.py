"""RUN folders: what took long to make is never thrown away, and nothing else is left behind."""

import pytest

from pocketune.errors import RunError
from pocketune.runfolder import class_image_paths, hash_of, run_fingerprint, run_folder


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


def test_runs_and_caches_of_earlier_versions_are_found_again():
    recipe = {"instance_prompt": "a photo of sks toy", "steps": 3, "learning_rate": 1e-4, "lora_targets": ("attn.to_q",)}
    recipe |= {"skip": None, "token": "ü"}
    assert run_fingerprint(recipe, model="m", photos=("b", "a")) == "ab8f97d53cc57a36"
    assert hash_of({"photos": ["b", "a"], "model": "m", "recipe": recipe}) == "ab8f97d53cc57a36"
    assert run_fingerprint(recipe, model="m", photos=("a", "b")) != "ab8f97d53cc57a36"


def test_class_images_are_where_a_stopped_run_left_them(tmp_path):
    assert class_image_paths(tmp_path, 2) == [tmp_path / "class_images" / name for name in ("000.png", "001.png")]


@pytest.mark.parametrize(
    ("there", "out"), [("empty", "empty"), ("empty", "link"), ("", "new"), ("", "deep/a/b"), ("empty", "empty/a/b")]
)
def test_a_run_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, there, out):
    (tmp_path / there).mkdir(exist_ok=True)
    if out == "link":
        (tmp_path / out).symlink_to(tmp_path / there)
    before = sorted(tmp_path.rglob("*"))
    run = tmp_path / out
    with pytest.raises(RunError), run_folder(run, resume=False, fingerprint="f"):
        (run / "samples").mkdir()
        (run / "samples/00.png").touch()
        raise RunError
    assert sorted(tmp_path.rglob("*")) == before
    with run_folder(run, resume=False, fingerprint="f"):
        pass


def test_what_another_program_put_beside_a_failed_run_stays(tmp_path):
    with pytest.raises(RunError), run_folder(tmp_path / "deep/a/b", resume=False, fingerprint="f"):
        (tmp_path / "deep/other").touch()
        raise RunError
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["other"]
