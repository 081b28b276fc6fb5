"""Textual inversion: the embedding of one rare word of the prompt is tuned, and nothing else.

Paper: Gal et al. 2022 (textual inversion); with `gradient = "zeroth_order"` over packed weights it is ZOODiP (arXiv
2503.14868).
Differs: the word is one that the vocabulary has, so that no tokenizer changes; it begins at its own embedding, which changes
nothing, or at that of `token_start`. Text encoders of the CLIP kind are tuned, all of them; others see the word as it is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from pocketune.atomic import replacing
from pocketune.errors import FileFormatError, RecipeError
from pocketune.headers import with_sorted_metadata
from pocketune.methods.base import Tuned
from pocketune.methods.scales import quantization_of
from pocketune.methods.subspace import Subspace
from pocketune.models.base import DenoiserAdapter, Prompt
from pocketune.models.load import ModelFolder
from pocketune.plan.blocks import BlockPlan
from pocketune.recipe import Recipe
from pocketune.runfolder import METHOD_KEY, TOKEN_FILE
from pocketune.step import Batch
from pocketune.weights.fill import Residence
from pocketune.weights.stream import StreamedEmbedding


class TunedToken(nn.Module):
    """An embedding table one of whose rows trains. `vector`: (width,)."""

    def __init__(self, table: nn.Embedding, token: int, vector: Tensor) -> None:
        """Take a frozen table, and the row that stands for that of `token`."""
        super().__init__()
        self.table, self.token = table, token
        self.vector = nn.Parameter(vector)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows, (.., width)."""
        rows: Tensor = self.table(ids)
        return torch.where((ids == self.token)[..., None], self.vector.to(rows.dtype), rows)


class TokenMethod:
    """Tunes one word."""

    result = TOKEN_FILE

    def attach(
        self,
        adapter: DenoiserAdapter,
        *,
        plan: BlockPlan,  # noqa: ARG002
        recipe: Recipe,
        folder: ModelFolder,
    ) -> Tuned:
        """Load the text encoders, packed or left on disk as the recipe wants weights, and make the word's row trainable.

        Raises:
            RecipeError: the word is no single token, or no text encoder is of the CLIP kind.
        """
        adapter.model.requires_grad_(False)
        device = next(adapter.model.parameters()).device
        pipeline = folder.text_pipeline(
            device=device, weights=Residence(streamed=recipe.weights == "streamed"), quantization=quantization_of(recipe)
        )
        tokens = nn.ModuleDict()
        for part, encoder in _clip_encoders(pipeline, folder).items():
            encoder.requires_grad_(False)
            tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"))
            word = token_id(tokenizer, recipe.token)
            start = token_id(tokenizer, recipe.token_start) if recipe.token_start else word
            table = encoder.get_input_embeddings()
            tokens[part] = TunedToken(table, word, _row(table, start))
            encoder.set_input_embeddings(tokens[part])
        parameters = {f"{part}.vector": token.vector for part, token in tokens.items() if isinstance(token, TunedToken)}

        def inputs(batch: Batch) -> Batch:
            found = folder.family.encode(pipeline, recipe.instance_prompt, device=device, length=folder.text_padding)
            return replace(batch, prompt=with_prompt(batch.prompt, found, photos=recipe.batch_size))

        subspace = Subspace(parameters, steps=recipe.subspace_steps, noise=recipe.subspace_noise)
        return Tuned(
            parameters=parameters,
            owner=tokens,
            inputs=inputs,
            state=subspace.state,
            project=subspace.project,
            after_step=subspace.after_step,
        )

    def save(self, adapter: DenoiserAdapter, tuned: Tuned, path: Path, *, recipe: Recipe) -> None:
        """Write the rows, one a text encoder; with a single encoder, stock diffusers takes it as a textual inversion."""
        tensors = {name.removesuffix(".vector"): value.detach().cpu().contiguous() for name, value in tuned.parameters.items()}
        metadata = {METHOD_KEY: "token", "token": recipe.token, "denoiser": type(adapter.model).__name__}
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=metadata)
            partial.write_bytes(with_sorted_metadata(partial.read_bytes()))

    def change(self, tuned: Tuned) -> dict[str, float]:
        """The L2 distance of each row from the word's own."""
        tokens = ((f"{part}.vector", token) for part, token in tuned.owner.named_children())
        return {
            name: float(torch.linalg.vector_norm(token.vector.detach() - _row(token.table, token.token)))
            for name, token in tokens
            if isinstance(token, TunedToken)
        }

    def prepare(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Nothing: the word has its own embedding."""

    def check(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Load the rows; one that does not fit is refused in any case."""
        self.apply(pipeline, path, folder)

    @torch.no_grad()
    def apply(self, pipeline: Any, path: Path, folder: ModelFolder) -> None:
        """Write the word's row into the pipeline's text encoders.

        Raises:
            FileFormatError: the file is damaged or of another model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                word = (file.metadata() or {})["token"]
                rows = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError) as error:
            msg = f"{path} holds no tuned word, or is damaged ({error}). Give what `pocketune personalize` wrote."
            raise FileFormatError(msg) from error
        encoders = _clip_encoders(pipeline, folder)
        for part, row in rows.items():
            table = encoders[part].get_input_embeddings() if part in encoders else None
            if table is None or row.shape != table.weight.shape[1:]:
                msg = f"{path} does not fit {folder.name}: it has no {part} of width {row.numel()}. Use what it was trained on."
                raise FileFormatError(msg)
            tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"))
            number = token_id(tokenizer, word)
            if isinstance(table, StreamedEmbedding):  # there is no table to write to
                encoders[part].set_input_embeddings(TunedToken(table, number, row).requires_grad_(False))
            else:
                table.weight[number] = row.to(table.weight.dtype)


def token_id(tokenizer: Any, word: str) -> int:
    """The number of a word.

    Raises:
        RecipeError: it is none, or several.
    """
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        msg = f'"{word}" is {len(ids)} tokens to this model, and one is tuned. Choose another word, such as sks.'
        raise RecipeError(msg)
    return int(ids[0])


def with_prompt(prompt: Prompt, found: Prompt, *, photos: int) -> Prompt:
    """A batch's prompt with that of its first rows, the photos, replaced; what text encoders do not make stays.

    Args:
        prompt: of the whole batch.
        found: of the photos, with a batch of 1.
        photos: how many they are.
    """

    def replaced(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new.to(old).expand(photos, *new.shape[1:]), old[photos:]])

    made = {name: new for name, new in vars(found).items() if new is not None}
    return replace(prompt, **{name: replaced(getattr(prompt, name), new) for name, new in made.items()})


def _clip_encoders(pipeline: Any, folder: ModelFolder) -> dict[str, Any]:
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    found = {part: getattr(pipeline, part, None) for part in folder.family.text_encoders}
    encoders = {part: encoder for part, encoder in found.items() if isinstance(encoder, kinds)}
    if not encoders:
        msg = f"{folder.family.title} has no text encoder of the CLIP kind, whose words could be tuned. Tune LoRA or scales."
        raise RecipeError(msg)
    return encoders


def _row(table: nn.Embedding, token: int) -> Tensor:
    """Of a table that may lie on disk, in float32."""
    found: Tensor = table(torch.tensor(token, device=table.weight.device))
    return found.detach().float()
