"""Weights of a denoiser, read one at a time, so that exporting needs little more memory than the largest of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pocketune.errors import ModelError
from pocketune_export.weights import plain_name


class DenoiserWeights:
    """Tensors by their name in the model, out of safetensors files; what is in no file is taken from the model itself."""

    def __init__(self, files: Sequence[Path], model: nn.Module) -> None:
        """Read the files' headers.

        Raises:
            ModelError: a file is damaged.
        """
        self._model = model
        self._file_of: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    self._file_of |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                msg = f"the weights {path} are damaged: {error}. Download the model again."
                raise ModelError(msg) from error

    def __call__(self, name: str) -> Tensor:
        """The tensor of a name.

        Raises:
            ModelError: it is missing, or of another shape than the model's.
        """
        path = self._file_of.get(plain_name(name))
        of_model = self._of_model(name)
        if path is None:
            if of_model.is_meta:
                msg = f"the weight {plain_name(name)} is missing. Download the model again."
                raise ModelError(msg)
            return of_model
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(plain_name(name))
        if tensor.shape != of_model.shape:
            found, expected = tuple(tensor.shape), tuple(of_model.shape)
            msg = f"{path}: {plain_name(name)} is {found}, expected {expected}. Download the model again."
            raise ModelError(msg)
        return tensor

    def _of_model(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self._model.get_submodule(owner), leaf)
        return tensor
