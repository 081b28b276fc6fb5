"""Downloads models from the Hugging Face hub."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from pocketune.errors import ModelError, first_line
from pocketune.models.quiet import quiet_hub
from pocketune.models.registry import FAMILIES
from pocketune.weights.files import plain_weights

_PARTS = {part for family in FAMILIES.values() for part in (family.component, "vae", *family.text_encoders)}
_WANTED = ["*.json", "*.txt", "*.model", *(f"{part}/*.safetensors" for part in sorted(_PARTS))]
"""Publishers lay weights for other programs beside a model's parts, as text encoders of 16 GB beside Stable Diffusion 3.5."""
_VARIANTS = "*.*.safetensors"


def download(hub_id: str) -> Path:
    """The local folder of a model of the hub: safetensors alone, and of each part one set of weights.

    Args:
        hub_id: as "owner/name".

    Raises:
        ModelError: it is not there, or cannot be reached.
    """
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Where there is no network list_repo_files tries for half a minute, and this once.
        ignored = unneeded(file.rfilename for file in model_info(hub_id).siblings or ())
    except Exception:  # of many kinds; without the hub, what was downloaded before will do, or it is said below why not
        ignored = [_VARIANTS]
    try:
        with quiet_hub():
            return Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=ignored))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        msg = (
            f"cannot download {hub_id}: {first_line(error)}; there is no folder {hub_id} here either. Check the name and the "
            "network, or give a local diffusers folder."
        )
        raise ModelError(msg) from error


def unneeded(names: Iterable[str]) -> list[str]:
    """Of the files of a model, variants of weights that are there without."""
    folders = defaultdict(list)
    for name in names:
        folders[name.rpartition("/")[0]].append(name)
    weights = [name for found in folders.values() for name in found if name.endswith(".safetensors")]
    kept = {name for found in folders.values() for name in plain_weights(found)}
    return sorted(set(weights) - kept)
