"""What tells the trainings of one model from those of another with the same weights."""

from __future__ import annotations

import hashlib
import json

from pocketune.models.load import ModelFolder
from pocketune.weights.files import file_sha256

_TOKENIZER_FILES = ("*.json", "*.txt", "*.model")


def training_fingerprint(folder: ModelFolder) -> str:
    """Changes with all of a model that a training follows from, and is the same on every machine.

    A hash of the fingerprint of the weights, of which parts there are, and of the files that say how they are used: tokenizers,
    the configurations of text encoders and that of the noise schedule, whose levels machines may round differently.
    """
    tokenizers = sorted(part for part in folder.index if part.startswith("tokenizer") and folder.has(part))
    files = [path for part in tokenizers for kind in _TOKENIZER_FILES for path in sorted((folder.path / part).glob(kind))]
    for part in ("scheduler", *folder.family.text_encoders):
        files += sorted((folder.path / part).glob("*config.json"))
    hashes = {path.relative_to(folder.path).as_posix(): file_sha256(path) for path in files}
    parts = [folder.fingerprint(), folder.index, hashes]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
