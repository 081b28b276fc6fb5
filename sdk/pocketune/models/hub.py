"""Downloads models from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from pocketune.errors import ModelError


def download(hub_id: str) -> Path:
    """The local folder of a model of the hub, without weights in other formats than safetensors.

    Args:
        hub_id: as "owner/name".

    Raises:
        ModelError: it is not there, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.txt", "*.model", "*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        msg = f"cannot download {hub_id}: {first}. Check the name and the network, or give a local diffusers folder."
        raise ModelError(msg) from error
