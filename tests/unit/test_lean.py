"""What is kept out of a process that counts its memory."""

import subprocess
import sys

import pytest

_HIDDEN = """
import sys
from pocketune.lean import without_scipy
with without_scipy():
    import pocketune.job
assert not any(name.split(".")[0] == "scipy" for name in sys.modules), "scipy was imported"
"""


def test_training_runs_without_scipy_and_does_not_load_it() -> None:
    done = subprocess.run([sys.executable, "-c", _HIDDEN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scipy_can_be_imported_as_ever_behind_the_block() -> None:
    pytest.importorskip("scipy")
    code = "from pocketune.lean import without_scipy\nwith without_scipy(): pass\nimport scipy.stats"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_scipy_that_is_loaded_stays() -> None:
    code = (
        "import sys, types\nsys.modules['scipy'] = loaded = types.ModuleType('scipy')\n"
        "from pocketune.lean import without_scipy\n"
        "with without_scipy(): assert sys.modules['scipy'] is loaded\nassert sys.modules['scipy'] is loaded"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
