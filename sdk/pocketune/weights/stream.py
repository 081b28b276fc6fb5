"""Layers whose frozen weights stay on disk: each reads a tile of its weight, multiplies, and forgets it.

The same tile-sized buffer serves every layer, so that a model of any size holds one tile of weights. In backward the tiles are
read again; nothing of a weight is saved in between. Every number of an output is computed from one tile alone, in the order
of a layer that holds its weight, so that results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pocketune.errors import ModelError
from pocketune.weights.frozen import AbsentWeight, absent, convolution_back
from pocketune.weights.matrix import Matrix
from pocketune.weights.prefetch import Prefetcher
from pocketune.weights.store import WeightStore

TILE_BYTES = 2**24
"""Of the buffer that every layer shares; where 64 rows of a layer are larger, so is the buffer."""
SMALLEST_STREAMED = 2**16
"""Weights with fewer values are held in memory."""
_ALIGNED = 64
"""A tile has a multiple of so many rows or columns: fewer are summed in another order, and packed weights are grouped so."""


class Tiles:
    """Reads weights into one buffer, and asks for the next weight while this one is used."""

    def __init__(self, *, tile_bytes: int | None = None) -> None:
        """Set the size of the buffer, which is made at the first use; default: `TILE_BYTES`."""
        self._tile_bytes = tile_bytes or TILE_BYTES
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._prefetcher = Prefetcher()

    def rows(self, matrix: Matrix, like: Tensor) -> Iterator[tuple[range, Tensor]]:
        """A weight by runs of rows: the run, and (rows, columns, taps) in the type and on the device of `like`."""
        self._prefetcher.using(matrix)
        step = self._step(matrix.columns * matrix.taps, like)
        for start in range(0, matrix.rows, step):
            rows = range(start, min(start + step, matrix.rows))
            yield rows, self._read(matrix, rows, range(matrix.columns), like)

    def columns(self, matrix: Matrix, like: Tensor) -> Iterator[tuple[range, Tensor]]:
        """A weight by runs of columns: the run, and (rows, columns, taps) in the type and on the device of `like`."""
        self._prefetcher.using(matrix)
        step = self._step(matrix.rows * matrix.taps, like)
        for start in range(0, matrix.columns, step):
            columns = range(start, min(start + step, matrix.columns))
            yield columns, self._read(matrix, range(matrix.rows), columns, like)

    def _step(self, values: int, like: Tensor) -> int:
        fitting = self._tile_bytes // (values * like.element_size())
        return max(_ALIGNED, fitting // _ALIGNED * _ALIGNED)

    def _read(self, matrix: Matrix, rows: range, columns: range, like: Tensor) -> Tensor:
        values = len(rows) * len(columns) * matrix.taps
        size = values * like.element_size()
        if self._buffer.numel() < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.empty(max(size, self._tile_bytes), dtype=torch.uint8)
        tile = self._buffer[:size].view(like.dtype).view(len(rows), len(columns), matrix.taps)
        matrix.read(rows, columns, tile)
        return tile.to(like.device)


class StreamedLinear(AbsentWeight, nn.Linear):
    """A frozen `nn.Linear` whose weight stays on disk."""

    def __init__(self, like: nn.Linear, matrix: Matrix, tiles: Tiles, weight: nn.Parameter) -> None:
        """Stand in for a Linear.

        Args:
            like: it gives the sizes, and its bias, which is held in memory.
            matrix: its weight.
            tiles: the shared buffer.
            weight: what stands for the weight in memory, see `absent`.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight = weight
        self.bias = like.bias
        self._matrix, self._tiles = matrix, tiles
        self._remembered: tuple[Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        """The product, (.., out). The last result for inputs of one row a sample is remembered.

        Such inputs are embedded timesteps, whose modulation does not change within a step: recomputation needs no weight.
        """
        if input.requires_grad and torch.is_grad_enabled():
            output: Tensor = _Linear.apply(input, self.bias, self._matrix, self._tiles)  # type: ignore[no-untyped-call]
            return output
        if input.ndim != 2:
            return _linear(input, self.bias, self._matrix, self._tiles)
        if self._remembered is None or not torch.equal(self._remembered[0], input):
            self._remembered = input.detach().clone(), _linear(input, self.bias, self._matrix, self._tiles)
        return self._remembered[1]


class StreamedConv2d(AbsentWeight, nn.Conv2d):
    """A frozen `nn.Conv2d` of one group, zero-padded, whose weight stays on disk."""

    def __init__(self, like: nn.Conv2d, matrix: Matrix, tiles: Tiles, weight: nn.Parameter) -> None:
        """Stand in for a convolution; arguments as of `StreamedLinear`."""
        nn.Module.__init__(self)
        for name in like.__constants__:
            setattr(self, name, getattr(like, name))
        self.weight = weight
        self.bias = like.bias
        self._matrix, self._tiles = matrix, tiles

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name for it
        """The convolution, (batch, out channels, height, width)."""
        if input.requires_grad and torch.is_grad_enabled():
            output: Tensor = _Conv2d.apply(input, self)  # type: ignore[no-untyped-call]
            return output
        return self.convolve(input)

    def convolve(self, image: Tensor) -> Tensor:
        """Without a gradient."""
        parts = []
        for rows, tile in self._tiles.rows(self._matrix, image):
            bias = None if self.bias is None else self.bias[rows.start : rows.stop]
            weight = tile.view(len(rows), self.in_channels, *self.kernel_size)
            parts.append(nn.functional.conv2d(image, weight, bias, self.stride, self.padding, self.dilation))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def input_gradient(self, shape: torch.Size, layout: torch.memory_format, gradient: Tensor) -> Tensor:
        """The gradient of the input, of its shape and layout, from that of the output."""
        parts = []
        for columns, tile in self._tiles.columns(self._matrix, gradient):
            part = torch.empty(
                (shape[0], len(columns), *shape[2:]),
                dtype=gradient.dtype,
                device=gradient.device,
                memory_format=layout,
            )
            weight = tile.view(self.out_channels, len(columns), *self.kernel_size)
            parts.append(convolution_back(self, gradient, weight, part))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class StreamedEmbedding(AbsentWeight, nn.Embedding):
    """A frozen `nn.Embedding` whose table stays on disk; only the rows that are looked up are read."""

    def __init__(self, like: nn.Embedding, matrix: Matrix, weight: nn.Parameter) -> None:
        """Stand in for an embedding; arguments as of `StreamedLinear`."""
        nn.Module.__init__(self)
        for name in like.__constants__:
            setattr(self, name, getattr(like, name))
        self.weight = weight
        self._matrix = matrix

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Embedding's name for it
        """The rows, (.., width)."""
        wanted, places = torch.unique(input, return_inverse=True)
        rows = torch.empty(len(wanted), self.embedding_dim, 1, dtype=self.weight.dtype)
        for number, row in enumerate(wanted.tolist()):
            self._matrix.read(range(row, row + 1), range(self.embedding_dim), rows[number : number + 1])
        return rows.squeeze(2).to(self.weight.device)[places]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, matrix: Matrix, tiles: Tiles) -> Tensor:  # noqa: A002
        ctx.matrix, ctx.tiles = matrix, tiles
        return _linear(input, bias, matrix, tiles)

    @staticmethod
    @once_differentiable  # type: ignore[misc, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0].reshape(-1, ctx.matrix.rows)
        output = gradient.new_empty(gradient.shape[0], ctx.matrix.columns)
        for columns, tile in ctx.tiles.columns(ctx.matrix, gradient):
            torch.mm(gradient, tile.squeeze(2), out=output[:, columns.start : columns.stop])
        return output.view(*gradients[0].shape[:-1], ctx.matrix.columns), None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: StreamedConv2d) -> Tensor:  # noqa: A002
        ctx.layer, ctx.shape = layer, input.shape
        ctx.layout = torch.channels_last if _channels_last(input) else torch.contiguous_format  # kernels differ by it
        return layer.convolve(input)

    @staticmethod
    @once_differentiable  # type: ignore[misc, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(ctx.shape, ctx.layout, gradients[0]), None


