"""A model as it will be loaded, on the meta device: with streamed or packed layers in the places where they will be."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pocketune.methods.scales import quantization_of
from pocketune.models.base import DenoiserAdapter
from pocketune.models.load import ModelFolder
from pocketune.models.positions import crop_table
from pocketune.recipe import Recipe
from pocketune.weights.matrix import Matrix
from pocketune.weights.quant import Packed
from pocketune.weights.quantizers import Quantization, pack_layers
from pocketune.weights.store import WeightStore
from pocketune.weights.stream import TILE_BYTES, Tiles, stream

META = torch.device("meta")


class ShapeTiles(Tiles):
    """Gives weights without reading them, whole or, where more than one tile would be read, in two parts.

    `largest_bytes`: of the tiles that the buffer would have held.
    """

    def __init__(self) -> None:
        """Begin without a buffer."""
        super().__init__()
        self.largest_bytes = 0

    @property
    def tile_bytes(self) -> int:
        """Of a full buffer."""
        return TILE_BYTES

    def rows(self, matrix: Matrix, like: Tensor) -> Iterator[tuple[range, Tensor]]:
        """A weight by runs of rows."""
        for rows in self._parts(matrix.rows, matrix.columns * matrix.taps, like):
            yield rows, like.new_empty(()).expand(len(rows), matrix.columns, matrix.taps)

    def columns(self, matrix: Matrix, like: Tensor) -> Iterator[tuple[range, Tensor]]:
        """A weight by runs of columns."""
        for columns in self._parts(matrix.columns, matrix.rows * matrix.taps, like):
            yield columns, like.new_empty(()).expand(matrix.rows, len(columns), matrix.taps)

    def _parts(self, count: int, values: int, like: Tensor) -> Iterator[range]:
        step = self._step(values, like)
        self.largest_bytes = max(self.largest_bytes, min(step, count) * values * like.element_size())
        middle = count if step >= count else max(step, count // 2)
        yield range(middle)
        if middle < count:
            yield range(middle, count)


class _ShapeMatrix:
    """A weight of some shape and without values."""

    places = ()

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.rows, self.columns, self.taps = shape[0], shape[1], math.prod(shape[2:])

    def read(self, rows: range, columns: range, out: Tensor) -> None:
        """Nothing is read."""


class _ShapeStore:
    """The weights of a model by name, of which only shapes are known."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def matrix(self, name: str) -> _ShapeMatrix:
        return _ShapeMatrix(self._shapes[name])


class _ShapeQuantization(Quantization):
    """Packs to shapes."""

    def pack(self, weight: Tensor) -> Packed:
        """Codes, scales and zeros without memory."""
        rows, columns = weight.shape[0], weight[0].numel()
        return Packed(
            codes=torch.empty(rows, columns * self.bits // 8, dtype=torch.uint8, device=META),
            scales=torch.empty(rows, 1, device=META),
            zeros=torch.empty(rows, 1, dtype=torch.uint8 if self.quantizer == "minmax" else torch.float32, device=META),
            bits=self.bits,
        )


def stream_shapes(model: nn.Module, *, dtype: torch.dtype) -> ShapeTiles:
    """Let a model on the meta device stream its Linears and convolutions; what holds the tile that they share."""
    tiles = ShapeTiles()
    # Tables of embeddings stay: they are read by rows that depend on the text, and what they would hold is one value.
    kept = {f"{path}.weight" for path, module in model.named_modules() if type(module) is nn.Embedding}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in kept}
    stream(model, cast(WeightStore, _ShapeStore(shapes)), dtype=dtype, device=META, tiles=tiles)
    return tiles


def pack_shapes(model: nn.Module, quantization: Quantization, *, dtype: torch.dtype) -> None:
    """Let a model on the meta device hold its Linears and convolutions packed."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    shapes = _ShapeQuantization(quantization.bits, quantization.quantizer)
    pack_layers(model, shapes, weights.__getitem__, dtype=dtype, device=META)


def denoiser_skeleton(
    folder: ModelFolder, recipe: Recipe, *, blocks: Collection[int], latent_side: int | None
) -> tuple[DenoiserAdapter, ShapeTiles | None]:
    """The denoiser as `ModelFolder.load_denoiser` would give it, and what holds its tile where it is streamed.

    Args:
        folder: the model.
        recipe: how its weights are held.
        blocks: the others are taken out.
        latent_side: the largest that it will work at; None: any.
    """
    adapter = folder.empty_denoiser()
    for index in set(range(adapter.block_count)) - set(blocks):
        adapter.remove_block(index)
    if latent_side:
        crop_table(adapter.model, latent_side // adapter.patch_size)
    dtype = dtype_of(recipe)
    retype(adapter.model, dtype)
    if recipe.weights == "streamed":
        return adapter, stream_shapes(adapter.model, dtype=dtype)
    quantization = quantization_of(recipe)
    if quantization is not None:
        pack_shapes(adapter.model, quantization, dtype=dtype)
    adapter.model.requires_grad_(False)
    return adapter, None


def retype(model: nn.Module, dtype: torch.dtype) -> None:
    """Change floating-point parameters and buffers of a model, and bring all to the meta device; tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def like(value: Tensor) -> Tensor:
        kind = dtype if value.is_floating_point() else value.dtype
        return made.setdefault(id(value), torch.empty(value.shape, dtype=kind, device=META))

    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else like(buffer)
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(
                    torch.empty(
                        parameter.shape, dtype=dtype if parameter.is_floating_point() else parameter.dtype, device=META
                    ),
                    requires_grad=False,
                )
            module._parameters[name] = None if parameter is None else cast(nn.Parameter, made[id(parameter)])


def held_tensors(model: nn.Module, *, without_embeddings: bool = False) -> list[Tensor]:
    """All parameters and buffers; of a streamed model, tables of embeddings are not among them."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} if without_embeddings else set()
    return [value for value in (*model.parameters(), *model.buffers()) if id(value) not in tables]


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Of the frozen weights and of the arithmetic."""
    return cast(torch.dtype, getattr(torch, recipe.dtype))
