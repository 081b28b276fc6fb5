"""Quantization of frozen matrices: what is stored, and the float32 weights that it stands for.

Weights that the recipe packs (`weight_bits`) are stored as training on a PC holds them: unsigned codes with a scale and a zero
a row, scale * (code - zero), so that both compute with the same numbers. All others are quantized symmetrically, as asked for.

A group of neighbouring weights of a row shares one scale: scale = max |w| / Q with Q = 127 (int8) or 7 (int4), and the stored
weight is round(w / scale). int4 keeps two weights a byte, each plus 8: the low halves of the bytes hold the first half of a
group, the high halves the second; so do packed weights of 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pocketune.weights.quant import Packed

Storage = Literal["fp32", "fp16", "int8", "int4"]
MIN_ELEMENTS = 4096
"""Smaller matrices are not worth a scale a row."""


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    Attributes:
        values: int8 (groups, length), or uint8 (groups, length / 2) of int4.
        scales: float32 (groups,).
        shape: of the matrix.
    """

    values: NDArray[np.int8] | NDArray[np.uint8]
    scales: NDArray[np.float32]
    shape: tuple[int, ...]

    def dequantize(self) -> NDArray[np.float32]:
        """The float32 matrix that every runtime computes with, exactly."""
        signed: NDArray[np.int8]
        if self.values.dtype == np.uint8:
            halves = np.concatenate([self.values & 15, self.values >> 4], axis=1)
            signed = halves.astype(np.int8) - 8
        else:
            signed = self.values.astype(np.int8)
        whole: NDArray[np.float32] = signed.astype(np.float32) * self.scales[:, None]
        return whole.reshape(self.shape)


def storage_of(shape: tuple[int, ...], *, wanted: Storage, matmul: bool, block: int | None) -> Storage:
    """How a weight is stored when `wanted` is asked for: only matrices of multiplications are quantized, the rest is fp16.

    Args:
        shape: of the weight.
        wanted: the bundle's storage.
        matmul: whether it is the matrix of a matrix multiplication.
        block: group length; None for a row.
    """
    if wanted == "fp32":
        return "fp32"
    quantizable = matmul and len(shape) == 2 and shape[0] * shape[1] >= MIN_ELEMENTS
    if wanted == "fp16" or not quantizable:
        return "fp16"
    return "int8" if wanted == "int4" and group_length(shape, block) % 2 else wanted


def group_length(shape: tuple[int, ...], block: int | None) -> int:
    """Weights a scale: `block` where it divides a row, else a row."""
    return block if block is not None and shape[1] % block == 0 else shape[1]


def quantize(matrix: NDArray[np.float32], *, storage: Literal["int8", "int4"], block: int | None) -> Quantized:
    """Round a matrix (out, in) to the nearest representable one."""
    length = group_length(matrix.shape, block)
    groups = np.ascontiguousarray(matrix, dtype=np.float32).reshape(-1, length)
    largest = np.float32(127 if storage == "int8" else 7)
    scales = np.maximum(np.abs(groups).max(axis=1) / largest, np.float32(np.finfo(np.float32).tiny))
    whole = np.clip(np.rint(groups / scales[:, None]), -largest, largest).astype(np.int8)
    if storage == "int8":
        return Quantized(whole, scales, matrix.shape)
    nibbles = (whole + 8).astype(np.uint8)
    packed = nibbles[:, : length // 2] | (nibbles[:, length // 2 :] << 4)
    return Quantized(packed, scales, matrix.shape)


def packed_parts(packed: Packed) -> dict[str, NDArray[np.generic]]:
    """The tensors of a packed weight by role: codes, uint8; scale, float32; zero, uint8 or, where it was fitted, float32."""
    codes = packed.codes.cpu().numpy()
    if packed.bits == 4:
        pairs = np.stack([codes & 15, codes >> 4], axis=2).reshape(codes.shape[0], -1)
        half = pairs.shape[1] // 2
        codes = pairs[:, :half] | (pairs[:, half:] << 4)
    zeros = packed.zeros[:, 0].cpu()
    zeros = zeros if zeros.dtype == torch.uint8 else zeros.float()
    return {"weight": codes, "scale": packed.scales[:, 0].float().cpu().numpy(), "zero": zeros.numpy()}


def stored_value(weight: NDArray[np.float32], *, storage: Storage, block: int | None) -> NDArray[np.float32]:
    """The float32 weight that a bundle with this storage computes with."""
    if storage == "fp32":
        return weight
    if storage == "fp16":
        return weight.astype(np.float16).astype(np.float32)
    return quantize(weight, storage=storage, block=block).dequantize()
