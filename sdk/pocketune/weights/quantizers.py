"""How the codes of a packed weight are chosen: one scale and one zero a row. A quantizer is one function and one line below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pocketune.errors import PlanError
from pocketune.weights.layers import PackedConv2d, PackedLinear
from pocketune.weights.quant import Packed, pack

Quantizer = Callable[[Tensor, int], Packed]
"""Packs a float matrix, (rows, columns), to a number of bits."""


@dataclass(frozen=True)
class Quantization:
    """How a model's Linears and convolutions are packed: bits of a code, and the quantizer's name."""

    bits: Literal[4, 8]
    quantizer: str = "minmax"

    def pack(self, weight: Tensor) -> Packed:
        """The packed form of a weight, (rows, ...).

        Raises:
            PlanError: the quantizer is not installed.
        """
        return QUANTIZERS[self.quantizer](weight.flatten(1), self.bits)


def minmax(matrix: Tensor, bits: int) -> Packed:
    """From the least to the largest value of each row, as TuneQDM's code does."""
    return pack(matrix, bits=bits)


def hqq(matrix: Tensor, bits: int) -> Packed:
    """Half-quadratic quantization by torchao: the zero of each row is fitted, in floating point, so that errors are sparse.

    Paper: Badri and Shaji 2023, "Half-quadratic quantization of large machine learning models".

    Raises:
        PlanError: torchao is not installed.
    """
    try:
        # Its public entry points fit scales alone, or pack for kernels of their own.
        from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as fit
    except ImportError as error:
        msg = "the quantizer \"hqq\" is torchao's, which is not installed. Run: pip install 'pocketune[quant]'"
        raise PlanError(msg) from error
    codes, scales, zeros, _ = fit(
        matrix.float(),
        nbits=bits,
        group_size=matrix.shape[1],
        compute_dtype=torch.float32,
        device=str(matrix.device),
        raw_output=True,
    )
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return Packed(codes=codes.contiguous(), scales=scales, zeros=zeros, bits=bits)


QUANTIZERS: dict[str, Quantizer] = {"minmax": minmax, "hqq": hqq}


def pack_layers(
    model: nn.Module, quantization: Quantization, read: Callable[[str], Tensor], *, dtype: torch.dtype, device: torch.device
) -> set[str]:
    """Put packed layers in the place of a model's Linears and convolutions, one after the other.

    Args:
        model: changed in place; biases stay.
        quantization: how to pack.
        read: gives the float weight of a name; it is dropped when the layer is done.
        dtype: what others are told that the weights have.
        device: where codes go.

    Returns:
        The names of the weights that were packed.
    """
    names = set()
    for path, layer in list(model.named_modules()):
        if not packs(layer, quantization.bits):
            continue
        packed = quantization.pack(read(f"{path}.weight").to(device))
        kind = PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, kind(layer, packed, dtype=dtype).eval())
        names.add(f"{path}.weight")
    return names


def packs(layer: nn.Module, bits: int) -> bool:
    """Whether a layer is one that `pack_layers` packs."""
    # By exact type: subclasses may compute something else.
    if type(layer) is nn.Conv2d:
        usual = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return usual and layer.weight[0].numel() * bits % 8 == 0
    return type(layer) is nn.Linear and layer.in_features * bits % 8 == 0
