"""The bytes of all tensors that live while real code runs on the meta device, where tensors have shapes and no memory.

Nothing is estimated here: the very functions that train run, with their own layers, recomputation and scratch file, and every
storage is counted from its creation to its end. What does not show is what kernels need inside of themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pocketune.allocator import MAPPED_FROM_BYTES
from pocketune.scratch import Scratch

_PAGE = 4096
_Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class LiveBytes(TorchDispatchMode):
    """Counts what lives, by name, and remembers the moment of the most; `convolutions` are different ones by shape.

    Results of equal operations on equal shapes are taken from a memory of earlier ones, since torch works out many shapes in
    Python, slowly, and blocks of a model are alike.
    """

    _known: ClassVar[dict[Any, tuple[_Spec | None, ...] | _Spec]] = {}  # true of every model, so that all share it

    def __init__(self) -> None:
        """Count from nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self.at_peak: dict[str, int] = {}
        self.flops = 0
        self.convolutions: set[Any] = set()
        self._live: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._by_name: dict[str, int] = {}
        self._scopes = ["other activations"]

    def hold(self, tensors: Iterable[Tensor], name: str) -> int:
        """Count tensors that are there already; their bytes, those that were counted before left out."""
        before = self.now_bytes
        for tensor in tensors:
            self._count(tensor, name)
        return self.now_bytes - before

    def begin(self) -> None:
        """Look for the peak from now on."""
        self.peak_bytes, self.at_peak, self.flops = self.now_bytes, dict(self._by_name), 0

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Give what is made meanwhile a name."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def follow(self, model: nn.Module, name_of: Callable[[str], str | None]) -> list[Any]:
        """Name what modules make after them; returns handles of the hooks.

        Args:
            model: whose modules are followed.
            name_of: called with a module's path; None leaves the name as it is around it.
        """
        handles = []
        for path, module in model.named_modules():
            name = name_of(path)
            if name is not None:
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._scopes.append(name)))
                handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        return handles

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on shapes, and count what it makes."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0  # a number that is only looked at, such as the loss
        if func is torch.ops.aten.equal.default and args[0].is_meta:
            return True
        kwargs = kwargs or {}
        key = _key(func, args, kwargs)
        spec = self._known.get(key) if key is not None else None
        if spec is not None:
            out = _made(spec)
        else:
            out = func(*args, **kwargs)
            if key is not None and (found := _spec(out)) is not None:
                self._known[key] = found
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor, self._scopes[-1])
        if _has_overlapping_windows(func, args):
            self.convolutions.add(key)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _leave(self) -> None:
        self._scopes.pop()

    def _count(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or not size:
            return
        if size >= MAPPED_FROM_BYTES:
            size = -(-size // _PAGE) * _PAGE

        def gone(_: Any) -> None:
            del self._live[key]
            self.now_bytes -= size
            self._by_name[name] -= size

        self._live[key] = weakref.ref(storage, gone), size, name
        self.now_bytes += size
        self._by_name[name] = self._by_name.get(name, 0) + size
        if self.now_bytes > self.peak_bytes:
            self.peak_bytes, self.at_peak = self.now_bytes, dict(self._by_name)


class ShapeScratch(Scratch):
    """A scratch file without a file: it knows how much would be written, and gives back tensors without memory."""

    def __init__(self) -> None:
        """Begin empty."""
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self._written: dict[int, Any] = {}
        self.written_bytes = 0

    def read(self, offset: int, size: int) -> Tensor:  # noqa: ARG002 - nothing is stored
        """As many bytes as are asked for, without memory."""
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def _write(self, flat: Tensor, offset: int) -> None:  # noqa: ARG002 - nothing is stored
        self.written_bytes += flat.numel()


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let attention on the meta device be the fused kernel that runs on processors, whose scores are never whole in memory."""
    plain = nn.functional.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor = run(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return output

    nn.functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain


def _has_overlapping_windows(func: Any, args: Any) -> bool:
    """Whether an operation is a convolution, forward or backward, that sees a pixel several times."""
    if func is torch.ops.aten.convolution.default:
        weight, stride = args[1], args[3]
    elif func is torch.ops.aten.convolution_backward.default:
        weight, stride = args[2], args[4]
    else:
        return False
    return any(side > step for side, step in zip(weight.shape[2:], stride, strict=True))


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """What the shape of a fresh result depends on; None where the result may share memory with what goes in."""
    schema = func._schema
    if schema.is_mutable or any(result.alias_info is not None for result in schema.returns):
        return None
    parts: list[Any] = [func]
    tensors = _describe((*args, *kwargs.items()), parts)
    if not any(tensor.is_meta for tensor in tensors) or any(tensor.ndim and not tensor.is_meta for tensor in tensors):
        return None
    return tuple(parts)


def _describe(values: Any, parts: list[Any]) -> list[Tensor]:
    """Add what describes some arguments to `parts`; the tensors among them."""
    tensors = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            parts.append((tuple(value.shape), value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            parts.append(len(value))
            tensors += _describe(value, parts)
        else:
            parts.append(value)
    return tensors


def _spec(out: Any) -> tuple[_Spec | None, ...] | _Spec | None:
    if isinstance(out, Tensor):
        return (tuple(out.shape), out.stride(), out.dtype) if out.is_meta else None
    if isinstance(out, tuple) and all(one is None or (isinstance(one, Tensor) and one.is_meta) for one in out):
        return tuple(None if one is None else (tuple(one.shape), one.stride(), one.dtype) for one in out)
    return None


def _made(spec: Any) -> Any:
    if spec and isinstance(spec[-1], torch.dtype):
        return torch.empty_strided(spec[0], spec[1], dtype=spec[2], device="meta")
    return tuple(None if one is None else _made(one) for one in spec)
