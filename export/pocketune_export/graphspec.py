"""What a manifest says of each graph, and the strict types that all of it is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pocketune_edge.agreement import MAX_ELEMENTS, MAX_PATH_CHARACTERS, Role, path_fault, tensor_faults

Dtype = Literal["float32", "int64"]
Count = Annotated[int, Field(ge=0, le=MAX_ELEMENTS)]
Size = Annotated[int, Field(ge=1, le=MAX_ELEMENTS)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=300)]
Share = Annotated[float, Field(gt=0, lt=1)]


def checked_path(path: str) -> str:
    """Return a bundle path as it is, if it names a file inside the bundle on every system.

    Raises:
        ValueError: it does not.
    """
    fault = path_fault(path)
    if fault:
        raise ValueError(fault)
    return path


BundlePath = Annotated[str, Field(max_length=MAX_PATH_CHARACTERS), AfterValidator(checked_path)]


class Strict(BaseModel):
    """Nothing unknown, nothing converted, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TensorSpec(Strict):
    """An input or output of a graph. Shapes are static."""

    name: Name
    shape: tuple[Count, ...] = Field(max_length=8)
    dtype: Dtype
    meaning: Name

    @property
    def elements(self) -> int:
        """The product of the shape."""
        count = 1
        for side in self.shape:
            count *= side
        return count


class Graph(Strict):
    """One graph: a pure function of its inputs and of frozen weights."""

    name: Name
    file: BundlePath
    role: Role
    block: Count | None = Field(
        description="Which block, of block_forward and block_vjp; which part, of text_encoder (counted through all encoders), "
        "vae_encoder and vae_decoder; else null."
    )
    part: Count = Field(description="Which piece of a block's graph, where that is cut; all run in order. Else 0.")
    parameters: tuple[Count, Count] | None = Field(
        description="Slice [start, stop) of the flat vector that its `parameters` and `gradients` are; null without any."
    )
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    weights: tuple[BundlePath, ...] = Field(description="Files with this graph's frozen weights, memory-mapped by the runtime.")
    weight_bytes: Count = Field(description="Bytes of those files that this graph reads.")
    activation_bytes: Count = Field(description="Planned peak of its intermediate results, when run in graph order.")

    @model_validator(mode="after")
    def _tensors_can_be(self) -> Self:
        here: Any = self  # the rule names the device's class, and reads attributes alone
        for complaint in tensor_faults(here):
            raise ValueError(complaint)
        return self
