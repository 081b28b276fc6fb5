"""Keep libraries from printing while the core uses them; how they were set is put back afterwards."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from pocketune.errors import ModelError, first_line


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and no warnings from either library inside the block; errors still are raised."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


@contextmanager
def quiet_hub() -> Iterator[None]:
    """No warnings of the hub's client inside the block, which has several for every try that fails; errors still are raised."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


@contextmanager
def building() -> Iterator[None]:
    """Quiet, and without a trace in the global random state, from which some modules draw values that are then replaced.

    They are built in main memory, so that no GPU's random state is asked for, which would take memory on every GPU there is.
    """
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def loading(name: str) -> Iterator[None]:
    """As `building`, where either library reads files of a model, whose name is for the message.

    Raises:
        ModelError: they could not be read.
    """
    try:
        with building():
            yield
    except (OSError, ValueError) as error:
        msg = f"cannot load {name}: {first_line(error)}. Expected a whole folder as diffusers writes it; download it again."
        raise ModelError(msg) from error
