"""Blocks in which the image does not see the text: the probe that tells which blocks bind a subject to its words.

Paper: DiT-BlockSkip (arXiv 2603.20755), block selection: in joint attention, image queries do not attend to text keys.
Differs: where text is attended to by itself (cross-attention), nothing is left to attend to, and the attention gives zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pocketune.errors import ModelError
from pocketune.models.base import DenoiserAdapter, TextAttention

_ARGUMENTS = ("query", "key", "value", "attn_mask")


@contextmanager
def text_masked(adapter: DenoiserAdapter, blocks: Iterable[int]) -> Iterator[None]:
    """While open, image tokens do not attend to text in some blocks; the text still attends to the image.

    The adapter's model may be part of a pipeline, and may carry a LoRA. No block: nothing changes, bit for bit.

    Args:
        adapter: of the model.
        blocks: indices.

    Raises:
        ModelError: when the model runs, and its attention to text is not computed where it can be masked.
    """
    with ExitStack() as stack:
        for index in blocks:
            for attention in adapter.text_attention(index):
                for handle in _hide(attention):
                    stack.callback(handle.remove)
        yield


class _TextHidden(TorchFunctionMode):
    """Changes the attention function that diffusers' processors call, with the native backend all of them.

    image, text: tokens of each that are joined in keys and queries; text is 0 where all keys are text.
    has_hidden: whether it was called.
    """

    def __init__(self, *, image: int, text: int, text_first: bool) -> None:
        super().__init__()
        self._image, self._text, self._text_first = image, text, text_first
        self.has_hidden = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        query, key, value = given["query"], given["key"], given["value"]
        if not self._text:
            self.has_hidden = True
            return query.new_zeros(*query.shape[:-1], value.shape[-1])
        if key.shape[-2] != self._image + self._text:
            return func(*args, **kwargs)  # attention of the image to itself, in blocks that have both
        self.has_hidden = True
        visible = self._visible(query.device)
        mask = given.pop("attn_mask", None)
        if mask is None:
            mask = visible
        elif mask.dtype == torch.bool:
            mask = mask & visible
        else:
            mask = mask.masked_fill(~visible, float("-inf"))
        return func(*args[4:], **given, attn_mask=mask)

    def _visible(self, device: torch.device) -> Tensor:
        visible = torch.ones(2 * (self._image + self._text,), dtype=torch.bool, device=device)
        if self._text_first:
            visible[self._text :, : self._text] = False
        else:
            visible[: self._image, self._image :] = False
        return visible


def _hide(attention: TextAttention) -> tuple[RemovableHandle, RemovableHandle]:
    """Hooks that put the mode around a module's forward."""
    open_modes: list[_TextHidden] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        image = text = 0
        if attention.joined:
            image = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[1]
            text = (kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]).shape[1]
        mode = _TextHidden(image=image, text=text, text_first=attention.joined == "text first")
        mode.__enter__()  # type: ignore[no-untyped-call]
        open_modes.append(mode)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        mode = open_modes.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is not None and not mode.has_hidden:  # without an output the module failed, with a reason of its own
            msg = (
                f"cannot hide text in a {type(module).__name__}: its attention does not go through PyTorch's "
                "scaled_dot_product_attention. Use diffusers' native attention backend: leave out attention_backend(), "
                "set_attention_backend(), DIFFUSERS_ATTN_BACKEND and other processors."
            )
            raise ModelError(msg)

    module = attention.module
    return (
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),
    )