def _channels_last(image: Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()


def _linear(input: Tensor, bias: Tensor | None, matrix: Matrix, tiles: Tiles) -> Tensor:  # noqa: A002
    flat = input.reshape(-1, matrix.columns)
    output = flat.new_empty(flat.shape[0], matrix.rows)
    for rows, tile in tiles.rows(matrix, flat):
        part = output[:, rows.start : rows.stop]
        weight = tile.squeeze(2).t()
        if bias is None:
            torch.mm(flat, weight, out=part)
        else:
            torch.addmm(bias[rows.start : rows.stop], flat, weight, out=part)
    return output.view(*input.shape[:-1], matrix.rows)


def stream(
    model: nn.Module,
    store: WeightStore,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tiles: Tiles | None = None,
    stored_name: Callable[[str], str] = lambda name: name,
    in_float32: Collection[str] = (),
) -> dict[str, str]:
    """Put layers that stream in the place of a model's large Linears, convolutions and embeddings.

    Args:
        model: on the meta device; all its other parameters stay there and are the caller's to fill.
        store: its weights.
        dtype: of the arithmetic.
        device: where it is done.
        tiles: the buffer; default: one of its own.
        stored_name: the name that a parameter has in the store.
        in_float32: names of weights that say so to the model, whatever `dtype` is; layers compute in the type of their input.

    Returns:
        The names of the parameters that were replaced, with their names in the store.

    Raises:
        ModelError: a weight has another shape than the configuration says.
    """
    tiles = tiles or Tiles()
    replaced: dict[str, str] = {}
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        name = f"{path}.weight" if path else "weight"
        if not _streams(layer) or stored_name(name) not in store:
            continue
        if store.shape(stored_name(name)) != tuple(layer.weight.shape):
            msg = (
                f"{name} is {store.shape(stored_name(name))} in the weights and {tuple(layer.weight.shape)} in the "
                "configuration. Download the model again."
            )
            raise ModelError(msg)
        matrix = store.matrix(stored_name(name))
        weight = absent(layer.weight.shape, dtype=torch.float32 if name in in_float32 else dtype, device=device)
        new: nn.Module
        if type(layer) is nn.Linear:
            new = StreamedLinear(layer, matrix, tiles, weight)
        elif type(layer) is nn.Conv2d:
            new = StreamedConv2d(layer, matrix, tiles, weight)
        else:
            new = StreamedEmbedding(layer, matrix, weight)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new.eval())
        replaced[name] = stored_name(name)
    return replaced


def layer_weights(model: nn.Module) -> set[str]:
    """Names of the weights of all Linears and convolutions: those that may be packed."""
    return {f"{path}.weight" for path, layer in model.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)}


def _streams(layer: nn.Module) -> bool:
    # By exact type: subclasses may compute something else.
    if type(layer) is nn.Linear:
        return layer.weight.numel() >= SMALLEST_STREAMED
    if type(layer) is nn.Embedding:
        return layer.weight.numel() >= SMALLEST_STREAMED and layer.max_norm is None
    if type(layer) is nn.Conv2d:
        usual = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return layer.weight.numel() >= SMALLEST_STREAMED and usual
    return False
