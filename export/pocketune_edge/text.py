"""Prompts to embeddings: tokenizers, text encoders, and the graph that joins what they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from pocketune_edge.bundle import Bundle
from pocketune_edge.errors import BundleError, SettingError
from pocketune_edge.manifest import Manifest, TextEncoder
from pocketune_edge.session import Array, Sessions, Values


@dataclass(frozen=True)
class Prompt:
    """Encoded text. hidden: (1, tokens, width); pooled: (1, width), None where the denoiser takes none."""

    hidden: Array
    pooled: Array | None


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        SettingError: a prompt is not UTF-8.
    """
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            msg = f"the prompt {prompt[:80]!r} is not UTF-8 text. Check what the terminal sends."
            raise SettingError(msg) from error


def encode_prompts(sessions: Sessions, prompts: Sequence[str]) -> dict[str, Prompt]:
    """Encode each distinct prompt, one part of an encoder in memory at a time, which is opened once for all.

    Raises:
        BundleError: a tokenizer is damaged.
        SettingError: a prompt is not UTF-8.
    """
    check_prompts(prompts)
    manifest = sessions.bundle.manifest
    distinct = list(dict.fromkeys(prompts))
    found: dict[str, dict[str, Array]] = {prompt: {} for prompt in distinct}
    for encoder in manifest.text_encoders:
        graphs = manifest.named(encoder.graphs)
        rows = graphs[0].shape_of("ids")[0]
        tokenizer = _tokenizer(sessions.bundle, encoder)
        ids = [np.array(tokenizer.encode(prompt).ids, np.int64)[None] for prompt in distinct]
        batches = [{"ids": np.repeat(row, rows, axis=0)} for row in ids]
        for prompt, given in zip(distinct, sessions.run_parts_of_all(graphs, batches, ("hidden", "pooled")), strict=True):
            found[prompt] |= {f"{name}_{encoder.number}": value[:1] for name, value in given.items()}
    with sessions.opened(manifest.graph("text_join")) as session:
        return {
            prompt: _join(session.run(_repeated(values, session.graph.inputs[0].shape[0]))) for prompt, values in found.items()
        }


def negative_prompt(manifest: Manifest, empty: Prompt) -> Prompt:
    """What guidance leads away from: the encoded empty prompt, or zeros where the model was trained so."""
    if not manifest.model.zero_negative:
        return empty
    return Prompt(np.zeros_like(empty.hidden), None if empty.pooled is None else np.zeros_like(empty.pooled))


def stack(prompts: Sequence[Prompt]) -> dict[str, Array]:
    """The inputs of graphs that some prompts are, a row each."""
    found = {"prompt_hidden": np.concatenate([prompt.hidden for prompt in prompts])}
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    return found | {"prompt_pooled": np.concatenate(pooled)} if pooled else found


def _tokenizer(bundle: Bundle, encoder: TextEncoder) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(bundle.read(encoder.tokenizer).decode("utf-8"))
        tokenizer.enable_truncation(encoder.tokens)
        tokenizer.enable_padding(length=encoder.tokens, pad_id=encoder.pad_id, pad_token=encoder.pad_token)
    except Exception as error:  # the library raises plain Exception for damaged files
        msg = f"the tokenizer {encoder.tokenizer} of {bundle.path} is damaged ({str(error)[:100]}). Export the bundle again."
        raise BundleError(msg) from error
    return tokenizer


def _join(values: Values) -> Prompt:
    pooled = values.get("prompt_pooled")
    return Prompt(hidden=values["prompt_hidden"][:1], pooled=None if pooled is None else pooled[:1])


def _repeated(values: Values, rows: int) -> dict[str, Array]:
    return {name: np.repeat(value, rows, axis=0) for name, value in values.items()}
