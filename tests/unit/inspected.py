"""What tests of inspection share: shorthands, and the tensors of a LoRA."""

import json
from pathlib import Path

import numpy as np
import pytest

from pocketune.errors import FileFormatError
from pocketune.inspection import Inspection, inspect


def describe(path: Path) -> Inspection:
    found = inspect(path)
    json.dumps(found.as_dict(), allow_nan=False)  # raises where it is no JSON
    return found


def fault(path: Path) -> str:
    with pytest.raises(FileFormatError) as caught:
        inspect(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def pairs(
    targets: list[str], *, rank: int = 4, width: int = 8, down: str, up: str, zero: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {}
    for target in targets:
        tensors[target + down] = rng.normal(size=(rank, width)).astype(np.float32)
        tensors[target + up] = np.full((width, rank), 0.0 if target in zero else -0.25, np.float32)
    return tensors


def sd3_targets(blocks: list[int]) -> list[str]:
    return [
        f"transformer.transformer_blocks.{block}.attn.{name}" for block in blocks for name in ("to_q", "to_out.0", "add_k_proj")
    ]


PEFT = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
