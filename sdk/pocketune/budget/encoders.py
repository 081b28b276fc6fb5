"""What a method finds where it asks a model for its text encoders: encoders without values, beside the true tokenizers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from pocketune.budget.skeleton import held_tensors, pack_shapes, retype, stream_shapes
from pocketune.errors import PlanError
from pocketune.models.encoders import kept_in_float32, packs_text
from pocketune.models.load import ModelFolder
from pocketune.models.quiet import loading
from pocketune.weights.fill import RESIDENT, Residence
from pocketune.weights.quantizers import Quantization


class ShapeFolder:
    """Stands for a model's folder, and differs in the weights of its text encoders alone, which it does not read.

    `encoders`: all that were asked for, as the method left them; `buffer_bytes`: of the tile that streamed ones share.
    """

    def __init__(self, folder: ModelFolder) -> None:
        """Begin without encoders."""
        self._folder = folder
        self.encoders: dict[str, nn.Module] = {}
        self.buffer_bytes = 0
        self._on_disk: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        """All else is the folder's own."""
        return getattr(self._folder, name)

    def held(self) -> list[Tensor]:
        """What the encoders hold in memory; tables of packed and streamed ones lie on disk."""
        return [
            tensor
            for part, encoder in self.encoders.items()
            for tensor in held_tensors(encoder, without_embeddings=part in self._on_disk)
        ]

    def text_pipeline(
        self,
        *,
        device: torch.device,  # noqa: ARG002 - shapes lie nowhere
        weights: Residence = RESIDENT,
        quantization: Quantization | None = None,
    ) -> Any:
        """The stock pipeline with tokenizers, and text encoders on the meta device.

        Raises:
            PlanError: only the denoiser's configuration is here.
        """
        folder, family = self._folder, self._folder.family
        if not folder.has("vae"):
            msg = f"text encoders train, and only the denoiser's configuration of {folder.name} is here. Give a whole folder."
            raise PlanError(msg)
        made = {
            part: empty_text_encoder(folder, part, dtype=torch.float32) for part in filter(folder.has, family.text_encoders)
        }
        for part, encoder in made.items():
            if weights.streamed:
                self.buffer_bytes = max(self.buffer_bytes, stream_shapes(encoder, dtype=torch.float32).tile_bytes)
                self._on_disk.add(part)
            elif quantization is not None and packs_text(folder.index[part][1]):
                pack_shapes(encoder, quantization, dtype=torch.float32)
                self._on_disk.add(part)
        self.encoders = made
        return folder.stock_pipeline(vae=None, **{family.component: folder.empty_denoiser().model}, **made)


def empty_text_encoder(folder: ModelFolder, part: str, *, dtype: torch.dtype) -> nn.Module:
    """A text encoder on the meta device."""
    kind = getattr(transformers, folder.index[part][1])
    with loading(folder.name), init_empty_weights():
        encoder: nn.Module = kind(kind.config_class.from_pretrained(folder.path / part))
    retype(encoder.eval(), dtype)
    for name in kept_in_float32(encoder, dtype):
        retype(encoder.get_submodule(name.rpartition(".")[0]), torch.float32)
    return encoder
