"""Names for what flows through a denoiser, so that graphs of single blocks can be put together by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pocketune.models.base import Context, DenoiserAdapter

CONTEXT_MEANINGS = {
    "embedding": "of the timestep and of pooled text, for all blocks and the head",
    "context_text": "text that blocks attend to and do not change",
}


def stream_name(adapter: DenoiserAdapter, place: int) -> str:
    """The name of the stream at a place: the adapter's own, then skip_0, skip_1 and so on for a U-Net's skip connections."""
    named = adapter.stream_names
    return named[place] if place < len(named) else f"skip_{place - len(named)}"


def place_of(adapter: DenoiserAdapter, name: str) -> int:
    """The place of a stream, by its name."""
    named = adapter.stream_names
    return named.index(name) if name in named else len(named) + int(name.removeprefix("skip_"))


def by_name(adapter: DenoiserAdapter, streams: Sequence[Tensor]) -> dict[str, Tensor]:
    """Streams with their names."""
    return {stream_name(adapter, place): stream for place, stream in enumerate(streams)}


def context_by_name(context: Context) -> dict[str, Tensor]:
    """The tensors of a context with their names; what the model does not use is absent."""
    found = {"embedding": context.embedding}
    return found if context.text is None else found | {"context_text": context.text}


def context_of(given: Mapping[str, Tensor], *, height: int, width: int) -> Context:
    """The context of named tensors and the latents' sides."""
    return Context(given["embedding"], height, width, text=given.get("context_text"))
