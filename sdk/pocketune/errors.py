"""Every error that Pocketune raises on purpose.

Each message says what was found, what was expected and what to do next. The command line turns a `PocketuneError` into one
line on stderr and exit code 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PocketuneError(Exception):
    """Base of all deliberate errors."""


class RecipeError(PocketuneError):
    """The recipe, or a value given for it, makes no sense."""


class PhotoError(PocketuneError):
    """A photo is missing, is no image, is damaged, or is too large to open safely."""


class ModelError(PocketuneError):
    """A model folder is missing, incomplete, or of an architecture without an adapter."""


class PlanError(PocketuneError):
    """A block plan or memory plan is impossible."""


class BudgetError(PocketuneError):
    """A job came too near its memory budget and was stopped; what it had done is kept."""


class CacheError(PocketuneError):
    """A feature cache is damaged or larger than its bound."""


class RunError(PocketuneError):
    """A run folder exists already, cannot be resumed, or cannot be written."""


class FileFormatError(PocketuneError):
    """A file given by the user is not what it claims to be."""


class NoEffectError(PocketuneError):
    """Training finished but the adapter does nothing: zero, unloadable, or without effect on the image."""


class Interrupted(PocketuneError):  # noqa: N818 - it is an outcome that the user chose, not a fault
    """The user stopped the job; a checkpoint was saved and the message says how to resume."""


def first_line(error: BaseException) -> str:
    """What a library says first, in at most 200 characters; the kind of its error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def reading(path: Path, *, failure: type[PocketuneError] = FileFormatError) -> Iterator[None]:
    """Turn what the system says of a path, as that its name is too long, into an error for a person.

    Raises:
        PocketuneError: of the kind `failure`.
    """
    try:
        yield
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}. Check the path and its permissions."
        raise failure(msg) from error
