"""Keep out of a process what is imported only because it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NAME = "scipy"


@contextmanager
def without_scipy() -> Iterator[None]:
    """Let what is imported inside the block believe that scipy is not installed, which saves tens of MB.

    transformers and diffusers import scipy wherever they find it: for losses of object detection, the LMS schedule and beta
    sigmas. No training uses these, and a process that has imported the two in here does without them. Nothing happens where
    scipy is loaded already; behind the block it can be imported as ever.
    """
    if _NAME in sys.modules:
        yield
        return
    sys.modules[_NAME] = None  # type: ignore[assignment]  # how Python notes that a module cannot be imported
    try:
        yield
    finally:
        del sys.modules[_NAME]
