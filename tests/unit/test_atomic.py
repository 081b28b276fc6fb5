"""A file is replaced whole or not at all, and nothing is left beside it."""

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest

from pocketune.atomic import check_writable, replacing, write_text
from pocketune.errors import PocketuneError, RunError


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with replacing(path) as partial:
        partial.write_text("whole")
        assert partial.parent == path.parent
        assert not path.exists()
    assert contents(path.parent) == {"a.txt": "whole"}


def test_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with replacing(path) as partial:
        partial.write_text("ne")
        assert path.read_text() == "old"
        partial.write_text("new")
    assert contents(tmp_path) == {"a.txt": "new"}


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "a.txt", "Grüße")
    assert (tmp_path / "a.txt").read_bytes() == "Grüße".encode()


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, PocketuneError, MemoryError])
def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path, failure):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(failure), replacing(path) as partial:
        partial.write_text("half")
        raise failure
    assert contents(tmp_path) == {"a.txt": "old"}


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "text")
        assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write"):
        write_text(tmp_path / "file" / "a.txt", "text")
    assert contents(tmp_path) == {"file": "in the way"}


def test_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        write_text(tmp_path / "a.txt", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_that_fails_late(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    with pytest.raises(RunError) as caught:
        write_text(path, "new")
    assert "No space left on device" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "Free some space" in str(caught.value)
    monkeypatch.undo()
    assert contents(tmp_path) == {"a.txt": "old"}


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(tiny_disk):
    path = tiny_disk / "a.txt"
    write_text(path, "old")
    with pytest.raises(RunError, match="No space left on device"):
        write_text(path, "x" * 200_000)
    assert contents(tiny_disk) == {"a.txt": "old"}
    write_text(path, "fits")
    assert contents(tiny_disk) == {"a.txt": "fits"}


def test_the_umask_is_left_alone(tmp_path, monkeypatch):
    """Another thread may write a file at this moment."""
    monkeypatch.setattr("os.umask", lambda _: pytest.fail("changes the umask"))
    write_text(tmp_path / "a.txt", "text")
    assert contents(tmp_path) == {"a.txt": "text"}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (".", "a folder"),
        ("folder", "a folder"),
        ("..", "a folder"),
        ("file/a", "file is no folder"),
        ("x" * 300, "too long"),
    ],
)
def test_what_could_not_be_written_is_refused_beforehand(tmp_path, monkeypatch, path, reason):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    for good in ("new", "file", "folder/a", "new/deep/a"):
        check_writable(Path(good))
    with pytest.raises(RunError, match=reason):
        check_writable(Path(path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_the_right_to_write_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(RunError, match="may not be written"):
        check_writable(tmp_path / "new/a.png")
